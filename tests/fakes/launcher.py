"""Engines that are only a journal and a few timers: the pool's world, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from xandrouting.core.errors import GatewayError
from xandrouting.core.figures import Figures
from xandrouting.core.ledger import Ledger
from xandrouting.core.model import (
    HOST,
    Backend,
    Cost,
    DeviceReading,
    EngineId,
    EngineSpec,
    FixedCost,
    LaunchPlan,
    LoadOptions,
    MemoryUse,
    Placement,
    StartFailure,
)
from xandrouting.core.scheduler import Scheduler
from xandrouting.engines.base import ModelFacts, Phase, SleepCalls, Slots
from xandrouting.launch.base import Survey
from xandrouting.net.client import Client
from xandrouting.pool.engine import EngineNews
from xandrouting.pool.learning import Learning
from xandrouting.pool.parking import Parking
from xandrouting.pool.pool import EnginePool, Kind
from xandrouting.pool.probe import Health
from xandrouting.pool.sleeping import Post, http_post

READY_LINE: Final = "ready"
STOP_GRACE_S: Final = 10.0
FOREVER_S: Final = 20_000.0  # no test waits as long: it hangs

Memory = Callable[[float], int | None]
"""How many bytes an engine takes at an age in seconds."""


def name_of(engine: EngineId) -> str:
    """`qwen#1`: the model's short name and the incarnation."""
    model = engine.key.model.rpartition("/")[2].removesuffix(".gguf")
    return f"{model}#{engine.incarnation}"


class FakeHandle:
    """An engine that says it is ready `load_s` after its start, and is gone `stop_s` after SIGTERM.

    With an `exit_status` it ends instead of becoming ready.
    """

    base_url = "http://127.0.0.1:9"
    devices: tuple[tuple[str, int], ...] | None = ()  # what it takes of cards; None: nobody tells
    api_key = "k3y"
    pid = 4242
    killed_for_memory = False

    def __init__(
        self,
        name: str,
        plan: LaunchPlan,
        journal: list[str],
        *,
        load_s: float = 0.0,
        stop_s: float = 0.0,
        exit_status: int | None = None,
        memory: Memory = lambda age_s: None,
    ) -> None:
        self.name = name
        self.plan = plan
        self.exit_status: int | None = None
        self.measured = 0  # how often its memory was looked at
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._journal = journal
        self._stop_s = stop_s
        self._memory = memory
        self._lines: list[str] = []
        self.was_spare = False
        self._said_ready = asyncio.Event()
        self._gone = asyncio.Event()
        self._loading: asyncio.TimerHandle | None = None
        self._ending: asyncio.TimerHandle | None = None
        self._load_s = load_s
        self.rest_s = 0.0  # from the order to rest until it does
        if plan.ready_line is None:
            self._said_ready.set()
        if exit_status is not None:
            self._loading = self._loop.call_later(load_s, self.die, exit_status)
        elif plan.ready_line is not None and load_s < FOREVER_S:
            self._loading = self._loop.call_later(load_s, self.say, plan.ready_line)
        journal.append(f"started {name}")

    def say(self, line: str) -> None:
        """Print a line."""
        if self.exit_status is None:
            self._lines.append(line)
            if line == self.plan.ready_line:
                self._said_ready.set()

    def die(self, status: int) -> None:
        """End by itself, or by somebody else's hand."""
        if self.exit_status is None:
            self.exit_status = status
            for timer in (self._loading, self._ending):
                if timer is not None:
                    timer.cancel()
            self._journal.append(f"exited {self.name}")
            self._gone.set()

    def tail(self) -> Sequence[str]:
        return self._lines[-200:]

    def activity(self) -> int:
        return len(self._lines)

    @property
    def never_began(self) -> bool:
        return self.was_spare and not self._lines

    async def ready_line(self) -> None:
        await self._said_ready.wait()

    async def rest(self) -> None:
        await asyncio.sleep(self.rest_s)
        self._journal.append(f"slept {self.name}")

    def wake(self, plan: LaunchPlan) -> None:
        self.plan = plan
        self._journal.append(f"woken {self.name}")
        self._said_ready.clear()
        self._loading = self._loop.call_later(self._load_s, self.say, plan.ready_line or "")

    async def exited(self) -> int:
        await self._gone.wait()
        assert self.exit_status is not None
        return self.exit_status

    async def measure(self) -> MemoryUse:
        self.measured += 1
        await asyncio.sleep(0)  # as the real one, it lets others run
        return self.use()

    def take(self, memory: Memory) -> None:
        """Let its memory be this from now on."""
        self._memory = memory

    def use(self) -> MemoryUse:
        taken = self._memory(self._loop.time() - self._began)
        return MemoryUse(host_bytes=taken, private_bytes=taken, devices=self.devices)

    async def stop(self, *, grace_s: float) -> None:
        if self.exit_status is not None:
            return
        ends_at = self._loop.time() + min(self._stop_s, grace_s)
        if self._ending is None or ends_at < self._ending.when():
            if self._ending is not None:
                self._ending.cancel()
            self._ending = self._loop.call_at(ends_at, self.die, 0)
        await self._gone.wait()


