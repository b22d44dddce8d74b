"""The fake engine as a launch plan, and process trees as a test sees them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from xandrouting.core.model import Backend, EngineId, LaunchPlan, ModelKey

FAKE_ENGINE = str(Path(__file__).with_name("fake_engine.py"))
READY_LINE = "fake engine ready"
ENGINE = EngineId(ModelKey("/models/fake", Backend.LLAMACPP, "cpu"), 1)


def fake_argv(*options: str, port: str = "{port}") -> tuple[str, ...]:
    return (sys.executable, FAKE_ENGINE, "--port", port, *options)


def fake_plan(*options: str, stop_grace_s: float = 1.0) -> LaunchPlan:
    """Plan a fake engine with these of its options."""
    argv = fake_argv(*options)
    return LaunchPlan(argv=argv, ready_line=READY_LINE, stop_grace_s=stop_grace_s)


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
