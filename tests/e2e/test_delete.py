"""`DELETE /v1/models/{id}`: what goes, what stays, and when it is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.e2e.conftest import OTHER, Serve
from tests.fakes.gguf_writer import write_gguf
from tests.fakes.hub import Hub
from tests.fakes.safetensors_writer import CONFIG, weights_bytes, write_folder
from tests.fetching import ask, until
from tests.server import (
    MODEL,
    STARTER,
    Server,
    error_of,
    models_dir,
    ok,
    results,
    starter,
    together,
)
from tests.waiting import wait_for


def delete(server: Server, model: str, **query: Any) -> Any:
    return server.client.delete(f"/v1/models/{model}", params=query)


def ids(server: Server) -> set[str]:
    return {model["id"] for model in ok(server.get("/v1/models"))["data"]}


def in_trash(server: Server) -> list[str]:
    return sorted(
        path.relative_to(place).as_posix()
        for place in (server.models / ".trash").iterdir()
        for path in place.rglob("*")
        if path.is_file()
    )


def test_a_model_goes_to_the_trash(serve: Serve) -> None:
    server = serve("smol/smol.gguf", OTHER.removeprefix("/models/"))
    with server.events(topics="model") as events:
        gone = ok(delete(server, "/models/smol/smol.gguf"))
        told = events.until(lambda kind, data: kind == "inventory")
    size = starter().stat().st_size
    assert gone["status"] == "deleted"
    assert gone["model"] == "/models/smol/smol.gguf"
    assert gone["files"] == ["/models/smol/smol.gguf"]
    assert gone["freed_bytes"] in (size, 0)  # 0: a hard link to the starter frees nothing
    assert gone["trash_until"].endswith("Z")
    assert gone["trash_until"] in gone["message"]
    assert told["removed"] == ["/models/smol/smol.gguf"]
    assert ids(server) == {OTHER}
    assert not (server.models / "smol").exists()
    assert in_trash(server) == ["smol/smol.gguf"]
    error_of(server.chat(model="/models/smol/smol.gguf"), 404, "model_not_found")
    error_of(delete(server, "/models/smol/smol.gguf"), 404, "model_not_found")
    [place] = (server.models / ".trash").iterdir()
    (place / "smol").rename(server.models / "smol")  # a slip is not the end
    assert ok(server.chat(model="/models/smol/smol.gguf"))


def test_many_delete_the_same(serve: Serve) -> None:
    server = serve("smol/smol.gguf")
    with together(8) as pool:
        answers = results([pool.submit(delete, server, "smol/smol.gguf") for _ in range(8)])
    first, *late = sorted(answers, key=lambda answer: answer.status_code)
    assert ok(first)["files"] == ["/models/smol/smol.gguf"]
    for answer in late:
        error_of(answer, 404, "model_not_found")
    assert in_trash(server) == ["smol/smol.gguf"]


@pytest.mark.parametrize(
    "spelling", ["models/a.gguf", "a.gguf", "/models/a.gguf", "models//a.gguf"]
)
def test_spellings_of_a_path(server: Server, spelling: str) -> None:
    write_gguf(server.models / "a.gguf")
    assert ok(delete(server, spelling))["model"] == "/models/a.gguf"
    assert not (server.models / "a.gguf").exists()


def test_purge(server: Server) -> None:
    file = write_gguf(server.models / "purged.gguf")
    size = file.stat().st_size
    gone = ok(delete(server, "models/purged.gguf", purge="true"))
    assert (gone["freed_bytes"], gone["trash_until"]) == (size, None)
    assert not list(server.models.rglob("purged.gguf"))


@pytest.mark.parametrize(
    "name", ["only", "models/only", "only-Q8_0", "only-Q8_0.gguf", "only-q8_0.GGUF"]
)
def test_names_that_requests_use(server: Server, name: str) -> None:
    file = write_gguf(server.models / "only" / "only-Q8_0.gguf")
    assert ok(delete(server, name))["model"] == "/models/only/only-Q8_0.gguf"
    assert not file.parent.exists()


@pytest.mark.parametrize("name", ["two", "models/two", "two-Q8"])
def test_a_name_of_several_or_of_none_deletes_nothing(server: Server, name: str) -> None:
    files = [write_gguf(server.models / "two" / f"two-{q}.gguf") for q in ("Q8_0", "Q4_0")]
    try:
        assert delete(server, name).status_code in (400, 404)
        assert all(file.exists() for file in files)
    finally:
        for file in files:
            file.unlink()
        files[0].parent.rmdir()


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("%2E%2E/secret.gguf", 400),
        ("models/%2E%2E/%2E%2E/secret.gguf", 400),
        ("/etc/passwd", 400),
        ("a%00b", 400),
        ("a%5Cb", 400),
        ("x" * 5000, 400),
        ("nosuch", 404),
        ("models/.trash", 404),
        ("models/.incoming/job", 404),
        (quote("models/ü ä.gguf"), 404),
    ],
)
def test_names_of_nothing(server: Server, name: str, status: int) -> None:
    secret = write_gguf(server.models.parent / "secret.gguf")
    answer = delete(server, name)
    assert answer.status_code == status
    error_of(answer, status, "invalid_model_path" if status == 400 else "model_not_found")
    assert secret.exists()
    assert ids(server) == {MODEL, OTHER}


@pytest.mark.parametrize("name", ["loaded", "inventory", "load", "stats"])
def test_another_calls_address_is_no_model(server: Server, name: str) -> None:
    folder = write_folder(server.models / name)
    try:
        error_of(delete(server, name), 405, "method_not_allowed")
        assert folder.exists()
    finally:
        ok(delete(server, f"/models/{name}"))
    assert not folder.exists()


def test_a_loaded_model_stays(serve: Serve) -> None:
    server = serve(OTHER.removeprefix("/models/"))
    server.load(OTHER)
    error = error_of(delete(server, OTHER), 409, "model_in_use")
    assert OTHER in error["message"]
    assert "POST /v1/models/unload" in error["message"]
    assert ok(server.chat(model=OTHER))
    ok(server.unload(OTHER))
    ok(delete(server, OTHER))
    assert ids(server) == set()


def test_a_model_that_loads_stays(serve: Serve) -> None:
    server = serve(OTHER.removeprefix("/models/"))
    job = ok(server.post("/v1/models/load", {"model": OTHER, "wait": False}), 202)
    error_of(delete(server, OTHER), 409, "model_in_use")
    wait_for(lambda: ok(server.get(f"/v1/models/load/{job['load_id']}"))["state"] == "ready", 30)
    assert ok(server.chat(model=OTHER))


def test_a_model_of_a_further_root_stays(serve: Serve, tmp_path: Path) -> None:
    nas = models_dir(tmp_path / "nas", "far.gguf")
    server = serve(model_roots=str(nas))
    error = error_of(delete(server, "/models/nas/far.gguf"), 403, "model_read_only")
    assert "/models/nas/far.gguf" in error["message"]
    assert (nas / "far.gguf").exists()
    assert not (nas / ".trash").exists()


def test_a_split_a_folder_and_a_projector(server: Server) -> None:
    models = server.models
    for no in (1, 2):
        metadata = {"split.count": 2, "split.no": no - 1}
        write_gguf(models / "s" / f"s-0000{no}-of-00002.gguf", metadata=metadata)
    write_folder(models / "folder")
    write_gguf(models / "folder" / "folder-Q4_0.gguf")
    write_gguf(models / "vl" / "a.gguf")
    write_gguf(models / "vl" / "mmproj.gguf", arch="clip")
    split = ok(delete(server, "/models/s/s-00002-of-00002.gguf"))  # any part is the model
    assert split["model"] == "/models/s/s-00001-of-00002.gguf"
    assert len(split["files"]) == 2
    assert len(ok(delete(server, "/models/folder"))["files"]) == 3
    assert ids(server) >= {"/models/folder/folder-Q4_0.gguf"}
    assert ok(delete(server, "/models/vl/a.gguf"))["files"] == [
        "/models/vl/a.gguf",
        "/models/vl/mmproj.gguf",
    ]
    ok(delete(server, "/models/folder/folder-Q4_0.gguf"))
    assert ids(server) == {MODEL, OTHER}
    assert {path.name for path in models.iterdir() if path.name != ".trash"} == {
        MODEL.split("/")[2],
        OTHER.split("/")[2],
    }


def test_a_symlink_goes_and_what_it_leads_to_outside_stays(server: Server, tmp_path: Path) -> None:
    outside = write_gguf(tmp_path / "outside.gguf")
    link = server.models / "link.gguf"
    link.symlink_to(outside)
    assert ok(delete(server, "/models/link.gguf"))["files"] == ["/models/link.gguf"]
    assert not os.path.lexists(link)
    assert outside.exists()


def test_what_lies_behind_such_a_symlink_stays(server: Server, tmp_path: Path) -> None:
    outside = write_gguf(tmp_path / "far" / "outside.gguf")
    link = server.models / "far"
    link.symlink_to(outside.parent)
    try:
        error_of(delete(server, "/models/far/outside.gguf"), 400, "invalid_model_path")
        assert outside.exists()
    finally:
        link.unlink()


def test_a_damaged_model_goes_too(server: Server) -> None:
    (server.models / "bad.gguf").write_bytes(b"x")
    ok(delete(server, "/models/bad.gguf"))
    assert not (server.models / "bad.gguf").exists()


def test_a_trash_that_cannot_be_is_said(serve: Serve) -> None:
    server = serve()
    (server.models / ".trash").touch()
    error = error_of(delete(server, MODEL), 503, "models_dir_unusable")
    assert MODEL in error["message"]
    assert ok(server.chat())


def test_an_upstreams_model_is_not_ours(serve: Serve, tmp_path: Path) -> None:
    far = serve()
    near = Server(models_dir(tmp_path / "none"), tmp_path / "near", upstreams=f"far={far.url}")
    with near:
        name = f"far/{MODEL}"
        wait_for(lambda: name in ids(near), 10)
        error_of(delete(near, name), 400, "invalid_request")
    assert (far.models / STARTER).exists()


def test_a_downloaded_repository_goes_with_all_that_came_with_it(serve: Serve) -> None:
    files = {
        "config.json": json.dumps(CONFIG).encode(),
        "tokenizer.json": b"{}",
        "modules.json": b"[]",
        "1_Pooling/config.json": b"{}",
        "model.safetensors": weights_bytes(),
    }
    with Hub() as hub:
        hub.add_repo("Org/Sentences", files)
        server = serve(hf_endpoint=hub.url)
        job = ask(server, "Org/Sentences", include=["*"])
        done = until(server, job["job_id"], "completed")
    assert done["model"] == "/models/sentences"
    mine = server.models / "sentences" / "mine.txt"
    mine.touch()
    gone = ok(delete(server, "/models/sentences"))
    assert "/models/sentences/1_Pooling/config.json" in gone["files"]
    assert list((server.models / "sentences").iterdir()) == [mine]
    assert in_trash(server) == sorted(f"sentences/{name}" for name in (*files, ".xandrouting.json"))


def test_the_trash_is_emptied_at_the_start(serve: Serve) -> None:
    server = serve("a/a.gguf")
    ok(delete(server, "/models/a/a.gguf"))
    [place] = (server.models / ".trash").iterdir()
    old = place.rename(place.with_name("20200101T000000Z-a"))
    server.stop()
    server.start()
    wait_for(lambda: not old.exists(), 5)
