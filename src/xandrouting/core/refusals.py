"""What the scheduler tells those it has no engine for."""

from __future__ import annotations

from xandrouting.core.errors import (
    EngineStartFailed,
    EngineUnloaded,
    GatewayError,
    InsufficientMemory,
    LoadingTimeout,
    QueueFull,
    QueueTimeout,
    ShuttingDown,
)
from xandrouting.core.model import ENGINES, HOST, ModelKey
from xandrouting.core.planner import Alternative, Decision
from xandrouting.core.sizes import in_words

ASK_AGAIN_S = 30.0  # where only other programs or pinned models are in the way


def shutting_down() -> GatewayError:
    """Refuse everything: the gateway is ending."""
    return ShuttingDown("The server is shutting down and takes no new requests.", retry_after_s=5.0)


def queue_full(key: ModelKey, limit: int) -> GatewayError:
    """Refuse to queue: as many wait as may."""
    return QueueFull(
        f"{limit} requests wait already; {key.model} cannot be queued. Ask again later.",
        retry_after_s=5.0,
    )


def start_failed(key: ModelKey) -> GatewayError:
    """Say that an engine ended, where nothing more is known."""
    return EngineStartFailed(f"The engine of {key.model} ended before it was ready.")


def unloaded(key: ModelKey) -> GatewayError:
    """Refuse those who wait for an engine that was unloaded by force."""
    return EngineUnloaded(f"{key.model} was unloaded by force while it was loading.")


def still_loading(key: ModelKey, waited_s: float) -> GatewayError:
    """Give up on a load that takes longer than the request may wait."""
    return LoadingTimeout(
        f"{key.model} is still loading after {waited_s:.0f} s. Ask again: the load goes on.",
        retry_after_s=5.0,
    )


def no_room(key: ModelKey, waited_s: float) -> GatewayError:
    """Give up on a place that never became free."""
    return QueueTimeout(
        f"No place for {key.model} became free in {waited_s:.0f} s. "
        "Ask again later, unload another model, or raise max_loaded.",
        retry_after_s=10.0,
    )


def too_large(decision: Decision) -> GatewayError:
    """Refuse what does not fit though all leave that may, with numbers and what would fit.

    Waiting helps only where other programs, or models that are pinned, hold what it lacks.
    """
    needed = dict(decision.footprint.demands(decision.placement))
    lacking = dict(decision.lacking)
    too_much = [
        f"{in_words(needed[resource])} of {_named(resource)} (it may have "
        f"{in_words(max(0, needed[resource] - lack))})"  # pinned ones may hold more than is left
        for resource, lack in lacking.items()
        if resource != ENGINES
    ]
    fitting = [_offer(alternative) for alternative in decision.alternatives]
    remedies = [f"What would fit: {'; '.join(fitting)}."] if fitting else []
    if not decision.over_budget:
        remedies.append("Pinned models or other programs hold the rest: unpin one, or ask later.")
    return InsufficientMemory(
        f"{decision.model} does not fit: it needs {' and '.join(too_much) or 'a place'}. "
        + (" ".join(remedies) or "Use a smaller model."),
        param="model",
        details={
            "needed_bytes": needed[HOST] + decision.footprint.device_bytes,
            "lacking_bytes": {r: n for r, n in lacking.items() if r != ENGINES},
            "devices": [
                {
                    "device": device.device,
                    "needed_bytes": needed.get(device.device, 0),
                    "budget_bytes": device.budget_bytes,
                    "free_bytes": device.free_bytes,
                    "others_bytes": device.others_bytes,
                }
                for device in decision.devices
            ],
            "alternatives": [described(alternative) for alternative in decision.alternatives],
        },
        retry_after_s=None if decision.over_budget else ASK_AGAIN_S,
    )


def described(alternative: Alternative) -> dict[str, object]:
    """Return an alternative as answers show it: what to ask for, and what that takes."""
    asked: dict[str, object] = {"change": alternative.change}
    options = alternative.options
    if alternative.change == "model":
        asked["model"] = alternative.model
    elif alternative.change == "cache_type":
        asked |= {"cache_type_k": options.cache_type_k, "cache_type_v": options.cache_type_v}
    else:
        asked[alternative.change] = getattr(options, alternative.change)
    needs = alternative.host_bytes, alternative.device_bytes
    return asked | {"host_bytes": needs[0], "device_bytes": needs[1]}


def _offer(alternative: Alternative) -> str:
    asked = described(alternative)
    names = (name for name in asked if name not in ("change", "host_bytes", "device_bytes"))
    return ", ".join(f"{name} {asked[name]}" for name in names)


def _named(resource: str) -> str:
    return "main memory" if resource == HOST else resource
