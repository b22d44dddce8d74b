"""The fake engine as a launch plan, and process trees as a test sees them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from tests.waiting import wait_for
from xandrouting.core.model import Backend, EngineId, LaunchPlan, ModelKey

FAKE_ENGINE = str(Path(__file__).with_name("fake_engine.py"))
READY_LINE = "fake engine ready"
WAITING_LINE = "fake engine waiting"
ENGINE = EngineId(ModelKey("/models/fake", Backend.LLAMACPP, "cpu"), 1)


def fake_argv(*options: str, port: str = "{port}") -> tuple[str, ...]:
    return (sys.executable, FAKE_ENGINE, "--port", port, *options)


def fake_plan(*options: str, stop_grace_s: float = 1.0) -> LaunchPlan:
    """Plan a fake engine with these of its options."""
    argv = fake_argv(*options)
    return LaunchPlan(argv=argv, ready_line=READY_LINE, stop_grace_s=stop_grace_s)


def ordered_plan(*options: str, **changes: Any) -> LaunchPlan:
    """Plan a fake engine that waits for an order, and is told these options by it."""
    plan = LaunchPlan(
        argv=(sys.executable, FAKE_ENGINE, "--orders"),
        ready_line=READY_LINE,
        order=" ".join(("--port {port}", *map(shlex.quote, options))),
        rest_order="rest",
        waiting_line=WAITING_LINE,
    )
    return replace(plan, **changes)


def tree_below(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def is_gone(process: psutil.Process) -> bool:
    """Whether it has ended; a zombie that only its new parent has yet to reap has."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def all_gone(processes: Iterable[psutil.Process]) -> Callable[[], bool]:
    return lambda: all(is_gone(process) for process in processes)


def freeze(process: psutil.Process) -> None:
    """Stop a process, and return when it has stopped: its threads may go on for a moment."""
    process.suspend()
    wait_for(lambda: process.status() == psutil.STATUS_STOPPED)


@contextmanager
def paused(process: psutil.Process) -> Iterator[psutil.Process]:
    """Stop a process for as long as the block, or until the test lets it go on or ends it."""
    freeze(process)
    try:
        yield process
    finally:
        if not is_gone(process):
            process.resume()
