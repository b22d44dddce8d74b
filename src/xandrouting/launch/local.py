"""Engines as processes of this machine, each under a guard (see `guard.py`)."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

import psutil

from xandrouting.core.errors import EngineStartFailed
from xandrouting.core.model import EngineId, LaunchPlan, MemoryUse
from xandrouting.launch import guard, host_memory, sweep
from xandrouting.launch.base import Survey
from xandrouting.launch.cores import as_list, cores_for, usable_cores
from xandrouting.launch.engine_log import EngineLog, Hear
from xandrouting.launch.nvml import GpuReading, Gpus, NoGpus
from xandrouting.launch.pipe import Pipe
from xandrouting.launch.ports import HOST, reserve_port
from xandrouting.launch.read_ahead import read_ahead

_PRIVATE: Final = ("XANDROUTING_", "HF_TOKEN")
_SAME_CARDS: Final = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # `cuda:N` is what NVML calls so
_NO_GPUS: Final = NoGpus()

log = logging.getLogger(__name__)

_LAST_WORDS_S: Final = 1.0  # for the log to end once the tree is gone
_NEVER_RAN: Final = 127


class Gauge:
    """Measures this machine and the engines on it. Blocks: it belongs in a thread."""

    def __init__(self, gpus: Gpus) -> None:
        self._gpus = gpus
        self._meter = host_memory.Meter()

    def survey(self, guards: Mapping[EngineId, int], spares: Iterable[int] = ()) -> Survey:
        """Read all memory, and what each tree takes of it, given its guard's pid.

        Raises:
            OSError: `/proc` cannot be read just now, as when no file can be opened.
        """
        table = guard.processes()
        trees = {engine: _tree(table, guard_pid) for engine, guard_pid in guards.items()}
        uses = {engine: self._meter.measure(tree) for engine, tree in trees.items()}
        host = host_memory.read()
        gpus = self._gpus.read()
        return Survey(
            devices=(host, *gpus.devices),
            engines={
                engine: replace(use, devices=_on_devices(engine, trees[engine], gpus))
                for engine, use in uses.items()
            },
            spares=tuple(self._meter.measure(_tree(table, guard_pid)) for guard_pid in spares),
        )


class LocalHandle:
    """One engine and its guard; a spare, for as long as it has no engine's name."""

    def __init__(
        self,
        plan: LaunchPlan,
        process: subprocess.Popen[bytes],
        *,
        cores: tuple[int, ...],
        api_key: str,
        mark: str,
        run_dir: Path | None,
        gauge: Gauge,
        hear: Hear,
    ) -> None:
        """Watch over a guard just started. Needs a running loop."""
        self.base_url = ""
        self.api_key = api_key
        self.cores = cores  # it is bound to; empty: to none
        self.pid: int | None = None
        self.exit_status: int | None = None
        self.killed_for_memory = False
        self.stop_grace_s = plan.stop_grace_s
        self.engine: EngineId | None = None
        self._plan = plan
        assert process.stdin is not None
        self._stdin = process.stdin
        self._process = process
        self._mark = mark
        self._run_dir = run_dir
        self._gauge = gauge
        self._told_to_stop = False
        self._ordered_at: int | None = None  # bytes printed when one that waited got its order
        self._oom_kills: int | None = None  # of this machine, when it was given its order
        self._log = EngineLog(hear)
        self._control = b""
        self._told_status: int | None = None  # as the guard told it; None: it did not live to
        self._life: sweep.Life | None = None
        self._record: Path | None = None
        loop = asyncio.get_running_loop()
        self._begun: asyncio.Future[str | None] = loop.create_future()  # why it failed, or None
        self.watch: Final = loop.create_task(self._watch(), name=f"watch {mark}")

    def become(self, engine: EngineId, plan: LaunchPlan, port: int) -> None:
        """Be this engine from now on, and listen at this port once the order was followed."""
        self.engine = self._log.engine = engine
        self.base_url = f"http://{HOST}:{port}"
        self._plan = plan
        self._oom_kills = host_memory.oom_kills()
        self._ordered_at = self._log.printed_bytes if self._begun.done() else None
        self._log.expect(plan.ready_line)
        if plan.order:
            order = plan.order.replace("{port}", str(port)).replace("{cores}", as_list(self.cores))
            self._tell(f"tell {order}\n")

    def wake(self, plan: LaunchPlan) -> None:
        """Give the engine its order, with another port: nobody kept the last one."""
        assert self.engine is not None
        self.become(self.engine, plan, reserve_port())

    async def rest(self) -> None:
        """Have the program start over, which gives all its memory back, and wait for its order."""
        self._log.expect(self._plan.waiting_line)
        self._tell(f"tell {self._plan.rest_order}\n")
        await self._log.said()

    @property
    def lives(self) -> bool:
        """Whether the program still runs, or has yet to; its end may not have been told yet."""
        return self._life is None or self._life.lasts()

    @property
    def never_began(self) -> bool:
        """Whether it waited when it was given its order, and has printed nothing since."""
        return self._log.printed_bytes == self._ordered_at

    async def begun(self) -> str | None:
        """Wait until the engine's program runs; return why it never will, or None."""
        return await asyncio.shield(self._begun)

    async def ready_line(self) -> None:
        """Wait for a whole line that begins as the plan says; stdout and stderr both count."""
        await self._log.said()

    async def exited(self) -> int:
        """Wait until the tree is gone; -9 where the guard was killed and the tree with it."""
        return await asyncio.shield(self.watch)

    async def stop(self, *, grace_s: float) -> None:
        """Tell the guard to end the tree, and wait; of two graces the earlier end counts."""
        self._told_to_stop = True
        self._tell(f"stop {grace_s:f}\n")
        await self.exited()

    @property
    def guard_pid(self) -> int | None:
        """The guard's process; None once it is reaped, as its pid may be another's by now."""
        return self._process.pid if self._process.returncode is None else None

    async def measure(self) -> MemoryUse:
        """Measure the engine and its descendants in a thread, without the guard."""
        if self.guard_pid is None or self.engine is None:
            return MemoryUse()
        try:
            survey = await asyncio.to_thread(self._gauge.survey, {self.engine: self.guard_pid})
        except OSError:
            return MemoryUse()
        return survey.engines[self.engine]

    def tail(self) -> Sequence[str]:
        """Return the last lines; complete once `exited` has returned."""
        return self._log.tail()

    def activity(self) -> int:
        """Return the bytes printed so far."""
        return self._log.printed_bytes

    async def _watch(self) -> int:
        """Listen to the guard until the tree is gone; return the engine's exit status.

        Cancelling (a loop that ends without `aclose`) closes the guard's stdin, and the guard
        ends the tree by itself.
        """
        with ExitStack() as stack:
            stack.callback(self._begin, "its guard ended early")
            stack.callback(self._stdin.close)
            output = Pipe(self._process.stderr, self._log.feed)
            stack.callback(output.close)
            control = Pipe(self._process.stdout, self._hear)
            stack.callback(control.close)
            await control.closed.wait()  # only the guard holds its other end: it is gone
            self.exit_status = await self._settle(output)
        return self.exit_status

    async def _settle(self, output: Pipe) -> int:
        """Reap the guard, end what it could not, take the last words; return the exit status."""
        guard_status = await asyncio.to_thread(self._process.wait)
        if self._told_status is None and guard_status != _NEVER_RAN:
            log.warning("engine guard lost engine=%s status=%d", self.engine, guard_status)
            await asyncio.to_thread(sweep.end_leftovers, self._mark, self._life)
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                await output.closed.wait()
        except TimeoutError:
            pass  # somebody outside the tree was handed the pipe
        self._log.close()
        if self._record is not None:
            self._record.unlink(missing_ok=True)
        status = guard_status if self._told_status is None else self._told_status
        self.killed_for_memory = self._was_killed_for_memory(status)
        return status

    def _was_killed_for_memory(self, status: int) -> bool:
        if status != -signal.SIGKILL or self._told_to_stop:
            return False
        before, now = self._oom_kills, host_memory.oom_kills()
        return before is not None and now is not None and now > before

    def _hear(self, data: bytes) -> None:
        *lines, self._control = (self._control + data).split(b"\n")
        for line in lines:
            word, _, rest = line.decode().partition(" ")
            if word == "pid":
                self.pid = int(rest)
                self._remember(self.pid)
                self._begin(None)
            elif word == "failed":
                self._begin(rest)
            elif word == "exited":
                self._told_status = int(rest)

    def _begin(self, failure: str | None) -> None:
        if not self._begun.done():
            self._begun.set_result(failure)

    def _remember(self, pid: int) -> None:
        self._life = sweep.Life.of(pid)
        if self._run_dir is None:
            return
        try:
            self._record = sweep.remember(
                self._run_dir, self._mark, guard_pid=self._process.pid, engine_pid=pid
            )
        except OSError as error:
            log.warning("engine not remembered engine=%s error=%s", self.engine, error)

    def _tell(self, command: str) -> None:
        if self._stdin.closed:
            return  # it has ended
        try:
            self._stdin.write(command.encode())
        except BrokenPipeError:
            pass  # it is ending