class FakeLauncher:
    """Starts FakeHandles, and writes down what starts and ends.

    `start_s` passes before there is a process at all. `fail` is what goes wrong with a start:
    an exception is raised by it, a number is the status the process ends with when it should
    be ready, after it said `says`. All may be changed between two starts. The machine has
    `capacity_bytes`, of which others take `others_bytes`.
    """

    def __init__(
        self,
        load_s: float = 0.0,
        stop_s: float = 0.0,
        *,
        start_s: float = 0.0,
        fail: Exception | int | None = None,
        says: Iterable[str] = (),
        memory: Memory = lambda age_s: None,
        capacity_bytes: int | None = None,
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.cards: Callable[[], tuple[DeviceReading, ...]] = tuple  # what the machine has of them
        self.on_start: Callable[[FakeHandle], None] = lambda _: None
        self.others_bytes = 0
        self.surveys = 0
        self.load_s = load_s
        self.stop_s = stop_s
        self.start_s = start_s
        self.fail = fail
        self.says = says
        self.memory = memory
        self.journal: list[str] = []
        self.prepared: list[LaunchPlan] = []  # spares that wait
        self.spare_bytes = 0  # of each
        self.read: list[tuple[tuple[str, ...], int]] = []  # files read ahead, and the limit
        self.handles: list[FakeHandle] = []
        self.living: dict[EngineId, FakeHandle] = {}

    async def survey(self) -> Survey:
        self.surveys += 1
        await asyncio.sleep(0)
        uses = {e: h.use() for e, h in self.living.items() if h.exit_status is None}
        spare = MemoryUse(host_bytes=self.spare_bytes, private_bytes=self.spare_bytes)
        spares = (spare,) * len(self.prepared)
        if self.capacity_bytes is None:
            return Survey(self.cards(), uses, spares)
        ours = (*uses.values(), *spares)
        taken = self.others_bytes + sum(use.private_bytes or 0 for use in ours)
        host = DeviceReading(HOST, HOST, self.capacity_bytes, self.capacity_bytes - taken)
        return Survey((host, *self.cards()), uses, spares)

    async def prepare(self, plan: LaunchPlan) -> None:
        if not self.prepared:
            self.prepared.append(plan)

    async def give_up_spares(self) -> None:
        self.prepared.clear()

    async def read_ahead(self, files: Sequence[str], *, limit_bytes: int) -> None:
        self.read.append((tuple(files), limit_bytes))

    async def start(self, engine: EngineId, plan: LaunchPlan) -> FakeHandle:
        try:
            await asyncio.sleep(self.start_s)
        except asyncio.CancelledError:
            self.journal.append(f"cancelled {name_of(engine)}")
            raise
        if isinstance(self.fail, Exception):
            raise self.fail
        was_spare = bool(plan.order and self.prepared)
        if plan.order:
            self.prepared.clear()
        handle = FakeHandle(
            name_of(engine),
            plan,
            self.journal,
            load_s=self.load_s,
            stop_s=self.stop_s,
            exit_status=self.fail,
            memory=self.memory,
        )
        handle.was_spare = was_spare
        for line in self.says:
            handle.say(line)
        self.on_start(handle)
        self.handles.append(handle)
        self.living[engine] = handle
        return handle

    async def aclose(self) -> None:
        for handle in self.handles:
            await handle.stop(grace_s=0.0)


class FakeAdapter:
    """Plans nothing much: the fake launcher obeys no argv."""

    backend = Backend.LLAMACPP

    def __init__(
        self,
        *,
        ready_line: str | None = READY_LINE,
        failure: StartFailure = StartFailure.EXITED,
        slots: Slots | None = None,
        sleeper_bytes: int | None = None,
        sleep: SleepCalls | None = None,
        order: str = "",
    ) -> None:
        self.slots = slots
        self.sleeper_bytes = sleeper_bytes
        self.spare_bytes = sleeper_bytes or 0
        self.sleep = sleep
        self.order = order
        self.ready_line = ready_line
        self.failure = failure
        self.planned: list[tuple[EngineSpec, LoadOptions, str]] = []  # and the slot folder
        self.classified: list[tuple[list[str], int | None]] = []

    def settle(self, wants: LoadOptions, facts: ModelFacts, device: str) -> LoadOptions:
        return wants

    def defaults(self, facts: ModelFacts, device: str) -> LoadOptions:
        return LoadOptions()

    def cost(self, facts: ModelFacts, device: str) -> Cost:
        return FixedCost()

    def phase(self, tail: Sequence[str]) -> Phase:
        return Phase.READING

    def flags(self, facts: ModelFacts) -> tuple[str, ...]:
        return ()

    def progress(self, tail: Sequence[str]) -> float | None:
        return None

    def reason(self, tail: Sequence[str]) -> str:
        return ""

    def shares(self, facts: ModelFacts, cards: int) -> Sequence[int]:
        return range(1, cards + 1)

    def spare(self) -> LaunchPlan | None:
        return LaunchPlan(argv=("fake",), order=self.order) if self.order else None

    def plan(
        self,
        spec: EngineSpec,
        options: LoadOptions,
        *,
        placement: Placement,
        slot_folder: str = "",
    ) -> LaunchPlan:
        self.planned.append((spec, options, slot_folder))
        return LaunchPlan(
            argv=("fake",),
            ready_line=self.ready_line,
            order=self.order,
            stop_grace_s=STOP_GRACE_S,
        )

    def classify(self, tail: Sequence[str], status: int | None) -> StartFailure:
        self.classified.append((list(tail), status))
        return self.failure

    def explain(self, status: int, error: Mapping[str, Any], path: str) -> GatewayError | None:
        return None


class FakeHealth:
    """Says yes from a time on, by the loop's clock."""

    def __init__(self, from_s: float = 0.0) -> None:
        self.from_s = from_s
        self.asked_at: list[float] = []

    async def __call__(self, client: Client, plan: LaunchPlan) -> bool:
        now = asyncio.get_running_loop().time()
        self.asked_at.append(now)
        return now >= self.from_s


def make_scheduler(
    *,
    max_loaded: int | None = None,
    budgets: Mapping[str, int] | None = None,
    ttl_s: float = 60.0,
    **options: Any,
) -> Scheduler:
    ledger = Ledger(max_engines=max_loaded, budgets=budgets)
    return Scheduler(ledger, default_ttl_s=ttl_s, **options)


def make_pool(
    launcher: FakeLauncher,
    scheduler: Scheduler | None = None,
    *,
    adapter: FakeAdapter | None = None,
    health: Health | None = None,
    post: Post = http_post,
    load_stall_s: float = 30.0,
    learning: Learning | None = None,
    parking: Parking | None = None,
    on_news: Callable[[EngineNews], None] = lambda _: None,
) -> EnginePool:
    """A pool that has not begun; see `running` for one that has."""
    return EnginePool(
        scheduler or make_scheduler(),
        {Backend.LLAMACPP: Kind(adapter or FakeAdapter(), launcher)},
        node=launcher,
        learning=learning or Learning(Figures()),
        parking=parking,
        spares=(Backend.LLAMACPP,),
        on_news=on_news,
        load_stall_s=load_stall_s,
        health=health or FakeHealth(),
        post=post,
    )


@asynccontextmanager
async def running(
    launcher: FakeLauncher,
    *,
    adapter: FakeAdapter | None = None,
    health: Health | None = None,
    post: Post = http_post,
    load_stall_s: float = 30.0,
    learning: Learning | None = None,
    parking: Parking | None = None,
    on_news: Callable[[EngineNews], None] = lambda _: None,
    **scheduling: Any,
) -> AsyncIterator[EnginePool]:
    """A pool at work. At its end nothing may be left: no ticket, no process, no task, no timer."""
    scheduler = make_scheduler(**scheduling)
    pool = make_pool(
        launcher,
        scheduler,
        adapter=adapter,
        health=health,
        post=post,
        load_stall_s=load_stall_s,
        learning=learning,
        parking=parking,
        on_news=on_news,
    )
    # A ready engine is measured again and again, so the clock never stops for a deadlock.
    async with asyncio.timeout(FOREVER_S), pool:
        yield pool
    assert scheduler.tickets == scheduler.queued == 0
    assert pool.views() == []
    assert [handle.name for handle in launcher.handles if handle.exit_status is None] == []
    me = asyncio.current_task()
    assert [task for task in asyncio.all_tasks() if task is not me] == []
    loop: Any = asyncio.get_running_loop()
    assert [timer for timer in loop._scheduled if not timer.cancelled()] == []
