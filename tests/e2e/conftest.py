"""Servers for tests of the whole: one for each file, and as many as a test asks for."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from tests.fakes.processes import paused
from tests.server import STARTER, Server, link_or_copy, models_dir, ok, starter
from tests.waiting import wait_for

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


@pytest.fixture(scope="session")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sequence[Path]]:
    """Three files with the starter model in each."""
    root = tmp_path_factory.mktemp("copies")
    paths = [root / f"{number}.gguf" for number in range(3)]
    for path in paths:
        shutil.copyfile(starter(), path)
    yield paths
    shutil.rmtree(root)


@pytest.fixture
def serve_own(serve: Serve, tmp_path: Path, copies: Sequence[Path]) -> Iterator[Serve]:
    """Start servers of models with files of their own: `serve_own("a", "b")`, at most three.

    Engines of one file would share its pages, and each would be seen to take less.
    """
    models = tmp_path / "models"

    def start(*stems: str, **settings: object) -> Server:
        names = [f"{stem}/{stem}.gguf" for stem in stems]
        for name, copy in zip(names, copies, strict=False):
            (models / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(copy, models / name)
        return serve(*names, **settings)

    yield start
    shutil.rmtree(models, ignore_errors=True)  # links to the copies would keep their bytes


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


@contextmanager
def paused_spare(server: Server) -> Iterator[psutil.Process]:
    """Stop the process that waits for the next load, so that this does not begin in the block.

    Nothing may be loaded.
    """
    wait_for(lambda: len(server.runners()) == 1)
    [spare] = server.runners()
    with paused(spare):
        yield spare
