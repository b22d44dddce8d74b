"""The real runner alone: what it is told on stdin, and what it gives back when it rests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import psutil
import pytest

from tests.fakes.processes import is_gone
from tests.server import starter
from tests.waiting import wait_for
from xandrouting.engines.llamacpp import (
    KEY_VARIABLE,
    READY_LINE,
    REST_ORDER,
    RUNNER,
    WAITING_LINE,
    Order,
)
from xandrouting.launch.ports import reserve_port

MIB = 1 << 20
RESTS_BELOW_BYTES = 40 * MIB
CHAT = "/v1/chat/completions"
LONG = "The quick brown fox jumps over the lazy dog. " * 40


class Runner:
    """The runner's process, and its HTTP server while it has one."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            RUNNER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {KEY_VARIABLE: "k3y", "OMP_WAIT_POLICY": "passive"},
        )
        self.seen = psutil.Process(self.process.pid)
        self.said: list[str] = []
        self.port = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            pipe.close()

    def until(self, beginning: str) -> str:
        """Wait for a line that begins so."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.said.append(line.decode().rstrip())
            if self.said[-1].startswith(beginning):
                return self.said[-1]
        raise AssertionError("it ended: " + "\n".join(self.said[-20:]))

    def tell(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def serve(self, order: Order) -> None:
        """Give it an order at a new port, once it waits, and wait until it is followed."""
        self.until(WAITING_LINE)
        self.port = reserve_port()
        self.tell(replace(order, port=str(self.port)).line())
        assert str(self.port) in self.until(READY_LINE)

    def rest(self) -> None:
        self.tell(REST_ORDER)

    def hang_up(self) -> int:
        """Close its stdin; return its exit status."""
        assert self.process.stdin
        self.process.stdin.close()
        return self.process.wait(10)

    def ask(self, path: str, body: object = None, *, key: str = "k3y") -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"authorization": f"Bearer {key}", "content-type": "application/json"},
        )
        with urllib.request.urlopen(request) as response:
            return json.load(response)

    def chat(self, text: str) -> Any:
        asked = {"messages": [{"role": "user", "content": text}], "max_tokens": 4}
        return self.ask(CHAT, asked | {"temperature": 0})

    @property
    def pss_bytes(self) -> int:
        return int(self.seen.memory_full_info().pss)

    @property
    def listens(self) -> bool:
        return any(c.status == psutil.CONN_LISTEN for c in self.seen.net_connections())


@pytest.fixture
def runner() -> Iterator[Runner]:
    with Runner() as runner:
        yield runner


@pytest.fixture
def order(tmp_path: Path) -> Order:
    return Order(
        model=str(starter()),
        alias="starter",
        n_ctx_total=2048,
        n_parallel=2,
        n_gpu_layers=0,
        slot_folder=f"{tmp_path}/",
        env={"CUDA_VISIBLE_DEVICES": ""},
    )


def test_it_waits_with_little_and_serves_as_ordered(runner: Runner, order: Order) -> None:
    runner.until(WAITING_LINE)
    assert runner.pss_bytes < RESTS_BELOW_BYTES
    assert not runner.listens
    runner.port = reserve_port()
    runner.tell(replace(order, port=str(runner.port)).line())
    runner.until(READY_LINE)
    assert runner.ask("/v1/models")["data"][0]["id"] == "starter"
    assert runner.chat("Hello")["usage"]["completion_tokens"] > 0
    with pytest.raises(urllib.error.HTTPError, match="401"):
        runner.ask(CHAT, {}, key="another")


def test_told_to_rest_it_gives_all_back_and_serves_again(runner: Runner, order: Order) -> None:
    runner.serve(order)
    first = runner.chat("Hello")["choices"]
    served_with = runner.pss_bytes
    ports = [runner.port]
    for _ in range(2):
        runner.rest()
        runner.until(WAITING_LINE)
        assert runner.pss_bytes < RESTS_BELOW_BYTES < served_with
        assert not runner.listens
        assert runner.seen.num_threads() == 1
        assert runner.seen.num_fds() == 3  # nothing was kept over the exec
        with pytest.raises(urllib.error.URLError, match="refused"):
            runner.ask("/health")
        runner.port = reserve_port()
        runner.tell(replace(order, port=str(runner.port)).line())
        runner.until(READY_LINE)
        assert runner.chat("Hello")["choices"] == first
        ports.append(runner.port)
    assert len(set(ports)) == 3
    assert runner.seen.is_running()


def test_it_wakes_with_other_options(runner: Runner, order: Order) -> None:
    runner.serve(order)
    assert len(runner.ask("/slots")) == 2
    runner.rest()
    runner.serve(replace(order, n_parallel=1, n_ctx_total=512, alias="other"))
    assert [slot["n_ctx"] for slot in runner.ask("/slots")] == [512]
    assert runner.ask("/v1/models")["data"][0]["id"] == "other"


def test_a_client_s_open_stream_does_not_keep_it_awake(runner: Runner, order: Order) -> None:
    runner.serve(order)
    asked = {"messages": [{"role": "user", "content": "Count."}], "stream": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{runner.port}{CHAT}",
        data=json.dumps(asked | {"max_tokens": 1500, "ignore_eos": True}).encode(),
        headers={"authorization": "Bearer k3y", "content-type": "application/json"},
    )
    with urllib.request.urlopen(request) as stream:
        stream.readline()
        runner.rest()
        runner.until(WAITING_LINE)
    assert not runner.listens


@pytest.mark.parametrize("serving", [False, True])
def test_it_ends_when_nobody_can_tell_it_anything_any_more(
    runner: Runner, order: Order, serving: bool
) -> None:
    if serving:
        runner.serve(order)
    else:
        runner.until(WAITING_LINE)
    assert runner.hang_up() == 0


def test_an_order_that_never_ends_is_none(runner: Runner) -> None:
    runner.until(WAITING_LINE)
    assert runner.process.stdin
    runner.process.stdin.write(b'{"model": "/mo')
    assert runner.hang_up() != 0
    assert not is_gone(psutil.Process())  # and only the runner has ended


@pytest.mark.parametrize("rested", [False, True])
def test_sigterm_ends_it_at_once(runner: Runner, order: Order, rested: bool) -> None:
    runner.serve(order)
    if rested:
        runner.rest()
        runner.until(WAITING_LINE)
    runner.process.terminate()
    assert runner.process.wait(5) == -signal.SIGTERM


@pytest.mark.parametrize("rested", [False, True])
def test_a_load_that_fails_is_its_end(
    runner: Runner, order: Order, tmp_path: Path, rested: bool
) -> None:
    if rested:
        runner.serve(order)
        runner.rest()
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"not a model")
    runner.until(WAITING_LINE)
    runner.tell(replace(order, model=str(bad), port=str(reserve_port())).line())
    assert runner.process.stdout
    rest = runner.process.stdout.read().decode()  # its threads print at once
    assert "load failed" in rest
    assert runner.process.wait(10) == 1


# Conversations.


def test_a_conversation_outlives_the_rest_and_is_nobody_else_s_to_read(
    runner: Runner, order: Order, tmp_path: Path
) -> None:
    runner.serve(order)
    cold = runner.chat(LONG)["usage"]
    assert cold["prompt_tokens_details"]["cached_tokens"] == 0
    [used] = [slot["id"] for slot in runner.ask("/slots") if slot.get("n_prompt_tokens")]
    saved = runner.ask(f"/slots/{used}?action=save", {"filename": "a.slot"})
    file = tmp_path / "a.slot"
    assert file.stat().st_size == saved["n_written"]
    assert file.stat().st_mode & 0o777 == 0o600
    runner.rest()
    runner.serve(order)
    restored = runner.ask("/slots/0?action=restore", {"filename": "a.slot"})
    assert restored["n_restored"] == saved["n_saved"] > 300
    # What is restored and not used is not listed; it can be saved all the same.
    assert not any(slot.get("n_prompt_tokens") for slot in runner.ask("/slots"))
    again = runner.ask("/slots/0?action=save", {"filename": "b.slot"})
    assert again["n_saved"] == saved["n_saved"]
    assert (tmp_path / "b.slot").stat().st_size == file.stat().st_size
    warm = runner.chat(LONG)["usage"]
    assert warm["prompt_tokens"] == cold["prompt_tokens"]
    assert warm["prompt_tokens_details"]["cached_tokens"] >= cold["prompt_tokens"] - 1


def test_a_file_that_was_cut_short_would_end_it(
    runner: Runner, order: Order, tmp_path: Path
) -> None:
    """Which is why every file is checked before an engine sees it."""
    runner.serve(order)
    runner.chat(LONG)
    [used] = [slot["id"] for slot in runner.ask("/slots") if slot.get("n_prompt_tokens")]
    runner.ask(f"/slots/{used}?action=save", {"filename": "a.slot"})
    file = tmp_path / "a.slot"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        runner.ask("/slots/0?action=restore", {"filename": "a.slot"})
    wait_for(lambda: runner.process.poll() is not None)
