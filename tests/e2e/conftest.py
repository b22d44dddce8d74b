"""Servers for tests of the whole: one for each file, and as many as a test asks for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.server import STARTER, Server, models_dir, ok

OTHER = "/models/other/other.gguf"

Serve = Callable[..., Server]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start servers of this test's own: `serve("a/a.gguf", max_loaded=1)`."""
    with ExitStack() as stack:

        def start(*names: str, **settings: object) -> Server:
            models = models_dir(tmp_path / "models", *names or (STARTER,))
            return stack.enter_context(Server(models, tmp_path / "data", **settings))

        yield start


@pytest.fixture(scope="module")
def module_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("e2e")
    models = models_dir(root / "models", STARTER, OTHER.removeprefix("/models/"))
    with Server(models, root / "data") as server:
        yield server


@pytest.fixture
def server(module_server: Server) -> Iterator[Server]:
    """The file's own server, with nothing loaded."""
    ok(module_server.post("/v1/models/unload-all"))
    before = len(module_server.log())
    yield module_server
    print(module_server.log()[before:], file=sys.stderr)
