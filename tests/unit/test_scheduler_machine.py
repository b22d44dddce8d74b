"""The scheduler's promises, under random orders of everything that can happen to it.

The machine below keeps its own picture of the world, drawn from the effects only, and never
asks the scheduler what it meant. `XANDROUTING_MACHINE_EXAMPLES` sets how many worlds it tries.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.unit.scheduling import LLAMA, MISTRAL, QWEN, UPSTREAM, make_scheduler, model
from xandrouting.core.cover import covers
from xandrouting.core.engine import EngineView
from xandrouting.core.engine_state import EngineState
from xandrouting.core.errors import EngineStartFailed, GatewayError, InsufficientMemory
from xandrouting.core.events import (
    Acquire,
    Effect,
    EngineExited,
    EngineLost,
    EngineReady,
    EngineSlept,
    Event,
    Grant,
    Measured,
    Pin,
    Prepare,
    Refuse,
    Release,
    Shutdown,
    Sleep,
    SleepFailed,
    Start,
    Stop,
    Tick,
    Unload,
)
from xandrouting.core.model import (
    ENGINES,
    HOST,
    DeviceReading,
    EngineId,
    EngineSpec,
    FixedCost,
    Footprint,
    Level,
    LoadOptions,
    MemoryUse,
    ModelKey,
    Terms,
    Ticket,
)
from xandrouting.core.planner import Verdict

EXAMPLES = int(os.environ.get("XANDROUTING_MACHINE_EXAMPLES", "30"))
pytestmark = pytest.mark.timeout(60 + EXAMPLES // 10)  # seconds; a world takes about 15 ms

CARD = "cuda:0"
RAN_OUT = "out of memory"
BUDGETS = {HOST: 100, CARD: 100}  # bytes; when memory is short at all
REST = 2  # bytes on the card that a sleeper's process keeps
SMALL = 8  # bytes; no sleeper takes more


def of(
    spec: EngineSpec,
    *,
    engines: int = 1,
    host: int = 0,
    device: int = 0,
    asleep: int | None = None,
    files: tuple[str, ...] = (),
    levels: tuple[Level, ...] = (),
) -> EngineSpec:
    """Return the spec of a model that takes this much, with any options."""
    footprint = Footprint(engines, Terms(weights=host), Terms(weights=device))
    return replace(
        spec,
        cost=FixedCost(footprint),
        placements=((CARD,),) if device else ((),),
        sleeper_bytes=asleep,
        sleep_levels=levels,
        files=files,
    )


@dataclass(frozen=True, slots=True)
class ByLayers:
    """What a model takes that may lie on the card or in main memory, layer by layer."""

    layers: int = 8

    def footprint(self, options: LoadOptions, cards: int = 1) -> Footprint:
        asked = self.layers if options.n_gpu_layers in (None, -1) else options.n_gpu_layers
        there = min(asked, self.layers) * 10
        slots = (options.n_parallel or 1) * 6
        host = Terms(weights=self.layers * 10 - there, overhead=5)
        return Footprint(1, host, Terms(weights=there, kv_cache=slots))


FILES = ("a.gguf", "b.gguf")
GIANT = of(model("giant"), engines=2, host=90)  # takes the room of two, and nearly all memory
ON_CARD = of(model("on-card"), host=10, device=60, asleep=4, files=FILES)
ALSO_ON_CARD = of(model("also-on-card"), host=10, device=50)
ALL_LEVELS = (Level.OFFLOADED, Level.DROPPED)
BY_LEVELS = of(model("by-levels"), host=5, device=40, files=FILES, levels=ALL_LEVELS)
DROPPED_ONLY = of(model("dropped-only"), host=5, device=45, levels=(Level.DROPPED,))
LAYERED = replace(
    model("layered", defaults=LoadOptions(n_ctx=2048, n_gpu_layers=-1, n_parallel=4)),
    cost=ByLayers(),
    placements=((CARD,),),
    sleeper_bytes=1,
)
IMPOSSIBLE = of(model("impossible"), host=500, asleep=0)
FITTING = (
    of(QWEN, host=40, asleep=5, files=FILES),
    of(LLAMA, host=45, asleep=0, files=FILES),
    of(MISTRAL, host=30),
    UPSTREAM,
    GIANT,
    ON_CARD,
    ALSO_ON_CARD,
    BY_LEVELS,
    DROPPED_ONLY,
    LAYERED,
)
MODELS = (*FITTING, IMPOSSIBLE)
WISHES = (
    LoadOptions(),
    LoadOptions(n_ctx=4096),
    LoadOptions(n_ctx=8192, n_gpu_layers=0),
    LoadOptions(n_gpu_layers=20),
    LoadOptions(embeddings=True),
)


@dataclass(slots=True)
class Life:
    """One engine, as the effects and our own news tell it."""

    id: EngineId
    spec: EngineSpec
    options: LoadOptions
    ready: bool = False
    suspending: bool = False  # told to sleep, and has not said yet that it does
    sleeping: bool = False
    level: Level | None = None  # how it sleeps, or did before it was woken
    waking: bool = False
    stopped: bool = False  # a Stop was sent; the process still lives
    wished_away: bool = False
    drained: bool = False  # it took no new leases any more, before it left
    closed: bool = False  # takes no new lease any more
    leases: set[Ticket] = field(default_factory=set)

    @property
    def loading(self) -> bool:
        return not (self.ready or self.suspending or self.sleeping)

    @property
    def fresh(self) -> bool:
        """Whether its process begins anew with its load."""
        return not self.waking

    @property
    def resting(self) -> bool:
        return self.level is Level.REST

    @property
    def asleep(self) -> bool:
        return self.sleeping and not self.stopped


def serves(running: EngineSpec, options: LoadOptions, asked: EngineSpec) -> bool:
    """Whether an engine does for a request: the same file, and options that cover it."""
    return running.revision == asked.revision and covers(options, asked.wants)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        max_engines=st.sampled_from([2, 1, 3, None]),
        max_queue=st.sampled_from([None, None, 4]),
        fair_wait_s=st.sampled_from([0.0, 5.0, 100.0]),
        default_ttl_s=st.sampled_from([0.0, 7.0, 300.0]),
        crowded=st.booleans(),
        short=st.booleans(),
        min_residency_s=st.sampled_from([0.0, 3.0]),
        soft_idle_s=st.sampled_from([None, 0.0, 2.0, 50.0]),
    )
    def begin(
        self,
        max_engines: int | None,
        max_queue: int | None,
        fair_wait_s: float,
        default_ttl_s: float,
        crowded: bool,
        short: bool,
        min_residency_s: float,
        soft_idle_s: float | None,
    ) -> None:
        self.limits: dict[str, int] = dict(BUDGETS) if short else {}
        if max_engines is not None:
            self.limits[ENGINES] = max_engines
        self.scheduler = make_scheduler(
            max_engines,
            budgets=BUDGETS if short else None,
            min_residency_s=min_residency_s,
            max_queue=max_queue,
            fair_wait_s=fair_wait_s,
            default_ttl_s=default_ttl_s,
            soft_idle_s=soft_idle_s,
        )
        self.soft_idle_s = soft_idle_s
        self.short = short
        self.pinned: set[str] = set()
        self.retried: set[ModelKey] = set()  # ran out of memory once, and wait for a second try
        self.prepared: set[ModelKey] = set()  # whose files are being read ahead
        self.residency = min_residency_s > 0.0
        self.crowded = crowded  # at the end, ready engines are never idle
        self.now = 0.0
        self.numbers = count(1)
        self.shut = False
        self.live: dict[ModelKey, Life] = {}
        self.born: dict[ModelKey, int] = {}
        self.waiting: dict[Ticket, EngineSpec] = {}  # in order of arrival
        self.granted: dict[Ticket, Life] = {}
        self.refused: set[Ticket] = set()
        self.failed: set[tuple[ModelKey, str, Level]] = set()  # did not sleep or wake

    # What can happen.

    @rule(
        burst=st.lists(
            st.tuples(st.sampled_from(MODELS), st.sampled_from(WISHES)), min_size=1, max_size=4
        )
    )
    def acquire(self, burst: list[tuple[EngineSpec, LoadOptions]]) -> None:
        for spec, wants in burst:
            self._ask(replace(spec, wants=wants))

    @rule(
        spec=st.sampled_from(MODELS),
        wants=st.sampled_from(WISHES),
        revision=st.sampled_from(["", "", "", "new"]),
        ttl_s=st.sampled_from([None, None, 0.0, 3.0, 60.0]),
        patience_s=st.sampled_from([None, None, 0.0, 4.0, 30.0]),
    )
    def acquire_with_all_it_can_say(
        self,
        spec: EngineSpec,
        wants: LoadOptions,
        revision: str,
        ttl_s: float | None,
        patience_s: float | None,
    ) -> None:
        spec = replace(spec, wants=wants, revision=revision)
        deadline = None if patience_s is None else self.now + patience_s
        self._ask(spec, ttl_s=ttl_s, deadline=deadline)

    @precondition(lambda self: self.waiting)
    @rule(pick=st.integers(0, 9), take_back=st.booleans())
    def cancel(self, pick: int, take_back: bool) -> None:
        ticket = _one_of(self.waiting, pick)
        life = self.live.get(self.waiting[ticket].key)
        self._release(ticket, take_back=take_back)
        if take_back and life is not None and life.loading:
            assert life.stopped or self._awaited(life), "it loads for nobody"

    @rule(spec=st.sampled_from(FITTING), pinned=st.booleans())
    def pin(self, spec: EngineSpec, pinned: bool) -> None:
        if spec.key.is_local:
            (self.pinned.add if pinned else self.pinned.discard)(spec.key.model)
            self._send(Pin(spec.key.model, pinned))

    @precondition(lambda self: self.short)
    @rule(
        others=st.sampled_from([0, 0, 20, 70]),
        on_card=st.sampled_from([0, 0, 45]),
        taken=st.sampled_from([0.5, 0.9, 1.0, 1.2]),
    )
    def measure(self, others: int, on_card: int, taken: float) -> None:
        self._measure({HOST: others, CARD: on_card}, taken)

    @precondition(lambda self: self._lives(loading=True, stopped=False, fresh=True))
    @rule(pick=st.integers(0, 9))
    def run_out_of_memory(self, pick: int) -> None:
        life = _one_of(self._lives(loading=True, stopped=False, fresh=True), pick)
        again = life.id.key in self.retried or not self._awaited(life)
        effects = self._exit(life, InsufficientMemory(RAN_OUT))
        assert not (again and self._awaited(life)), "a third try"
        if self._awaited(life):
            assert any(isinstance(e, Stop) for e in effects), "a second try like the first"
            self.retried.add(life.id.key)

    @precondition(lambda self: self.granted)
    @rule(pick=st.integers(0, 9))
    def finish(self, pick: int) -> None:
        self._release(_one_of(self.granted, pick))

    @precondition(lambda self: self.refused)
    @rule()
    def take_the_refusal(self) -> None:
        self._release(min(self.refused))

    @precondition(lambda self: self._lives(loading=True))
    @rule(pick=st.integers(0, 9))
    def become_ready(self, pick: int) -> None:
        self._become_ready(_one_of(self._lives(loading=True), pick))

    @precondition(lambda self: self._lives(loading=True, stopped=False, fresh=True))
    @rule(pick=st.integers(0, 9), why=st.sampled_from([None, EngineStartFailed("out of memory")]))
    def fail_to_start(self, pick: int, why: EngineStartFailed | None) -> None:
        life = _one_of(self._lives(loading=True, stopped=False, fresh=True), pick)
        self._exit(life, why)
        assert not self._awaited(life)

    @precondition(lambda self: self._lives(loading=True, stopped=False, fresh=False))
    @rule(
        pick=st.integers(0, 9),
        why=st.sampled_from([None, InsufficientMemory(RAN_OUT), EngineStartFailed("it hangs")]),
    )
    def fail_to_wake(self, pick: int, why: GatewayError | None) -> None:
        life = _one_of(self._lives(loading=True, stopped=False, fresh=False), pick)
        waiting = [t for t, spec in self.waiting.items() if spec.key == life.id.key]
        effects = self._exit(life, why)
        refused = [e.ticket for e in effects if isinstance(e, Refuse) and e.error is why]
        assert not set(refused) & set(waiting), "refused for a sleeper's sake"
        self.failed.add((life.id.key, life.spec.revision, life.level))

    @precondition(lambda self: self._lives(stopped=True))
    @rule(pick=st.integers(0, 9))
    def exit_as_told(self, pick: int) -> None:
        self._exit(_one_of(self._lives(stopped=True), pick))

    @precondition(lambda self: self._lives(loading=False, stopped=False))
    @rule(pick=st.integers(0, 9))
    def crash(self, pick: int) -> None:
        effects = self._exit(_one_of(self._lives(loading=False, stopped=False), pick))
        # A start that failed is held against the model, a crash is not.
        refusals = [effect.error for effect in effects if isinstance(effect, Refuse)]
        assert all(isinstance(error, InsufficientMemory) for error in refusals)

    @precondition(lambda self: self._lives(suspending=True))
    @rule(pick=st.integers(0, 9))
    def fall_asleep(self, pick: int) -> None:
        life = _one_of(self._lives(suspending=True), pick)
        told_to_stop = life.stopped
        effects = self._fall_asleep(life)
        assert not (told_to_stop and effects), "late news does something"

    @precondition(lambda self: self._lives(suspending=True, resting=False))
    @rule(pick=st.integers(0, 9), hopeless=st.booleans())
    def fail_to_sleep(self, pick: int, hopeless: bool) -> None:
        life = _one_of(self._lives(suspending=True, resting=False), pick)
        level, was_stopped = life.level, life.stopped
        if not was_stopped:
            self.failed.add((life.id.key, life.spec.revision, level))
        effects = self._send(SleepFailed(life.id, hopeless))
        if was_stopped:
            assert effects == []
        elif not life.stopped:
            assert life.level > level
            assert not hopeless

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 9))
    def be_lost(self, pick: int) -> None:
        """It crashed, and its end takes a while: it is lent to nobody meanwhile."""
        life = _one_of(list(self.live.values()), pick)
        if not life.loading:
            life.stopped = life.closed = True
        self._send(EngineLost(life.id))

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 9), force=st.booleans())
    def unload(self, pick: int, force: bool) -> None:
        life = _one_of(list(self.live.values()), pick)
        life.wished_away = True
        life.closed |= life.ready or force
        self._send(Unload(life.id, force))
        assert life.stopped or (not force and (life.leases or self._awaited(life)))
        assert life.stopped or not (life.suspending or life.sleeping)

    @precondition(lambda self: self.born)
    @rule(
        pick=st.integers(0, 9),
        news=st.sampled_from(
            [EngineReady, EngineSlept, SleepFailed, EngineLost, EngineExited, Unload]
        ),
    )
    def old_news(
        self,
        pick: int,
        news: type[EngineReady | EngineSlept | SleepFailed | EngineLost | EngineExited | Unload],
    ) -> None:
        key = _one_of(self.born, pick)
        gone = self.born[key] - (key in self.live)
        assert self._send(news(EngineId(key, gone))) == []

    @rule()
    def all_goes_well_for_a_while(self) -> None:
        self._settle()

    @rule(seconds=st.sampled_from([2.0, 60.0]))
    def nobody_asks_for_a_while(self, seconds: float) -> None:
        self._settle()
        self.now += seconds
        self._tick()

    @rule(seconds=st.sampled_from([0.5, 3.0, 6.0, 70.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def tick(self) -> None:
        self._tick()

    @precondition(lambda self: self.scheduler.next_wakeup(now=self.now) is not None)
    @rule()
    def wake_up(self) -> None:
        self._wake_up()

    @rule(spec=st.sampled_from(FITTING), wants=st.sampled_from(WISHES))
    def dry_run(self, spec: EngineSpec, wants: LoadOptions) -> None:
        spec = replace(spec, wants=wants)
        before = self.scheduler.views()
        verdict = self.scheduler.plan(spec, now=self.now).verdict
        fits = self.scheduler.fits(spec, now=self.now)
        assert self.scheduler.views() == before
        life = self.live.get(spec.key)
        view = self.scheduler.view(spec.key)
        takes_leases = view is not None and view.state is EngineState.READY
        hit = takes_leases and serves(life.spec, life.options, spec)
        assert (verdict is Verdict.HIT) == hit
        if life is None or life.asleep or life.suspending:
            assert (verdict is Verdict.NEVER) == (not fits)

    @precondition(lambda self: self.live)
    @rule(force=st.booleans(), chance=st.integers(0, 15))
    def shut_down(self, force: bool, chance: int) -> None:
        if chance == 0 or self.shut:  # seldom the first time: little happens after it
            self.shut = True
            self._send(Shutdown(force))
            assert not self.waiting
            assert all(life.stopped or (life.leases and not force) for life in self.live.values())

    # What must be true after each of them.

    @invariant()
    def tickets_are_neither_lost_nor_leaked(self) -> None:
        assert self.scheduler.queued == len(self.waiting)
        assert self.scheduler.tickets == (len(self.waiting) + len(self.granted) + len(self.refused))
        for position, ticket in enumerate(self.waiting):
            assert self.scheduler.queue_position(ticket) == position

    @invariant()
    def the_views_tell_what_happened(self) -> None:
        assert [view.engine for view in self.scheduler.views()] == [
            life.id for life in self.live.values()
        ]
        for view in self.scheduler.views():
            life = self.live[view.engine.key]
            assert view.options == life.options
            assert view.active == len(life.leases)
            assert view.waiting == sum(s.key == life.id.key for s in self.waiting.values())
            assert (view.state is EngineState.STOPPING) == life.stopped
            assert (view.state is EngineState.STARTING) == (life.loading and not life.stopped)
            assert (view.state is EngineState.SUSPENDING) == (life.suspending and not life.stopped)
            assert (view.state is EngineState.SLEEPING) == life.asleep
            rests = (EngineState.READY, EngineState.SUSPENDING, EngineState.SLEEPING)
            assert (view.idle_since is None) == (view.state not in rests or bool(life.leases))
            # Nobody drains without a lease to wait for.
            assert view.state is not EngineState.DRAINING or life.leases

    @invariant()
    def who_sleeps_has_no_leases_and_little_memory(self) -> None:
        for view in self.scheduler.views():
            life = self.live[view.engine.key]
            assert not (life.suspending or life.sleeping) or not life.leases
            if view.state is EngineState.SLEEPING:
                assert ENGINES not in view.charged
                offloaded = view.spec.cost.footprint(LoadOptions()).device.total
                most = SMALL + (offloaded if life.level is Level.OFFLOADED else 0)
                if life.level is not Level.REST:
                    most += view.decision.footprint.host_bytes * 2  # what its process has
                assert sum(view.charged.values()) <= most
            assert self.scheduler.holds(view.engine.key) == (
                life.stopped or not (life.suspending or life.sleeping)
            )

    @invariant()
    def nobody_waits_for_what_is_there(self) -> None:
        blocked = False  # somebody earlier waits for room
        for spec in self.waiting.values():
            view = self.scheduler.view(spec.key)
            if view is not None and view.state is EngineState.READY:
                assert not serves(view.spec, view.options, spec), "it could be granted"
                assert blocked, "it could be reloaded"
            blocked |= self._waits_for_room(spec)

    @invariant()
    def what_takes_no_room_waits_for_no_room(self) -> None:
        for spec in self.waiting.values():
            assert self._counts(spec) or spec.key in self.live

    @invariant()
    def the_head_waits_only_for_room_and_somebody_makes_it(self) -> None:
        head = self._head()
        if head is None or isinstance(head.cost, ByLayers) or head.key in self.retried:
            return
        assert self._lacking(head), "it could start"
        leaving = self._leaving()
        if not self._lacking(head, once_gone=leaving):
            return
        # Those who may leave at once are not enough even together, or they would be leaving.
        idle = [self.live[v.engine.key] for v in self.scheduler.views() if self._may_leave(v)]
        assert self._lacking(head, once_gone=[*leaving, *idle]), "somebody idle stays"

    @invariant()
    def what_cannot_fit_does_not_wait(self) -> None:
        assert not self.short or all(s.key != IMPOSSIBLE.key for s in self.waiting.values())

    # The world's own picture.

    def _ask(
        self, spec: EngineSpec, *, ttl_s: float | None = None, deadline: float | None = None
    ) -> Ticket:
        ticket = Ticket(next(self.numbers))
        self.waiting[ticket] = spec
        self._send(Acquire(ticket, spec, ttl_s, deadline))
        return ticket

    def _release(self, ticket: Ticket, *, take_back: bool = False) -> None:
        self.waiting.pop(ticket, None)
        self.refused.discard(ticket)
        if ticket in self.granted:
            self.granted.pop(ticket).leases.discard(ticket)
        self._send(Release(ticket, take_back))

    def _become_ready(self, life: Life) -> None:
        life.ready, life.level, life.waking = True, None, False
        self._send(EngineReady(life.id))
        life.closed |= life.wished_away

    def _fall_asleep(self, life: Life) -> list[Effect]:
        life.suspending, life.sleeping = False, True
        use = MemoryUse()
        if life.level is not Level.REST:
            host = life.spec.cost.footprint(LoadOptions()).host_bytes
            use = MemoryUse(host, host, ((CARD, REST),)) if self.now % 2 else use
        return self._send(EngineSlept(life.id, use))

    def _exit(self, life: Life, why: GatewayError | None = None) -> list[Effect]:
        del self.live[life.id.key]
        return self._send(EngineExited(life.id, why))

    def _measure(self, others: Mapping[str, int], taken: float) -> None:
        uses = {}
        for view in self.scheduler.views():
            host, device = view.decision.footprint.host_bytes, view.decision.footprint.device_bytes
            if view.state is EngineState.SLEEPING:
                host, device = view.spec.sleeper_bytes, REST
                if host is None:
                    host = view.decision.footprint.host_bytes
                if view.level is Level.OFFLOADED:
                    host += view.decision.footprint.device.weights
            on_card = ((CARD, int(device * taken)),) if view.placement else ()
            uses[view.engine] = MemoryUse(int(host * taken), int(host * taken), on_card)
        readings = []
        for device, capacity in BUDGETS.items():
            ours = sum(use.private_bytes or 0 for use in uses.values())
            if device == CARD:
                ours = sum(dict(use.devices or ()).get(CARD, 0) for use in uses.values())
            available = capacity - others[device] - ours
            readings.append(DeviceReading(device, device, capacity, available))
            self.limits[device] = capacity - max(0, others[device])
        self._send(Measured(tuple(readings), uses))

    def _tick(self) -> None:
        self._send(Tick())
        wakeup = self.scheduler.next_wakeup(now=self.now)
        assert wakeup is None or wakeup > self.now, "the pool would spin"

    def _wake_up(self) -> None:
        wakeup = self.scheduler.next_wakeup(now=self.now)
        assert wakeup is not None
        self.now = max(self.now, wakeup)
        self._tick()

    def _send(self, event: Event) -> list[Effect]:
        for view in self.scheduler.views():
            if view.state is EngineState.DRAINING and view.engine.key in self.live:
                self.live[view.engine.key].drained = True
        self.begun: list[Start] = []
        effects = self.scheduler.handle(event, now=self.now)
        for effect in effects:
            match effect:
                case Start():
                    self._started(effect)
                case Prepare():
                    self._prepared(effect)
                case Sleep():
                    self._told_to_sleep(effect, event)
                case Stop():
                    self._stopped(effect, event)
                case Grant():
                    self._granted(effect)
                case Refuse():
                    spec = self.waiting.pop(effect.ticket)  # no Grant and no Refuse before
                    self.refused.add(effect.ticket)
                    mine = isinstance(event, Acquire) and event.ticket == effect.ticket
                    if mine and isinstance(effect.error, InsufficientMemory):
                        assert len(effects) == 1, "somebody leaves for what cannot fit"
                        fixed = isinstance(spec.cost, FixedCost)
                        told = effect.error.message != RAN_OUT  # not of an earlier start
                        assert not (fixed and told) or self._lacking_alone(spec)
        for start in self.begun:
            self._is_covered(start)
            assert not any(
                isinstance(e, Prepare) and e.spec.key == start.engine.key for e in effects
            ), "read ahead of a load that has begun"
        self.prepared = {
            key for key in self.prepared if any(s.key == key for s in self.waiting.values())
        }
        self.retried = {
            key for key in self.retried if any(s.key == key for s in self.waiting.values())
        }
        return effects

    def _started(self, effect: Start) -> None:
        key = effect.engine.key
        assert not self.shut
        if effect.wakes:
            assert self.live[key].id == effect.engine
            assert self.live[key].asleep
        else:
            assert key not in self.live, "its predecessor lives"
            assert effect.engine.incarnation == self.born.get(key, 0) + 1
        self.born[key] = effect.engine.incarnation
        for spec in self.waiting.values():
            if spec.key == key:
                assert spec == effect.spec
                assert covers(effect.options, spec.wants), "not what the first one asked"
                break
            past_the_head = self._waits_for_room(spec) and self._counts(effect.spec)
            assert not past_the_head
        else:
            raise AssertionError("started for nobody")
        if effect.wakes:
            life = self.live[key]
            if life.level is not Level.REST:
                assert serves(life.spec, life.options, effect.spec)
                assert effect.options == life.options
                life.waking = True
            life.sleeping, life.spec, life.options = False, effect.spec, effect.options
        else:
            self.live[key] = Life(effect.engine, effect.spec, effect.options)
        self.begun.append(effect)

    def _prepared(self, effect: Prepare) -> None:
        key = effect.spec.key
        assert effect.spec.files
        assert key not in self.prepared, "read ahead twice"
        self.prepared.add(key)
        assert effect.spec == next(s for s in self.waiting.values() if s.key == key)
        assert self._waits_for_room(effect.spec)

    def _told_to_sleep(self, effect: Sleep, cause: Event) -> None:
        life = self.live[effect.engine.key]
        assert life.id == effect.engine
        assert effect.level in life.spec.levels
        assert (life.id.key, life.spec.revision, effect.level) not in self.failed, "tried again"
        assert not life.stopped
        assert not life.leases
        if isinstance(cause, SleepFailed):
            assert life.suspending
        else:
            assert isinstance(cause, Tick)
            assert life.id.key.model not in self.pinned
            assert life.ready or life.sleeping
            idle_since = self.scheduler.view(life.id.key).idle_since
            assert idle_since + self.soft_idle_s <= self.now
        assert life.level is None or effect.level > life.level
        assert not life.sleeping or not self._awaited(life)
        life.ready, life.sleeping, life.suspending = False, False, True
        life.level = effect.level

    def _stopped(self, effect: Stop, cause: Event) -> None:
        life = self.live[effect.engine.key]
        assert life.id == effect.engine
        meant = not isinstance(cause, Unload) or cause.engine == life.id
        by_force = isinstance(cause, Unload | Shutdown) and cause.force and meant
        assert effect.force == by_force
        assert by_force or not life.leases
        assert by_force or not life.stopped, "told twice"
        # An engine that is ready, and waited for all the same, does not cover what is asked.
        idle_or_loading = effect.reason == "idle" or life.loading
        assert by_force or life.ready or not idle_or_loading or not self._awaited(life)
        if effect.reason == "evicted":
            assert self._counts(life.spec)
            assert life.drained or life.id.key.model not in self.pinned
            out_of_memory = isinstance(cause, EngineExited) and cause.failure is not None
            head = self._head()
            # One that drained may have done so for somebody who left since.
            if not life.drained and not out_of_memory and not isinstance(head.cost, ByLayers):
                assert self._lacking(head, once_gone=self._leaving()), "one too many"
        life.stopped = life.closed = True

    def _granted(self, effect: Grant) -> None:
        spec = self.waiting.pop(effect.ticket)
        life = self.live[effect.engine.key]
        assert life.id == effect.engine
        assert spec.key == life.id.key
        assert life.ready
        assert not life.closed
        assert serves(life.spec, life.options, spec)
        life.leases.add(effect.ticket)
        self.granted[effect.ticket] = life

    def _lives(self, **what: bool) -> list[Life]:
        """Those of which all of this is true, or false, as said."""
        return [
            life
            for life in self.live.values()
            if all(getattr(life, name) is value for name, value in what.items())
        ]

    def _leaving(self) -> list[Life]:
        """Those that give back what they have, by going or by going to sleep."""
        return [life for life in self.live.values() if life.stopped or life.suspending]

    def _awaited(self, life: Life) -> bool:
        return any(spec.key == life.id.key for spec in self.waiting.values())

    def _counts(self, spec: EngineSpec) -> bool:
        return spec.key.is_local

    def _head(self) -> EngineSpec | None:
        """The first in the queue who waits for room."""
        return next((s for s in self.waiting.values() if self._waits_for_room(s)), None)

    def _waits_for_room(self, spec: EngineSpec) -> bool:
        """Whether there is no engine yet, or one that sleeps, for who waits for this one."""
        return spec.key not in self.live or self.live[spec.key].asleep

    def _may_leave(self, view: EngineView) -> bool:
        """Whether an engine may be asked to leave at once, whoever it is for."""
        lingers = self.scheduler.next_wakeup(now=self.now) is not None and self.residency
        return (
            view.idle_since is not None
            and self._counts(view.spec)
            and not view.pinned
            and not lingers
        )

    def _charges(self, without: Sequence[Life] = ()) -> Counter[str]:
        gone = {life.id for life in without}
        charges: Counter[str] = Counter()
        for view in self.scheduler.views():
            if view.engine not in gone:
                charges.update(view.charged)
        return charges

    def _lacking(self, head: EngineSpec, *, once_gone: Sequence[Life] = ()) -> dict[str, int]:
        """What the head lacks; what leaves for its own successor frees nothing for it.

        One that sleeps has what it has already.
        """
        keys = [spec.key for spec in self.waiting.values()]
        promised = keys[: keys.index(head.key)]
        gone = [life for life in once_gone if life.id.key not in promised]
        if head.key in self.live:
            gone.append(self.live[head.key])
        return self._over(head, self._charges(gone))

    def _lacking_alone(self, spec: EngineSpec) -> dict[str, int]:
        """What is too much of a model though all are gone that may leave for it."""
        staying = [v for v in self.scheduler.views() if v.pinned and v.engine.key != spec.key]
        charges: Counter[str] = Counter()
        for view in staying:
            charges.update(view.charged)
        return self._over(spec, charges)

    def _over(self, spec: EngineSpec, charges: Mapping[str, int]) -> dict[str, int]:
        wanted = dict(spec.cost.footprint(LoadOptions()).demands(spec.placements[0]))
        return {
            resource: lack
            for resource, amount in wanted.items()
            if amount
            and resource in self.limits
            and (lack := charges.get(resource, 0) + amount - self.limits[resource]) > 0
        }

    def _is_covered(self, start: Start) -> None:
        """What was promised is there: of each thing it takes, all together are not too much."""
        charges = self._charges()
        for resource, amount in self.scheduler.view(start.engine.key).charged.items():
            if amount and resource in self.limits:
                assert charges[resource] <= self.limits[resource], "more than there is"

    # A fair world: whatever was asked for happens, and time goes on.

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return  # the first step failed
        for name in sorted(self.pinned):
            self.pinned.discard(name)
            self._send(Pin(name, pinned=False))
        if self.short:
            self._measure({HOST: 0, CARD: 0}, taken=0.5)
        for spec in MODELS:
            self._ask(spec)
        patient = set(self.waiting)
        # One wait, one stop, one start and one turn for each who waits, with time to spare.
        for _ in range(20 * (len(patient) + 1)):
            if not patient & self.waiting.keys():
                break
            self._one_round()
        assert not patient & self.waiting.keys(), "starved"
        for ticket in [*self.waiting, *self.granted, *self.refused]:
            self._release(ticket)
        assert self.scheduler.tickets == self.scheduler.queued == 0

    def _one_round(self) -> None:
        self._settle(crowded=self.crowded)
        if self.scheduler.next_wakeup(now=self.now) is not None:
            self._wake_up()

    def _settle(self, *, crowded: bool = False) -> None:
        """Let every stop, start and request that is under way come to its end."""
        for life in self._lives(stopped=True):
            self._exit(life)
        for life in self._lives(suspending=True):
            self._fall_asleep(life)
        for life in self._lives(loading=True, stopped=False):
            self._become_ready(life)
        leaving = [*self.granted, *self.refused]
        if crowded:
            for life in self._lives(ready=True, stopped=False):
                newcomer = self._ask(replace(life.spec, wants=LoadOptions()))
                if newcomer in self.waiting:
                    self._release(newcomer)
        for ticket in leaving:
            self._release(ticket)


def _one_of(things, pick):
    things = list(things)
    return things[pick % len(things)]


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
