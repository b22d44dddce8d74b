"""Where vLLM is not installed: its models are listed, and who asks for one is told what to do."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server import Server, error_of, models_dir, ok

FOLDER = "/models/smol"
GGUF = "/models/gguf/smol.Q4_1.gguf"
BOTH = "/models/both"
BOTH_GGUF = "/models/both/both.Q4_1.gguf"
COMMAND = "xandrouting engines install vllm"


def small_folder(folder: Path) -> None:
    """Write a folder of safetensors that is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    tensor = {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}
    header = json.dumps({"model.norm.weight": tensor}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (folder / "tokenizer.json").write_text("{}")


@pytest.fixture(scope="module", params=["variable", "nowhere"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server whose VLLM_BIN is wrong, or that finds no vLLM anywhere."""
    root = tmp_path_factory.mktemp(request.param)
    ggufs = [name.removeprefix("/models/") for name in (GGUF, BOTH_GGUF)]
    models = models_dir(root / "models", *ggufs)
    small_folder(models / "smol")
    small_folder(models / "both")
    there = {"VLLM_BIN": "", "PATH": path_without("vllm")}
    if request.param == "variable":
        there["VLLM_BIN"] = str(root / "nosuch" / "vllm")
    with Server(models, root / "data", environment=there) as server:
        yield server


def path_without(program: str) -> str:
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join(f for f in folders if not shutil.which(program, path=f))


@pytest.mark.parametrize("backend", ["vllm", "transformers", "auto"])
def test_engine_that_is_not_installed(server: Server, backend: str) -> None:
    for ask in (
        lambda: server.chat(model=FOLDER, backend=backend),
        lambda: server.post("/v1/models/load", {"model": FOLDER, "backend": backend}),
    ):
        answer = ask()
        error = error_of(answer, 503, "engine_not_installed")
        assert FOLDER in error["message"]
        assert COMMAND in error["message"]
        assert GGUF in error["message"]  # what could be asked for instead
        assert "retry-after" not in answer.headers  # waiting does not help
    with server.stream(model=FOLDER, backend=backend) as stream:
        assert stream.response.status_code == 503
    assert server.starts() == 0


def test_name_that_fits_both_formats_is_the_gguf(server: Server) -> None:
    answer = server.chat(model="both", backend="auto", max_tokens=1)
    assert ok(answer)["model"] == BOTH_GGUF
    assert answer.headers["x-xandrouting-engine"] == "llamacpp/cpu#1;auto=gguf"


def test_it_is_listed_and_its_backend_said_to_be_missing(server: Server) -> None:
    listed = {model["id"]: model["backend"] for model in ok(server.get("/v1/models"))["data"]}
    assert listed == {
        FOLDER: "vllm",
        BOTH: "vllm",
        GGUF: "llamacpp",
        BOTH_GGUF: "llamacpp",
    }
    on_disk = ok(server.get("/v1/models/inventory"))["models"]
    assert {model["path"]: model["fits"] for model in on_disk} == {
        FOLDER: False,
        BOTH: True,  # as the GGUF in it
        GGUF: True,
        BOTH_GGUF: True,
    }
    vllm = ok(server.get("/health"))["engines"]["vllm"]
    assert (vllm["available"], vllm["status"]) == (False, "unavailable")
    assert COMMAND in vllm["command"]
    assert vllm["reason"]
