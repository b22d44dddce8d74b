"""What cannot be loaded or asked for is told at once, in words that help."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.server import Server, error_of, link_or_copy, ok
from tests.vllm.conftest import GGUF, LOAD_S, SMOL, TWIN, chat, vllm_folder

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(2 * LOAD_S)]

SOON_S = 1.0
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 269060552\n"


# Folders that no engine can load.


def without_config(folder: Path) -> None:
    vllm_folder(folder, "config.json")


def without_tokenizer(folder: Path) -> None:
    vllm_folder(folder, "tokenizer.json")


def with_a_part_missing(folder: Path) -> None:
    first, second = (f"model-0000{no}-of-00002.safetensors" for no in (1, 2))
    vllm_folder(folder, WEIGHTS)
    link_or_copy(vllm_folder(folder / "whole") / WEIGHTS, folder / first)
    shutil.rmtree(folder / "whole")
    index = {"weight_map": {"model.norm.weight": first, "lm_head.weight": second}}
    (folder / INDEX).write_text(json.dumps(index))


def cut_short(folder: Path) -> None:
    source = vllm_folder(folder) / WEIGHTS
    with source.open("rb") as file:
        head = file.read(1 << 20)
    source.unlink()
    source.write_bytes(head)


def lfs_pointer(folder: Path) -> None:
    vllm_folder(folder, WEIGHTS)
    (folder / WEIGHTS).write_bytes(LFS)


def broken_config(folder: Path) -> None:
    vllm_folder(folder, "config.json")
    (folder / "config.json").write_text("{")


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "no-config": (without_config, "config.json is missing"),
    "no-tokenizer": (without_tokenizer, "tokenizer"),
    "part-missing": (with_a_part_missing, "1 of 2 parts missing: 2"),
    "cut-short": (cut_short, "cut short"),
    "lfs": (lfs_pointer, "git-lfs pointer"),
    "broken-config": (broken_config, "config.json"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_folder_is_refused_before_any_start(gateway: Server, kind: str) -> None:
    make, why = BAD[kind]
    folder, model = gateway.models / "bad" / kind, f"/models/bad/{kind}"
    make(folder)
    starts = gateway.starts()
    try:
        for backend in ("auto", "vllm", "transformers"):
            began = time.monotonic()
            answer = chat(gateway, model=model, backend=backend)
            assert time.monotonic() - began < SOON_S
            error = error_of(answer, 400, "invalid_model_file")
            assert model in error["message"]
            assert why in error["message"]
        error_of(gateway.post("/v1/models/load", {"model": model}), 400, "invalid_model_file")
        assert gateway.starts() == starts
        inventory = ok(gateway.get("/v1/models/inventory"))["models"]
        [item] = [item for item in inventory if item["path"] == model]
        assert why in item["problem"]
        assert model not in [one["id"] for one in ok(gateway.get("/v1/models"))["data"]]
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def odd(gateway: Server) -> Iterator[str]:
    """A whole folder of an architecture that vLLM does not know."""
    folder = vllm_folder(gateway.models / "odd", "config.json")
    config = json.loads((gateway.models / "smol" / "config.json").read_text())
    config |= {"architectures": ["NoSuchForCausalLM"], "model_type": "nosuch"}
    (folder / "config.json").write_text(json.dumps(config))
    yield "/models/odd"
    shutil.rmtree(folder)


def test_architecture_that_vllm_does_not_know(gateway: Server, odd: str) -> None:
    error = error_of(chat(gateway, model=odd), 400, "invalid_model_file")
    assert odd in error["message"]
    assert "architecture" in error["message"]
    assert ok(gateway.get(f"/v1/models{odd}"))["status"]["value"] == "failed"
    assert odd not in [item["path"] for item in gateway.loaded()]


# The wrong backend.


def soon(ask: Callable[[], httpx2.Response]) -> httpx2.Response:
    began = time.monotonic()
    answer = ask()
    assert time.monotonic() - began < SOON_S
    return answer


@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_gguf_is_not_for_vllm(gateway: Server, backend: str) -> None:
    answer = soon(lambda: chat(gateway, model=GGUF, backend=backend))
    error = error_of(answer, 400, "backend_unavailable")
    assert GGUF in error["message"]
    assert "llamacpp" in error["message"]


def test_safetensors_are_not_for_llamacpp(gateway: Server) -> None:
    answer = soon(lambda: chat(gateway, model=SMOL, backend="llamacpp"))
    error = error_of(answer, 400, "backend_unavailable")
    assert "vllm" in error["message"]
    assert GGUF in error["message"]  # a model of the same name that it could serve


# Options out of their range.


@pytest.mark.parametrize("share", [0.05, 1.5, 0, -1, "half"])
def test_share_of_the_card_out_of_its_range(gateway: Server, share: object) -> None:
    starts = gateway.starts()
    for ask in (
        lambda: chat(gateway, gpu_memory_utilization=share),
        lambda: gateway.post("/v1/models/load", {"model": SMOL, "gpu_memory_utilization": share}),
    ):
        error = error_of(soon(ask), 400, "invalid_request")
        assert error["param"] == "gpu_memory_utilization"
    assert gateway.starts() == starts


@pytest.mark.parametrize("length", [0, -1, 1.5, "long"])
def test_length_out_of_its_range(gateway: Server, length: object) -> None:
    error = error_of(soon(lambda: chat(gateway, max_model_len=length)), 400, "invalid_request")
    assert error["param"] == "max_model_len"


def test_length_beyond_the_models_own_costs_no_engine(gateway: Server) -> None:
    loaded = {item["path"] for item in gateway.loaded()}
    asked: dict[str, Any] = {"model": TWIN, "max_model_len": 16_384, "n_parallel": 1}
    error = error_of(soon(lambda: chat(gateway, **asked)), 400, "invalid_request")
    assert error["param"] == "max_model_len"
    assert "16384" in error["message"]
    assert "8192" in error["message"]
    assert {item["path"] for item in gateway.loaded()} == loaded
