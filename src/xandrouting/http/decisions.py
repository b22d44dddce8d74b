"""Decisions, loads and devices as answers and events show them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from xandrouting.core.ledger import DeviceState
from xandrouting.core.model import Footprint, LoadOptions, Terms
from xandrouting.core.planner import Decision, Verdict, Victim
from xandrouting.core.refusals import described as described_alternative
from xandrouting.http.schemas import (
    DecisionItem,
    DeviceItem,
    FootprintItem,
    LoadingItem,
    TermsItem,
    VictimItem,
)
from xandrouting.pool.engine import Loading, described

GIB = 1 << 30


def gib(size_bytes: int) -> float:
    """Return a size as people read it."""
    return round(size_bytes / GIB, 2)


def decision_item(decision: Decision) -> DecisionItem:
    """Describe a decision."""
    return DecisionItem(
        verdict=decision.verdict,
        fits=decision.verdict is not Verdict.NEVER,
        model=decision.model,
        options=options_of(decision.options),
        placement=list(decision.placement),
        estimate=footprint_item(decision.footprint),
        expected_seconds=round(decision.expected_s, 2),
        devices=device_items(decision.devices),
        victims=[_victim(victim) for victim in decision.victims],
        reasons=list(decision.reasons),
        lacking_bytes=dict(decision.lacking),
        alternatives=[described_alternative(each) for each in decision.alternatives],
    )


def options_of(options: LoadOptions) -> dict[str, object]:
    """Return the options that are set."""
    return {name: value for name, value in asdict(options).items() if value is not None}


def footprint_item(footprint: Footprint) -> FootprintItem:
    """Describe what an engine takes."""
    total = footprint.host_bytes + footprint.device_bytes
    return FootprintItem(
        source="estimated" if footprint.seen is None else "learned",
        host_bytes=footprint.host_bytes,
        device_bytes=footprint.device_bytes,
        total_bytes=total,
        total_gb=gib(total),
        host=_terms(footprint.host),
        device=_terms(footprint.device),
    )


def device_items(states: Iterable[DeviceState]) -> list[DeviceItem]:
    """Describe the ledger's lines."""
    return [_device(state) for state in states]


def loading_item(loading: Loading | None) -> LoadingItem | None:
    """Describe how far a load is."""
    return None if loading is None else LoadingItem(**described(loading))


def _device(state: DeviceState) -> DeviceItem:
    fields = asdict(state)
    twins = {
        name.replace("_bytes", "_gb"): gib(value)
        for name, value in fields.items()
        if name.endswith("_bytes")
    }
    return DeviceItem.model_validate(fields | twins)


def _terms(terms: Terms) -> TermsItem:
    return TermsItem(
        weights_bytes=terms.weights,
        kv_cache_bytes=terms.kv_cache,
        compute_bytes=terms.compute,
        overhead_bytes=terms.overhead,
        total_bytes=terms.total,
    )


def _victim(victim: Victim) -> VictimItem:
    return VictimItem(
        model=victim.engine.key.model,
        engine=victim.engine.label,
        frees=dict(victim.frees),
        idle_seconds=round(victim.idle_s, 3),
        uses=round(victim.uses, 3),
        reload_seconds=round(victim.reload_s, 3),
        score=round(victim.score, 6),
    )
