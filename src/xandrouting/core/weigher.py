"""What things take, as far as is known, and the words for a decision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from xandrouting.core import planner
from xandrouting.core.cover import fill
from xandrouting.core.engine import Engine
from xandrouting.core.engine_state import EngineState
from xandrouting.core.eviction import Candidate, Choose, choose
from xandrouting.core.figures import Figures
from xandrouting.core.ladder import Ladder, Rung
from xandrouting.core.ledger import Amounts, DeviceState, Ledger
from xandrouting.core.model import (
    ENGINES,
    HOST,
    DeviceReading,
    EngineId,
    EngineSpec,
    Footprint,
    Level,
    LoadOptions,
    MemoryUse,
    Placement,
)
from xandrouting.core.planner import Decision, Plan, Surroundings, Verdict, Victim
from xandrouting.core.sizes import in_words

PROCESS_S: Final = 0.1  # to start a process anew: all that is lost with one that sleeps


@dataclass(frozen=True, slots=True)
class Together:
    """Whether several models fit at once; `sizes` in bytes, `limits` in words."""

    fits: bool
    sizes: tuple[tuple[str, int], ...]
    limits: str


class Weigher:
    """The ledger and the figures of earlier loads and sleeps, asked together."""

    def __init__(self, ledger: Ledger, figures: Figures, choose: Choose = choose) -> None:
        self.ledger = ledger
        self.ladder = Ladder()
        self._figures = figures
        self._choose = choose

    def footprint(self, spec: EngineSpec, options: LoadOptions, placement: Placement) -> Footprint:
        """Return what such an engine takes: as seen before, else as estimated."""
        footprint = spec.cost.footprint(options, max(1, len(placement)))
        seen = self._figures.find(spec.learned_as, spec.key.device, len(placement), options)
        return footprint if seen is None else replace(footprint, seen=seen)

    def amounts(self, spec: EngineSpec, options: LoadOptions, placement: Placement) -> Amounts:
        """Return the same by resource."""
        return dict(self.footprint(spec, options, placement).demands(placement))

    def candidate(self, engine: Engine, now: float) -> Candidate:
        """Return what an idle engine's loss is weighed by."""
        assert engine.idle_since is not None
        reload_s = self._expected_s(engine.spec, engine.footprint)
        if engine.wakes_as_it_was:
            assert engine.level is not None
            reload_s = max(PROCESS_S, reload_s - self.rung(engine, engine.level).wake_s)
        elif engine.sleeps:
            reload_s = PROCESS_S
        return Candidate(
            engine.id,
            self.ledger.charge_of(engine.id),
            idle_s=now - engine.idle_since,
            uses=engine.habit.uses_at(now),
            reload_s=reload_s,
        )

    def among(
        self,
        spec: EngineSpec,
        *,
        leaving: Iterable[Engine],
        staying: Iterable[Engine],
        candidates: Iterable[Candidate],
        woken: Engine | None = None,
    ) -> Surroundings:
        """Return what a load of `spec` is planned among."""
        return Surroundings(
            self.ledger,
            partial(self.footprint, spec),
            self.charges(leaving),
            self.charges(staying),
            tuple(candidates),
            {} if woken is None else self.ledger.charge_of(woken.id),
            self._choose,
        )

    def charges(self, engines: Iterable[Engine]) -> Counter[str]:
        """Return what these are charged together."""
        together: Counter[str] = Counter()
        for engine in engines:
            together.update(self.ledger.charge_of(engine.id))
        return together

    def together(self, specs: Iterable[EngineSpec]) -> Together:
        """Return whether all of these fit at once, each with what those before it leave."""
        taken: Counter[str] = Counter()
        sizes = []
        fits = True
        for spec in specs:
            among = Surroundings(self.ledger, partial(self.footprint, spec), {}, taken, (), {})
            best = planner.smallest_fit(spec, spec.wants, among)
            fits = fits and best is not None
            options, placement = best or (fill(spec.wants, spec.defaults), spec.placements[0])
            footprint = self.footprint(spec, options, placement)
            taken.update(dict(footprint.demands(placement)))
            sizes.append((spec.key.model, footprint.host_bytes + footprint.device_bytes))
        limits = [(device, self.ledger.limit(device)) for device in taken if device != ENGINES]
        room = [f"{in_words(limit)} on {d}" for d, limit in limits if limit is not None]
        return Together(fits, tuple(sizes), " and ".join(room))

    def explained(
        self,
        spec: EngineSpec,
        wants: LoadOptions,
        found: Plan,
        among: Surroundings,
        devices: tuple[DeviceState, ...],
    ) -> Decision:
        """Return a plan with what it was weighed by."""
        footprint = self.footprint(spec, found.options, found.placement)
        fits = found.verdict is not Verdict.NEVER
        short = found.verdict in (Verdict.NEVER, Verdict.WAIT)
        given_up = planner.reasons(spec, wants, found, self.ledger)
        alone = replace(among, ledger=self.ledger.unburdened(), staying={})
        return Decision(
            found.verdict,
            spec.key.model,
            found.options,
            found.placement,
            footprint,
            expected_s=self._expected_s(spec, footprint),
            learned=footprint.seen is not None,
            devices=devices,
            victims=tuple(Victim.of(candidate) for candidate in found.victims),
            reasons=(*([spec.chosen] if spec.chosen else ()), *(given_up if fits else ())),
            lacking=() if fits else tuple(planner.lacking(found, among).items()),
            over_budget=not fits and not planner.fits_at_all(spec, wants, alone),
            alternatives=tuple(planner.alternatives(spec, wants, among)) if short else (),
        )

    def measured(
        self,
        devices: Iterable[DeviceReading],
        uses: Mapping[EngineId, MemoryUse],
        engines: Mapping[EngineId, Engine],
        spare_bytes: int,
    ) -> None:
        """Take in what was measured: charges of running engines, and what others take."""
        for engine_id, use in uses.items():
            engine = engines.get(engine_id)
            charge = None if engine is None else engine.charge_for(use)
            if charge is not None:
                self.ledger.charge(engine_id, charge)
        ours: Counter[str] = Counter({HOST: spare_bytes})
        perhaps: Counter[str] = Counter()
        for engine_id, use in uses.items():
            ours[HOST] += use.private_bytes or 0
            ours.update(dict(use.devices or ()))
            engine = engines.get(engine_id)
            if use.devices is None and engine is not None:
                # The system does not tell whose the memory of its accelerators is.
                charge = self.ledger.charge_of(engine_id)
                untold = {device: charge.get(device, 0) for device in engine.placement}
                # One that loads may have none of it yet, one that falls asleep none any more.
                unsure = engine.ready_at is None or engine.state is EngineState.SUSPENDING
                (perhaps if unsure else ours).update(untold)
        self.ledger.read(devices, ours, perhaps)

    def next_rung(self, engine: Engine) -> Rung | None:
        """Return how an idle engine shall sleep, or a sleeper deeper; None: as it does."""
        if engine.level is Level.OFFLOADED and engine.state is EngineState.SLEEPING:
            # It has to wake in between, and nobody leaves for that.
            charge = self.ledger.charge_of(engine.id)
            if self.ledger.lacks(self.awake_amounts(engine), freed=charge):
                return None
        current = None if engine.state is EngineState.READY else engine.level
        return self.ladder.next(
            engine.spec,
            current,
            weights_bytes=engine.footprint.device.weights,
            host_free_bytes=self.ledger.free(HOST),
            cold_s=self._expected_s(engine.spec, engine.footprint),
        )

    def suspends(self, engine: Engine, rung: Rung) -> None:
        """Charge an engine what it takes while it falls asleep, or sleeps deeper."""
        if engine.sleeps:
            self.ledger.charge(engine.id, self.awake_amounts(engine))
        charge = dict(self.ledger.charge_of(engine.id))
        charge[HOST] = charge.get(HOST, 0) + rung.takes_bytes
        self.ledger.charge(engine.id, charge)

    def slept(self, engine: Engine, use: MemoryUse, now: float) -> None:
        """Charge a sleeper what it keeps, and remember what its level took."""
        spec, level = engine.spec, engine.level
        assert level is not None
        assert engine.told_at is not None
        rung = self.rung(engine, level)
        awake_bytes = engine.most[HOST] or engine.footprint.host_bytes
        asleep_bytes = awake_bytes if spec.sleeper_bytes is None else spec.sleeper_bytes
        kept = {HOST: asleep_bytes + rung.takes_bytes, **engine.kept}
        self.ledger.charge(engine.id, engine.charge_for(use) or kept)
        grown_bytes = 0 if use.host_bytes is None else use.host_bytes - awake_bytes
        self.ladder.note_slept(spec, level, sleep_s=now - engine.told_at, grown_bytes=grown_bytes)

    def waking(self, engine: Engine, decision: Decision) -> Decision:
        """Return the decision of a load with what is known of waking this sleeper."""
        if not engine.wakes_as_it_was:
            return decision
        assert engine.level is not None
        rung = self.rung(engine, engine.level)
        return replace(decision, expected_s=rung.wake_s, learned=rung.measured)

    def rung(self, engine: Engine, level: Level) -> Rung:
        """Return what a level costs for an engine."""
        return self.ladder.rung(engine.spec, level, engine.footprint.device.weights)

    def awake_amounts(self, engine: Engine) -> Amounts:
        """Return what a sleeper has of each device at most, while it wakes to sleep deeper."""
        most = Counter(self.ledger.charge_of(engine.id))
        for device, amount in engine.footprint.demands(engine.placement):
            if device != ENGINES:
                most[device] = max(most[device], amount)
        return most

    def _expected_s(self, spec: EngineSpec, footprint: Footprint) -> float:
        learned_s = self._figures.load_s(spec.learned_as, spec.key.device)
        return planner.expected_load_s(footprint, learned_s)
