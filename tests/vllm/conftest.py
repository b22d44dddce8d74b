"""One gateway with one vLLM engine for all tests that leave it able to serve the next."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from tests.fakes.processes import freeze
from tests.server import Server, link_or_copy, models_dir, ok
from tests.vllm.installed import vllm, vllm_model

SMOL = "/models/smol"
TWIN = "/models/twin"
GGUF_NAME = "gguf/smol.Q4_1.gguf"
GGUF = f"/models/{GGUF_NAME}"
LOAD_S = 150.0  # a load takes 15 s with the machine to itself
READS = re.compile(r"\(Worker pid=(\d+)\).* Starting to load model")


def vllm_folder(folder: Path, *without: str) -> Path:
    """Make `folder` the starter model as safetensors, but for the files `without`.

    They are hard links where that is possible: remove a file before you write it.
    """
    folder.mkdir(parents=True)
    for source in vllm_model().iterdir():
        if source.name not in without:
            link_or_copy(source, folder / source.name)
    return folder


def vllm_server(root: Path, **settings: object) -> Server:
    """Return a server of the starter model in both formats."""
    models = models_dir(root / "models", GGUF_NAME)
    vllm_folder(models / "smol")
    vllm_folder(models / "twin")
    there = {"VLLM_BIN": str(vllm().executable)}
    return Server(models, root / "data", environment=there, answer_s=LOAD_S, **settings)


def chat(server: Server, text: str = "Hi", **fields: Any) -> httpx2.Response:
    """Ask vLLM; without `model` the one that is loaded."""
    return server.chat(text, **{"model": SMOL, **fields})


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with vllm_server(tmp_path_factory.mktemp("vllm"), default_ttl=0) as server:
        yield server


@dataclass
class Load:
    """How a load went, as its client sees it. `began` is the answer to the one who asked."""

    began: dict[str, Any]
    news: list[dict[str, Any]] = field(default_factory=list)
    statuses: list[dict[str, Any]] = field(default_factory=list)
    items: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture(scope="session")
def first_load(gateway: Server) -> Load:
    """The load of the engine that all share, watched from its start to its end.

    This model is read in less time than there is between two looks at a load: its worker is
    stopped when it begins to read, until that was seen.
    """
    reader: psutil.Process | None = None
    with gateway.events(topics="model,log") as events:
        asked = {"model": SMOL, "wait": False}
        load = Load(ok(gateway.post("/v1/models/load", asked), 202))
        for kind, data in events:
            if kind == "log" and (reads := READS.search(data["text"])):
                reader = psutil.Process(int(reads[1]))
                freeze(reader)
            if kind == "model":
                load.news.append(data)
                load.statuses.append(ok(gateway.get(f"/v1/models{SMOL}"))["status"])
                load.items += gateway.loaded()
                if reader and data.get("progress", {}).get("phase") == "loading_weights":
                    reader.resume()
                if data["event"] in ("ready", "failed", "gone"):
                    break
    assert load.news[-1]["event"] == "ready", load.news[-1]
    return load


@pytest.fixture
def server(gateway: Server, first_load: Load) -> Iterator[Server]:
    """The gateway with its engine."""
    before = len(gateway.log())
    yield gateway
    print(gateway.log()[before:], file=sys.stderr)
