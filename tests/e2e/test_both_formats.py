"""A folder that is a model and holds a GGUF of it, where one of the two can be served."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.e2e.conftest import Serve
from tests.fakes.safetensors_writer import write_folder
from tests.server import Server, error_of, ok

FOLDER, GGUF = "/models/both", "/models/both/both.gguf"


def without_vllm(serve: Serve, tmp_path: Path) -> Server:
    """Start a server with such a folder; its VLLM_BIN is none."""
    folder = write_folder(tmp_path / "models" / "both")
    server = serve("both/both.gguf", environment={"VLLM_BIN": "/nowhere"})
    assert folder.is_dir()
    return server


def test_every_call_by_the_folder_s_name_means_the_one_that_serves(
    serve: Serve, tmp_path: Path
) -> None:
    server = without_vllm(serve, tmp_path)
    pinned = server.pin(FOLDER)
    assert (pinned["path"], pinned["loaded"]) == (GGUF, False)
    assert ok(server.chat(model=FOLDER, max_tokens=1))["model"] == GGUF
    [item] = server.loaded()
    assert (item["path"], item["pinned"]) == (GGUF, True)

    assert ok(server.get("/props", params={"model": "both"}))["model_path"] == GGUF
    for name in ("both", FOLDER):
        lines = ok(server.get("/v1/logs", params={"model": name}))["lines"]
        assert {line["model"] for line in lines} == {GGUF}
        error = error_of(server.post("/models/load", {"model": name}), 400, "invalid_request")
        assert error["message"] == f"model is already running: {GGUF}"
    assert ok(server.get(f"/v1/models{FOLDER.removeprefix('/models')}"))["id"] == FOLDER
    assert ok(server.post("/models/unload", {"model": "both"}))["success"]
    assert server.loaded() == []


def test_a_folder_that_lost_its_gguf_is_itself_again(serve: Serve, tmp_path: Path) -> None:
    server = without_vllm(serve, tmp_path)
    assert server.pin(FOLDER)["path"] == GGUF
    shutil.move(tmp_path / "models" / "both" / "both.gguf", tmp_path / "both.gguf")
    assert server.pin(FOLDER)["path"] == FOLDER