class LocalLauncher:
    """Runs engines on this machine and sees to their end."""

    def __init__(
        self,
        run_dir: Path | None = None,
        gpus: Gpus = _NO_GPUS,
        hear: Hear = lambda _engine, _line: None,
    ) -> None:
        """Remember live engines in `run_dir` for `sweep`; None: do not.

        `hear` is given each line an engine prints, in the loop's thread.
        """
        self._hear = hear
        self._run_dir = run_dir
        self._gauge = Gauge(gpus)
        self._handles: set[LocalHandle] = set()
        self._spares: dict[_Program, LocalHandle] = {}
        self._seen = Survey()

    async def start(self, engine: EngineId, plan: LaunchPlan) -> LocalHandle:
        """Start the engine under a guard and return once its own program runs.

        A spare that waits with the same program is taken first.

        Cancelled a second time while it kills what it started, it leaves the rest to the
        guard, which ends the tree all the same.

        Raises:
            EngineStartFailed: no such program, or no process could be made.
        """
        port = reserve_port()
        handle = self._spares.pop(_program(plan), None) if plan.order else None
        if handle is None or not handle.lives:
            handle = self._launch(plan, port)
        handle.cores = handle.cores or self._cores_for([plan.order])
        handle.become(engine, plan, port)
        await self._until_begun(handle, plan)
        return handle

    async def prepare(self, plan: LaunchPlan) -> None:
        """Start a program under a guard that waits for its order, unless one does."""
        program = _program(plan)
        if program in self._spares:
            return
        spare = self._spares[program] = self._launch(plan, port=0)
        spare.watch.add_done_callback(lambda _: self._forget_spare(program, spare))
        await self._until_begun(spare, plan)

    async def give_up_spares(self) -> None:
        """End every program that waits for its first order."""
        spares = list(self._spares.values())
        self._spares.clear()
        await asyncio.gather(*(spare.stop(grace_s=0.0) for spare in spares))

    async def read_ahead(self, files: Sequence[str], *, limit_bytes: int) -> None:
        """Read in a thread; cancelled, it ends with the piece it is at."""
        ended = threading.Event()
        try:
            began = time.monotonic()
            size = await asyncio.to_thread(read_ahead, files, limit_bytes=limit_bytes, ended=ended)
            log.debug("read ahead bytes=%d took_s=%.3f", size, time.monotonic() - began)
        finally:
            ended.set()

    def _launch(self, plan: LaunchPlan, port: int) -> LocalHandle:
        mark, api_key = secrets.token_hex(16), secrets.token_urlsafe(24)
        cores = self._cores_for(value for _, value in plan.env)
        process = _start_guard(plan, port=port, mark=mark, api_key=api_key, cores=cores)
        handle = LocalHandle(
            plan,
            process,
            cores=cores,
            api_key=api_key,
            mark=mark,
            run_dir=self._run_dir,
            gauge=self._gauge,
            hear=self._hear,
        )
        self._handles.add(handle)
        handle.watch.add_done_callback(lambda _: self._handles.discard(handle))
        return handle

    def _cores_for(self, texts: Iterable[str]) -> tuple[int, ...]:
        """Choose the cores that one of these asks for; none if none does."""
        if not any("{cores}" in text for text in texts):
            return ()
        taken = [handle.cores for handle in self._handles if handle.cores]
        return cores_for(usable_cores(), taken)

    async def _until_begun(self, handle: LocalHandle, plan: LaunchPlan) -> None:
        try:
            failure = await handle.begun()
        except asyncio.CancelledError:
            await handle.stop(grace_s=0.0)
            raise
        if failure is not None:
            await handle.exited()
            raise _start_failed(plan, failure)

    def _forget_spare(self, program: _Program, spare: LocalHandle) -> None:
        if self._spares.get(program) is spare:
            del self._spares[program]

    async def survey(self) -> Survey:
        """Read this machine's memory, and what each living engine takes, in one thread."""
        guards = {
            handle.engine: handle.guard_pid
            for handle in self._handles
            if handle.guard_pid is not None and handle.engine is not None
        }
        spares = [pid for spare in self._spares.values() if (pid := spare.guard_pid) is not None]
        try:
            self._seen = await asyncio.to_thread(self._gauge.survey, guards, spares)
        except OSError as error:
            stale = _last_seen(self._seen, guards)
            if stale.devices != self._seen.devices:
                log.warning("memory cannot be read error=%s", error)
            self._seen = stale
        return self._seen

    async def aclose(self) -> None:
        """End every engine and spare this launcher started and that still runs, all at once."""
        stops = (handle.stop(grace_s=handle.stop_grace_s) for handle in self._handles)
        await asyncio.gather(*stops)


