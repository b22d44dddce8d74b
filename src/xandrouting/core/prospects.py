"""What a request would get, among the engines that are there now. Nothing is changed by asking."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from xandrouting.core import planner, refusals
from xandrouting.core.cover import union
from xandrouting.core.engine import Engine
from xandrouting.core.engine_state import EngineState
from xandrouting.core.errors import GatewayError
from xandrouting.core.fleet import Fleet
from xandrouting.core.model import EngineSpec, LoadOptions, ModelKey
from xandrouting.core.planner import Decision, Plan, Surroundings, Verdict
from xandrouting.core.turns import Turns
from xandrouting.core.weigher import Weigher


class Prospects:
    """The planner, asked about the engines of one node."""

    def __init__(self, weigher: Weigher, turns: Turns, fleet: Fleet) -> None:
        self._weigher = weigher
        self._turns = turns
        self._fleet = fleet

    def decide(self, spec: EngineSpec, now: float) -> Decision:
        """Return what would become of a request if nobody waited."""
        engine = self._fleet.get(spec.key)
        among = self._alone(spec, now)
        if engine is None:
            wants, found = planned((spec.wants,), spec, among)
        elif engine.serves(spec):
            wants, found = engine.wants, Plan(Verdict.HIT, engine.options, engine.placement)
        elif engine.will_serve(spec):
            wants, found = engine.wants, Plan(Verdict.WAIT, engine.options, engine.placement)
        elif (waking := woken(engine, spec, among)) is not None:
            wants, found = engine.wants, waking
        elif engine.rests:
            wants, found = planned((union(engine.wants, spec.wants), spec.wants), spec, among)
        else:
            wants, found = planned((_successor_of(engine, spec), spec.wants), spec, among)
            if found.verdict is not Verdict.NEVER:
                verdict = Verdict.WAIT if _leaves(engine) else Verdict.RELOAD
                found = replace(found, verdict=verdict)
        return self.explained(spec, wants, found, among)

    def fits(self, spec: EngineSpec, now: float) -> bool:
        """Whether a request would be served at all, if not at once."""
        return planner.fits_at_all(spec, spec.wants, self._alone(spec, now))

    def refusal(self, spec: EngineSpec, now: float) -> GatewayError:
        """Return what to tell a request that does not fit at all."""
        among = self._alone(spec, now)
        return self.too_large(spec, spec.wants, planner.never(spec, spec.wants, among), among)

    def too_large(
        self, spec: EngineSpec, wants: LoadOptions, never: Plan, among: Surroundings
    ) -> GatewayError:
        """Return what to tell those whose plan has the verdict `never`."""
        return refusals.too_large(self.explained(spec, wants, never, among))

    def explained(
        self, spec: EngineSpec, wants: LoadOptions, found: Plan, among: Surroundings
    ) -> Decision:
        """Return a plan with what it was weighed by."""
        return self._weigher.explained(spec, wants, found, among, self._fleet.devices())

    def _alone(self, spec: EngineSpec, now: float) -> Surroundings:
        """Return what a load is planned among when nobody waits before it."""
        return self.among(spec, now, arrived_at=now, replaced=self._fleet.get(spec.key))

    def among(
        self,
        spec: EngineSpec,
        now: float,
        *,
        arrived_at: float,
        promised: Iterable[ModelKey] = (),
        replaced: Engine | None = None,
    ) -> Surroundings:
        """Return what a load is planned among.

        Engines of `promised` keys keep their room for their successors; `replaced` is the
        engine that the planned one takes the place of.
        """
        leaving, staying, candidates = [], [], []
        for engine in self._fleet:
            if engine is replaced or engine.state in (
                EngineState.STOPPING,
                EngineState.SUSPENDING,
            ):
                if engine.id.key not in promised:
                    leaving.append(engine)
            elif engine.state is EngineState.DRAINING:
                continue
            elif engine.id.key.model in self._fleet.pinned:
                staying.append(engine)
            elif (
                engine.is_idle
                and engine.counts
                and self._turns.leaves_at(engine, arrived_at) <= now
            ):
                candidates.append(self._weigher.candidate(engine, now))
        return self._weigher.among(
            spec,
            leaving=leaving,
            staying=staying,
            candidates=candidates,
            woken=replaced if replaced is not None and replaced.sleeps else None,
        )


def planned(
    wishes: Iterable[LoadOptions], spec: EngineSpec, among: Surroundings
) -> tuple[LoadOptions, Plan]:
    """Return the first of the wishes that can be met, and how; else the last, and why not."""
    *others, last = dict.fromkeys(wishes)
    for wants in others:
        found = planner.plan(spec, wants, among)
        if found.verdict is not Verdict.NEVER:
            return wants, found
    return last, planner.plan(spec, last, among)


def woken(engine: Engine, spec: EngineSpec, among: Surroundings) -> Plan | None:
    """Return how a sleeper can be woken that wakes as it was; None: it is of no use for this."""
    if not engine.wakes_as_it_was or not engine.does_for(spec):
        return None
    there = replace(spec, placements=(engine.placement,))
    found = planner.plan(there, engine.options, among)
    return None if found.verdict is Verdict.NEVER else found


def _successor_of(engine: Engine, spec: EngineSpec) -> LoadOptions:
    """Return what the next engine is asked for: one that is replaced hands on its wishes."""
    if _leaves(engine) and engine.retire != "options":
        return spec.wants
    return union(engine.wants, spec.wants)


def _leaves(engine: Engine) -> bool:
    return engine.state in (EngineState.DRAINING, EngineState.STOPPING)
