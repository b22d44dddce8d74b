"""What lies on disk, as the lists and the events tell it."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Serve
from tests.fakes.gguf_writer import write_gguf
from tests.fakes.safetensors_writer import LFS_POINTER, write_folder
from tests.server import MODEL, STARTER, Server, error_of, link_or_copy, models_dir, ok, starter
from tests.waiting import wait_for

SOON_S = 2.0


def on_disk(server: Server) -> dict[str, dict[str, Any]]:
    items = ok(server.get("/v1/models/inventory"))["models"]
    return {item["path"]: item for item in items}


def ids(server: Server) -> set[str]:
    return {model["id"] for model in ok(server.get("/v1/models"))["data"]}


def no_tokenizer(path: Path) -> None:
    write_folder(path, tokenizer=None)


def shard_missing(path: Path) -> None:
    (write_folder(path, parts=2) / "model-00002-of-00002.safetensors").unlink()


def shard_replaced(data: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        (write_folder(path, parts=2) / "model-00002-of-00002.safetensors").write_bytes(data)

    return write


def part(no: int, of: int) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        write_gguf(path, metadata={"split.count": of, "split.no": no - 1})

    return write


def closed(path: Path) -> None:
    write_gguf(path).chmod(0)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty.gguf": (lambda path: path.write_bytes(b""), "empty file"),
    "lfs.gguf": (lambda path: path.write_bytes(LFS_POINTER), "a git-lfs pointer, not the model"),
    "html.gguf": (lambda path: path.write_text("<!DOCTYPE html>"), "not a GGUF file"),
    "cut.gguf": (
        lambda path: path.write_bytes(write_gguf(path).read_bytes()[:-1]),
        "cut short: the header says",
    ),
    "head-cut.gguf": (
        lambda path: write_gguf(path, truncate=100),
        "cut short: the file ends inside its header",
    ),
    "odd.gguf": (lambda path: write_gguf(path, arch="nosuch"), "does not know the architecture"),
    "adapter.gguf": (
        lambda path: write_gguf(path, metadata={"general.type": "adapter"}),
        "an adapter, not a model of its own",
    ),
    "imatrix.gguf": (
        lambda path: write_gguf(path, arch=None, metadata={"general.type": "imatrix"}),
        "an importance matrix, not a model",
    ),
    "vocabulary.gguf": (lambda path: write_gguf(path, tensors=()), "no weights"),
    "split-00001-of-00003.gguf": (part(1, 3), "2 of 3 parts missing: 2, 3"),
    "swapped-00001-of-00001.gguf": (part(2, 3), "its header says it is part 2 of 3"),
    "closed.gguf": (closed, "unreadable: Permission denied"),
    "shard-missing": (shard_missing, "1 of 2 parts missing: 2"),
    "shard-lfs": (shard_replaced(LFS_POINTER), "part 2 of 2: a git-lfs pointer, not the model"),
    "shard-empty": (shard_replaced(b""), "part 2 of 2: empty file"),
    "no-tokenizer": (no_tokenizer, "its tokenizer is missing"),
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("damaged")
    models = models_dir(root / "models")
    (models / "bad").mkdir()
    for name, (write, _) in BAD.items():
        write(models / "bad" / name)
    with Server(models, root / "data") as server:
        yield server


@pytest.mark.parametrize("name", BAD)
def test_what_is_damaged_is_listed_with_why(damaged: Server, name: str) -> None:
    if name == "closed.gguf" and os.geteuid() == 0:
        pytest.skip("root reads everything")
    item = on_disk(damaged)[f"/models/bad/{name}"]
    assert BAD[name][1] in item["problem"]
    assert item["fits"] is None
    assert not item["is_loaded"]
    assert item["size"] >= 0
    assert f"/models/bad/{name}" not in ids(damaged)
    error = error_of(damaged.get(f"/v1/models/bad/{name}"), 404, "model_not_found")
    assert BAD[name][1] in error["message"]


TEMPLATE = {"tokenizer.chat_template": "{% if tools %}{{ tools }}{% endif %}{{ messages }}"}
PLAIN = {"tokenizer.chat_template": "{{ messages }}"}


def test_capabilities(serve: Serve, tmp_path: Path) -> None:
    models = tmp_path / "models"
    write_gguf(models / "bare.gguf")
    write_gguf(models / "plain.gguf", metadata=PLAIN)
    write_gguf(models / "tools.gguf", metadata=TEMPLATE)
    named = {**PLAIN, "tokenizer.chat_template.tool_use": "{{ tools }}"}
    write_gguf(models / "named.gguf", metadata=named)
    write_gguf(models / "embed.gguf", metadata={"llama.pooling_type": 1})
    write_gguf(models / "rank.gguf", metadata={"llama.pooling_type": 4})
    write_gguf(models / "vl" / "vl.gguf", metadata=TEMPLATE)
    write_gguf(models / "vl" / "mmproj.gguf", arch="clip")
    write_folder(models / "smol", chat_template__jinja="{{ tools }}")
    write_folder(models / "sentences", modules__json="[]")
    items = on_disk(serve())
    assert {path: item["capabilities"] for path, item in items.items() if path != MODEL} == {
        "/models/bare.gguf": ["completion"],
        "/models/plain.gguf": ["completion", "chat"],
        "/models/tools.gguf": ["completion", "chat", "tools"],
        "/models/named.gguf": ["completion", "chat", "tools"],
        "/models/embed.gguf": ["embedding"],
        "/models/rank.gguf": ["rerank"],
        "/models/vl/vl.gguf": ["completion", "chat", "tools", "vision"],
        "/models/smol": ["completion", "chat", "tools"],
        "/models/sentences": ["embedding"],
    }
    assert items[MODEL]["recommended_reason"] == "llama.cpp serves GGUF files"
    assert items["/models/smol"]["recommended_backend"] == "vllm"
    assert items["/models/smol"]["recommended_reason"].startswith(
        "vLLM serves folders of safetensors"
    )


def test_without_vllm_the_reason_says_how_to_get_it(serve: Serve, tmp_path: Path) -> None:
    write_folder(tmp_path / "models" / "smol")
    server = serve(environment={"VLLM_BIN": str(tmp_path / "nosuch")})
    item = on_disk(server)["/models/smol"]
    assert "It cannot be used here" in item["recommended_reason"]
    assert item["fits"] is False


def test_a_change_is_told_soon(serve: Serve) -> None:
    server = serve()
    with server.events(topics="model") as events:
        file = server.models / "new" / "new.gguf"
        began = time.monotonic()
        write_gguf(file)
        told = events.until(lambda kind, data: kind == "inventory" and data["added"])
        assert told["added"] == ["/models/new/new.gguf"]
        assert told["removed"] == []
        assert time.monotonic() - began < SOON_S
        assert "/models/new/new.gguf" in ids(server)
        file.unlink()
        told = events.until(lambda kind, data: kind == "inventory" and data["removed"])
        assert told["removed"] == ["/models/new/new.gguf"]
        assert ids(server) == {MODEL}


def test_a_listed_change_is_seen_at_once(serve: Serve) -> None:
    server = serve()
    for number in range(5):
        write_gguf(server.models / f"{number}.gguf")
        assert f"/models/{number}.gguf" in on_disk(server)


def test_further_roots(serve: Serve, tmp_path: Path) -> None:
    nas, other = tmp_path / "nas", tmp_path / "other" / "nas"
    models_dir(nas, "far/far.gguf")
    write_gguf(other / "x.gguf")
    server = serve(model_roots=f"{nas},{other},big={tmp_path / 'absent'}")
    items = on_disk(server)
    far = "/models/nas/far/far.gguf"
    assert set(items) == {MODEL, far, "/models/nas-2/x.gguf"}
    assert [items[path]["read_only"] for path in (MODEL, far)] == [False, True]
    assert items[far]["model_path"] == "/models/nas/far"
    assert ok(server.chat(model=far))["model"] == far
    assert [item["path"] for item in server.loaded()] == [far]
    write_gguf(tmp_path / "absent" / "late.gguf")
    wait_for(lambda: "/models/big/late.gguf" in on_disk(server), 5)


def test_settings_of_roots_that_cannot_be(tmp_path: Path) -> None:
    models = models_dir(tmp_path / "models")
    for roots in ("a/b=/x", ".x=/y", "x=", "=/x"):
        server = Server(models, tmp_path / "data", model_roots=roots)
        assert "write PATH, or NAME=PATH" in server.refuses_to_start()


def test_headers_are_remembered_and_a_damaged_memory_is_no_harm(
    serve: Serve, tmp_path: Path
) -> None:
    server = serve()
    before = on_disk(server)
    memory = tmp_path / "data" / "headers.db"
    assert memory.stat().st_size
    server.kill9()
    server.start()
    assert on_disk(server) == before
    assert server.stop() == 0
    memory.write_bytes(b"x" * 10_000)
    server.start()
    assert on_disk(server) == before
    assert "headers file moved aside" in server.log()


def test_a_models_directory_that_comes_late(tmp_path: Path) -> None:
    with Server(tmp_path / "models", tmp_path / "data") as server:
        assert ids(server) == set()
        link_or_copy(starter(), _made(tmp_path / "models" / STARTER))
        wait_for(lambda: ids(server) == {MODEL}, SOON_S)
        assert ok(server.chat())


def test_a_models_directory_that_is_deleted_and_comes_again(serve: Serve) -> None:
    server = serve()
    with server.events(topics="model") as events:
        for number in range(3):
            shutil.rmtree(server.models)
            new = f"/models/{number}.gguf"
            began = time.monotonic()
            write_gguf(server.models / f"{number}.gguf")
            told = events.until(lambda kind, data: kind == "inventory" and data["added"])
            assert told["added"] == [new]
            assert time.monotonic() - began < SOON_S
            assert ids(server) == {new}


def test_a_models_directory_that_is_a_model_is_listed(tmp_path: Path) -> None:
    """People point vLLM at a folder like that."""
    models = write_folder(tmp_path / "smol")
    write_gguf(models / "loose.gguf")
    with Server(models, tmp_path / "data") as server:
        items = on_disk(server)
        assert items.keys() == {"/models/loose.gguf", "/models/smol"}
        assert items["/models/smol"]["problem"] is None
        assert items["/models/smol"]["model_path"] == "/models/smol"
        assert items["/models/smol"]["read_only"]
        assert server.client.delete("/v1/models//models/smol").status_code == 403
        assert on_disk(server) == items
        assert "set models_dir to the folder above" in server.log()


def test_a_file_whose_name_is_no_text_is_no_harm(serve: Serve, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "models" / "smol")
    for name in (b"\xff.txt", b"line\nbreak.txt"):
        (folder / os.fsdecode(name)).touch()
    server = serve()
    assert on_disk(server).keys() == {MODEL, "/models/smol"}
    gone = ok(server.client.delete("/v1/models//models/smol"))
    names = ("config.json", "model.safetensors", "tokenizer.json")
    assert gone["files"] == [f"/models/smol/{name}" for name in names]
    assert on_disk(server).keys() == {MODEL}


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    return path


def test_many_new_files_are_listed_as_they_are_read(tmp_path: Path) -> None:
    """Whatever has been read is shown, ever more, and none of it as damaged."""
    models = models_dir(tmp_path / "models")
    words = [f"token{number}" for number in range(50_000)]
    first = write_gguf(models / "m" / "0.gguf", metadata={"tokenizer.ggml.tokens": words})
    for number in range(1, 600):
        (models / "m" / f"{number}.gguf").write_bytes(first.read_bytes())
    with Server(models, tmp_path / "data") as server:
        seen = [len(on_disk(server))]
        while seen[-1] < 601:
            items = on_disk(server)
            assert all(item["problem"] is None for item in items.values())
            seen.append(len(items))
        assert seen == sorted(seen)
        server.signal(signal.SIGKILL)
        server.wait()
        server.start()
        assert len(on_disk(server)) == 601


def test_tensors_go_before_the_name(serve: Serve) -> None:
    server = serve()
    for name, kind in (("m-Q4_0", "Q8_0"), ("n-Q4_1", "Q4_1")):
        tensors = [("token_embd.weight", (64, 64), kind)]
        write_gguf(server.models / f"{name}.gguf", tensors=tensors)
    items = on_disk(server)
    assert items["/models/m-Q4_0.gguf"]["quantization"] == "Q8_0"
    assert items["/models/n-Q4_1.gguf"]["quantization"] == "Q4_1"