_Program = tuple[tuple[str, ...], tuple[tuple[str, str], ...]]
"""An argv and an environment: engines that share them may take each other's place."""


def _program(plan: LaunchPlan) -> _Program:
    return plan.argv, plan.env


def _start_guard(
    plan: LaunchPlan, *, port: int, mark: str, api_key: str, cores: tuple[int, ...]
) -> subprocess.Popen[bytes]:
    argv = [argument.replace("{port}", str(port)) for argument in plan.argv]
    bound, scratch = as_list(cores), sweep.scratch_of(mark)
    env = {
        name: value.replace("{port}", str(port))
        .replace("{key}", api_key)
        .replace("{cores}", bound)
        .replace("{scratch}", str(scratch))
        for name, value in plan.env
    }
    wants_scratch = any("{scratch}" in value for _, value in plan.env)
    # A program that renames itself with setproctitle would write over the mark.
    marks = {sweep.MARK: mark, "SPT_NOENV": "1"}
    options = ["--grace-s", f"{plan.stop_grace_s:f}", *(["--orders"] if plan.order else [])]
    try:
        if wants_scratch:
            scratch.mkdir(mode=0o700)
            options += ["--scratch", str(scratch)]
        return subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, *options, "--", *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=_inherited() | _SAME_CARDS | env | marks,
            start_new_session=True,
        )
    except OSError as error:
        if "--scratch" in options:
            guard.discard(str(scratch))
        raise _start_failed(plan, error.strerror or "no process could be made") from error


