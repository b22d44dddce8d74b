"""One server for all tests of this folder; they leave it able to serve the next."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.server import STARTER, Server, models_dir

SPARE = "/models/spare/spare.gguf"
VECTORS = "/models/vectors/vectors.gguf"


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("engine")
    models = models_dir(root / "models", STARTER, "spare/spare.gguf", "vectors/vectors.gguf")
    with Server(models, root / "data", default_ttl=0) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    before = len(shared_server.log())
    yield shared_server
    print(shared_server.log()[before:], file=sys.stderr)


@pytest.fixture
def spare(server: Server) -> Iterator[str]:
    """A model that is not loaded, for tests that choose how it is."""
    yield SPARE
    server.unload(SPARE)
