"""How vLLM ends: by signals, by kill -9, for other options. Nothing of it is left behind."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fakes.processes import all_gone, is_gone
from tests.server import Server, check_error, ok, story, together
from tests.vllm.conftest import LOAD_S, SMOL, chat, vllm_server
from tests.waiting import wait_for

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(3 * LOAD_S)]

SMALL: dict[str, Any] = {"max_model_len": 1024, "n_parallel": 4}
GRACE_S = 6.0  # of a stream when its engine or the gateway ends
NOTICED_S = 2.0


@pytest.fixture(scope="module")
def module_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("vllm-life")
    with vllm_server(root, default_ttl=0, shutdown_grace_s=GRACE_S) as server:
        yield server


@pytest.fixture
def server(module_server: Server) -> Iterator[Server]:
    """A server with an engine that is ready, with whatever options."""
    before = len(module_server.log())
    module_server.load(SMOL, **SMALL)
    yield module_server
    print(module_server.log()[before:], file=sys.stderr)


def incarnation(server: Server) -> int:
    [item] = server.loaded()
    return int(item["engine"].rpartition("#")[2])


def tree_of(server: Server) -> Sequence[psutil.Process]:
    """Return the engine's processes: its API server, engine core, worker."""
    [api] = server.engines(SMOL)
    tree = [api, *api.children(recursive=True)]
    titles = " ".join(process.name() for process in tree)
    assert "EngineCor" in titles
    assert "Worker" in titles
    return tree


def segments(tree: Sequence[psutil.Process]) -> set[Path]:
    """Return the shared memory that these processes map and that has a name."""
    maps = "".join(Path(f"/proc/{process.pid}/maps").read_text() for process in tree)
    paths = {Path(line.split(None, 5)[5]) for line in maps.splitlines() if "/dev/shm/" in line}
    return {path for path in paths if path.exists()}


def loads_anew(server: Server, before: int) -> None:
    answer = chat(server, max_tokens=2, **SMALL)
    assert ok(answer)
    assert answer.headers["x-xandrouting-engine"] == f"vllm/cpu#{before + 1}"
    assert answer.headers["x-xandrouting-load"].startswith("cold")


# Options.


def length(server: Server) -> int:
    """Return the context that vLLM itself says it has."""
    told: int = ok(server.get("/upstream/smol/v1/models"))["data"][0]["max_model_len"]
    return told


def test_length_reaches_the_engine_and_a_larger_one_reloads_it(server: Server) -> None:
    before = incarnation(server)
    assert "--max-model-len=1024" in server.engines(SMOL)[0].cmdline()
    assert length(server) == 1024
    for asked in ({"max_model_len": 512}, {"max_model_len": 1024}, {}):
        answer = chat(server, max_tokens=1, **asked)
        assert ok(answer)
        assert answer.headers["x-xandrouting-load"] == "hit"
    assert chat(server, "word " * 1200).status_code == 400

    with story(server, SMOL, max_tokens=20) as stream, together(1) as pool:
        larger = pool.submit(server.load, SMOL, max_model_len=2048)
        assert stream.rest()[-1] == "[DONE]"
        assert larger.result(LOAD_S)["max_model_len"] == 2048
    assert (incarnation(server), length(server)) == (before + 1, 2048)
    assert ok(chat(server, "word " * 1200, max_tokens=1))


# Signals.


def test_sigterm_lets_a_stream_end_and_cuts_the_one_that_lasts(server: Server) -> None:
    """vLLM itself ends a stream it cuts with an error and then [DONE], under status 200."""
    before, tree = incarnation(server), tree_of(server)
    with (
        story(server, SMOL, max_tokens=1000) as long,
        story(server, SMOL, max_tokens=8) as short,
    ):
        tree[0].send_signal(signal.SIGTERM)
        assert short.rest()[-1] == "[DONE]"
        *chunks, last = long.rest()
    assert not any("error" in json.loads(chunk) for chunk in chunks)
    check_error(json.loads(last), "engine_error")
    wait_for(all_gone(tree), 20)
    loads_anew(server, before)


# Kills.


def test_killed_api_server_leaves_nothing(server: Server) -> None:
    before, tree = incarnation(server), tree_of(server)
    left = segments(tree)
    assert left
    with story(server, SMOL, max_tokens=500) as stream:
        tree[0].kill()
        *chunks, last = stream.rest()
    assert "[DONE]" not in chunks
    assert not any("error" in json.loads(chunk) for chunk in chunks)
    check_error(json.loads(last), "engine_error")
    wait_for(all_gone(tree), 5)
    wait_for(lambda: not any(path.exists() for path in left), 5)
    loads_anew(server, before)


def test_killed_worker_is_noticed(server: Server) -> None:
    before, tree = incarnation(server), tree_of(server)
    left = segments(tree)
    [worker] = [process for process in tree if "Worker" in process.name()]
    worker.kill()
    wait_for(lambda: [item["state"] for item in server.loaded()] != ["ready"], NOTICED_S)
    loads_anew(server, before)
    assert all(is_gone(process) for process in tree)
    assert not any(path.exists() for path in left)


# The gateway's own end.


def test_sigterm_to_the_gateway_lets_a_stream_end(server: Server) -> None:
    tree = server.everything()
    left = segments(tree_of(server))
    with story(server, SMOL, max_tokens=20) as stream:
        server.signal()
        wait_for(lambda: "server stopping" in server.log())
        *chunks, done = stream.rest()
    assert done == "[DONE]"
    assert not any("error" in json.loads(chunk) for chunk in chunks)
    assert server.wait() == 0
    assert all_gone(tree)()
    assert not [path for path in left if path.exists()]
    assert "Traceback" not in server.log()
    server.close()
    server.start()


def test_killed_gateway_leaves_nothing(server: Server) -> None:
    tree = [*server.everything(), *tree_of(server)]
    left = segments(tree_of(server))
    server.kill9()
    wait_for(all_gone(tree), 5)
    wait_for(lambda: not any(path.exists() for path in left), 5)
    server.close()
    server.start()