def _inherited() -> dict[str, str]:
    """Return the gateway's environment without what is the gateway's alone: its keys."""
    return {name: v for name, v in os.environ.items() if not name.startswith(_PRIVATE)}


def _start_failed(plan: LaunchPlan, reason: str) -> EngineStartFailed:
    return EngineStartFailed(
        f"The engine could not be started: {reason}. See whether it is installed on this machine.",
        detail=f"program={plan.argv[0]} reason={reason}",
    )


def _tree(table: dict[int, guard.Process], guard_pid: int) -> list[int]:
    """List the engine's living processes: all that came of the guard."""
    if table:
        return [pid for pid in guard.descendants(table, guard_pid) if table[pid].running]
    try:
        return [child.pid for child in psutil.Process(guard_pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _on_devices(
    engine: EngineId, tree: Sequence[int], gpus: GpuReading
) -> tuple[tuple[str, int], ...] | None:
    """Add up what a tree takes of each card; None for an engine on a card, if it is not told."""
    taken: Counter[str] = Counter()
    for pid in tree:
        taken.update(dict(gpus.processes.get(pid, ())))
    if taken or engine.key.device == "cpu":
        return tuple(sorted(taken.items()))
    return None


def _last_seen(survey: Survey, living: Iterable[EngineId]) -> Survey:
    """Mark a survey's figures as old ones; of the engines only the living are left."""
    return Survey(
        devices=tuple(replace(device, stale=True) for device in survey.devices),
        engines={engine: survey.engines.get(engine, MemoryUse()) for engine in living},
    )
