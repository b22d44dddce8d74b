"""Engines that die and files that are no models: one clear error each, and the server serves on."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import OTHER, Serve
from tests.fakes.gguf_writer import write_gguf
from tests.server import (
    MODEL,
    STARTER,
    Server,
    check_error,
    error_of,
    held,
    link_or_copy,
    ok,
    starter,
    together,
)
from tests.waiting import wait_for

HEAD_BYTES = 4 << 20  # holds the starter's header and the first of its tensors
LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53\n"
    b"size 98362432\n"
)


# Engines that are killed.


def test_killed_engine_ends_its_stream_with_one_error(server: Server) -> None:
    server.load(OTHER)
    other = server.engine(OTHER)
    with (
        server.stream("Tell me a story.", max_tokens=2000, ignore_eos=True) as stream,
        server.stream("A story.", model=OTHER, max_tokens=30, ignore_eos=True) as spared,
    ):
        stream.first()
        spared.first()
        label = stream.response.headers["x-xandrouting-engine"]
        server.engine(MODEL).process.kill()
        *chunks, last = stream.rest()
        assert spared.rest()[-1] == "[DONE]"
    assert "[DONE]" not in chunks
    assert not any("error" in json.loads(chunk) for chunk in chunks)
    check_error(json.loads(last), "engine_error")
    assert server.engine(OTHER).process == other.process
    again = server.chat()
    assert ok(again)
    assert again.headers["x-xandrouting-engine"] != label
    assert again.headers["x-xandrouting-load"].startswith("cold")


def test_killed_engine_and_a_plain_answer(server: Server) -> None:
    """Nothing was sent yet, so the request may have the next engine; otherwise it fails."""
    server.load(MODEL)
    engine = server.engine(MODEL)
    starts = server.starts()
    with together(1) as pool:
        asked = pool.submit(server.chat, "A story.", max_tokens=200, ignore_eos=True)
        wait_for(engine.busy)
        engine.process.kill()
        answer = asked.result(20)
    if answer.status_code == 200:
        assert answer.json()["usage"]["completion_tokens"] == 200
        assert answer.headers["x-xandrouting-load"].startswith("cold")
        assert server.starts() == starts + 1
    else:
        error_of(answer, 502, "engine_error")
    assert ok(server.chat())


def test_killed_idle_engine_is_loaded_anew(server: Server) -> None:
    server.load(MODEL)
    server.engine(MODEL).process.kill()
    wait_for(lambda: server.loaded() == [])
    assert ok(server.chat())
    assert "engine exited" in server.log()


def test_engine_killed_while_it_loads(server: Server) -> None:
    with together(1) as pool:
        asked = pool.submit(server.chat)
        with held(server) as process:
            process.kill()
        error = error_of(asked.result(10), 503, "engine_start_failed")
    assert error["details"]["reason"] == "killed"
    wait_for(lambda: server.chat().status_code == 200, 20)  # after its back-off


# Files that no engine can load.


def truncated_header(path: Path) -> None:
    path.write_bytes(starter().read_bytes()[:4096])


def truncated_data(path: Path) -> None:
    with starter().open("rb") as source:
        path.write_bytes(source.read(HEAD_BYTES))


BAD_FILES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "random": lambda path: path.write_bytes(random.Random(7).randbytes(100_000)),
    "text": lambda path: path.write_text("This is not a model.\n" * 100),
    "html": lambda path: path.write_text("<!DOCTYPE html><html>Access denied</html>"),
    "lfs": lambda path: path.write_bytes(LFS_POINTER),
    "magic-only": lambda path: path.write_bytes(b"GGUF"),
    "header-cut": truncated_header,
    "data-cut": truncated_data,
    "no-architecture": lambda path: write_gguf(path, arch=None),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file_is_refused_before_any_start(server: Server, kind: str) -> None:
    path = server.models / "bad" / f"{kind}.gguf"
    path.parent.mkdir(exist_ok=True)
    BAD_FILES[kind](path)
    starts = server.starts()
    try:
        for _ in range(3):
            error = error_of(server.chat(model=f"bad/{kind}.gguf"), 400, "invalid_model_file")
            assert f"/models/bad/{kind}.gguf" in error["message"]
        with server.stream(model=f"bad/{kind}.gguf") as stream:
            assert stream.response.status_code == 400
        answer = server.post("/v1/models/load", {"model": f"bad/{kind}.gguf"})
        error_of(answer, 400, "invalid_model_file")
        assert server.starts() == starts
        inventory = ok(server.get("/v1/models/inventory"))["models"]
        [item] = [item for item in inventory if item["path"] == f"/models/bad/{kind}.gguf"]
        assert item["problem"]
        ids = [model["id"] for model in ok(server.get("/v1/models"))["data"]]
        assert item["path"] not in ids
    finally:
        path.unlink()
    assert ok(server.chat())


def test_missing_file(server: Server) -> None:
    for name in ("/models/nosuch/nosuch.gguf", "nosuch", "/models/nosuch"):
        error_of(server.chat(model=name), 404, "model_not_found")


def test_unreadable_file(server: Server) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    path = server.models / "closed.gguf"
    write_gguf(path).chmod(0)
    error_of(server.chat(model="closed"), 400, "invalid_model_file")


def test_unknown_architecture_is_refused_before_any_start(serve: Serve) -> None:
    """Nobody leaves for it, and it is listed as what it is."""
    server = serve(max_loaded=1)
    write_gguf(server.models / "odd" / "odd.gguf", arch="nosuch")
    server.load()
    odd = "/models/odd/odd.gguf"
    error = error_of(server.chat(model=odd), 400, "invalid_model_file")
    assert odd in error["message"]
    assert "'nosuch'" in error["message"]
    error_of(server.post("/v1/models/plan", {"model": odd}), 400, "invalid_model_file")
    assert (server.starts(), [item["path"] for item in server.loaded()]) == (1, [MODEL])
    inventory = {item["path"]: item for item in ok(server.get("/v1/models/inventory"))["models"]}
    assert "'nosuch'" in inventory[odd]["problem"]
    assert inventory[odd]["fits"] is None
    assert [model["id"] for model in ok(server.get("/v1/models"))["data"]] == [MODEL]


@pytest.fixture
def thin(server: Server) -> Iterator[str]:
    """A whole GGUF file of a known architecture that lacks what only the engine looks for."""
    path = write_gguf(server.models / "thin" / "thin.gguf")
    yield "/models/thin/thin.gguf"
    path.unlink(missing_ok=True)


def test_file_that_the_engine_refuses_is_told(server: Server, thin: str) -> None:
    error = error_of(server.chat(model=thin), 400, "invalid_model_file")
    assert error["details"]["reason"] == "bad_file"
    assert thin in error["message"]
    assert "hyperparameters" in server.log()  # the engine's last lines are there
    listed = ok(server.get(f"/v1/models{thin}"))["status"]
    assert (listed["value"], listed["failed"], listed["message"]) == (
        "failed",
        True,
        error["message"],
    )
    assert ok(server.chat())


def test_failing_start_makes_no_storm(serve: Serve) -> None:
    server = serve()
    write_gguf(server.models / "thin" / "thin.gguf")
    with together(8) as pool:
        for _ in range(5):
            asked = [pool.submit(server.chat, model="thin") for _ in range(8)]
            for one in asked:
                error_of(one.result(20), 400, "invalid_model_file")
    assert 1 <= server.starts("/models/thin/thin.gguf") <= 2
    assert server.tree() == []
    assert server.stats()["load_failures"] == server.starts()


def test_mended_file_is_tried_at_once(server: Server, thin: str) -> None:
    error_of(server.chat(model=thin), 400, "invalid_model_file")
    path = server.models / "thin" / "thin.gguf"
    path.unlink()
    link_or_copy(starter(), path)
    assert ok(server.chat(model=thin))


@pytest.mark.skipif(psutil.virtual_memory().total > 40 << 30, reason="it would fit")
def test_more_than_the_memory(serve: Serve) -> None:
    """It is known before anybody leaves or starts; who asks for less is served."""
    server = serve(STARTER, OTHER.removeprefix("/models/"))
    server.load(OTHER)
    answer = server.chat(n_ctx=8192, n_parallel=256)
    error = error_of(answer, 503, "insufficient_memory")
    assert "n_ctx" in error["message"]
    details = error["details"]
    [host] = details["devices"]
    assert host["needed_bytes"] > psutil.virtual_memory().total > host["budget_bytes"]
    assert details["lacking_bytes"]["host"] > 0
    offered = {offer["change"]: offer for offer in details["alternatives"]}
    assert offered["n_ctx"]["n_ctx"] < 8192
    assert offered["n_parallel"]["n_parallel"] < 256
    assert "retry-after" not in answer.headers  # waiting does not help
    assert [item["path"] for item in server.loaded()] == [OTHER]
    assert (server.starts(), server.starts(MODEL)) == (1, 0)
    assert ok(server.chat())


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ({"n_ctx": 2_000_000_000, "n_parallel": 1}, {"n_ctx": 8192, "n_parallel": 1}),
        ({"n_ctx": 1, "n_parallel": 1}, {"n_ctx": 1, "n_parallel": 1}),
        ({"n_ctx": 16, "n_parallel": 1000}, {"n_ctx": 16, "n_parallel": 256}),
    ],
    ids=["huge-context", "tiny-context", "many-slots"],
)
def test_absurd_options_do_no_harm(
    server: Server, asked: dict[str, int], got: dict[str, int]
) -> None:
    loaded = server.load(MODEL, **asked)
    assert {name: loaded[name] for name in got} == got
    assert server.chat(max_tokens=1, **asked).headers["x-xandrouting-load"] == "hit"


# Names that lead elsewhere.


ESCAPES = {
    "up": "/models/../secret.gguf",
    "up-deep": "/models/smollm2-135m-instruct/../../secret.gguf",
    "up-short": "../secret.gguf",
    "up-only": "..",
    "absolute": "/etc/passwd",
    "absolute-gguf": "/secret.gguf",
    "backslash": "..\\secret.gguf",
    "nul": "/models/a\0.gguf",
    "newline": "/models/a\n.gguf",
    "long": "/models/" + "a" * 5000,
    "symlink-file": "/models/links/out.gguf",
    "symlink-folder": "/models/outside/secret.gguf",
    "symlink-folder-itself": "/models/outside",
    "surrogate": "/models/\ud800.gguf",
}


@pytest.fixture(scope="module")
def with_links(module_server: Server) -> Server:
    """The server, with a model beside its models folder and symlinks that lead there."""
    outside = module_server.models.parent
    link_or_copy(starter(), outside / "secret.gguf")
    (module_server.models / "links").mkdir()
    (module_server.models / "links" / "out.gguf").symlink_to(outside / "secret.gguf")
    (module_server.models / "outside").symlink_to(outside)
    return module_server


@pytest.mark.parametrize("case", ESCAPES)
def test_name_that_leaves_the_root_opens_nothing(
    server: Server, with_links: Server, case: str
) -> None:
    starts = server.starts()
    body = {"model": ESCAPES[case], "messages": [{"role": "user", "content": "Hi"}]}
    raw = json.dumps(body)  # escapes what is no character
    headers = {"content-type": "application/json"}
    expected = "invalid_request" if case == "surrogate" else "invalid_model_path"
    for path in ("/v1/chat/completions", "/v1/models/load", "/v1/models/unload"):
        error_of(server.client.post(path, content=raw, headers=headers), 400, expected)
    assert server.starts() == starts
    ids = {item["path"] for item in ok(server.get("/v1/models/inventory"))["models"]}
    assert ids == {MODEL, OTHER}


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/..%2F..%2Fsecret.gguf",
        "/v1/models/%2e%2e/%2e%2e/secret.gguf",
        "/v1/models/models/%2e%2e/secret.gguf",
        "/v1/models//etc/passwd",
        "/v1/models/models/outside/secret.gguf",
        "/v1/models/a%00b",
    ],
)
def test_address_that_leaves_the_root_opens_nothing(
    server: Server, with_links: Server, path: str
) -> None:
    error_of(server.get(path), 400, "invalid_model_path")


def test_percent_is_a_character_like_any_other(server: Server) -> None:
    error_of(server.chat(model="/models/%2e%2e/secret.gguf"), 404, "model_not_found")


# Files that come and go.


def test_new_file_is_found_without_a_restart(server: Server) -> None:
    new = server.models / "fresh" / "Fresh-Q4_1.gguf"
    new.parent.mkdir()
    link_or_copy(starter(), new)
    try:
        answer = server.chat(model="fresh")
        assert ok(answer)["model"] == "/models/fresh/Fresh-Q4_1.gguf"
        assert "/models/fresh/Fresh-Q4_1.gguf" in server.get("/v1/models").text
    finally:
        new.unlink()


def test_file_deleted_while_it_is_loaded(server: Server) -> None:
    """The engine goes on with what it has; once it is gone, so is the model."""
    path = server.models / "brief" / "brief.gguf"
    path.parent.mkdir()
    link_or_copy(starter(), path)
    model = "/models/brief/brief.gguf"
    assert ok(server.chat(model=model))
    path.unlink()
    assert ok(server.chat(model=model))
    assert model not in [item["id"] for item in ok(server.get("/v1/models"))["data"]]
    assert [item["path"] for item in server.loaded()] == [model]
    assert ok(server.unload(model))["count"] == 1
    error_of(server.chat(model=model), 404, "model_not_found")


def test_file_replaced_while_it_is_loaded(server: Server) -> None:
    path = server.models / "swap" / "swap.gguf"
    path.parent.mkdir()
    link_or_copy(starter(), path)
    assert ok(server.chat(model="swap"))
    server.unload("swap")
    path.unlink()
    path.write_bytes(b"GGUF")
    error_of(server.chat(model="swap"), 400, "invalid_model_file")
    path.unlink()


def test_models_folder_may_be_missing(serve: Serve) -> None:
    server = serve()
    (server.models / STARTER).unlink()
    (server.models / STARTER).parent.rmdir()
    server.models.rmdir()
    assert ok(server.get("/v1/models"))["data"] == []
    error_of(server.chat(), 404, "model_not_found")
    assert ok(server.get("/health"))["status"] == "healthy"
