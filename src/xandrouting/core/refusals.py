"""What the scheduler tells those it has no engine for."""

from __future__ import annotations

from xandrouting.core.errors import (
    EngineStartFailed,
    EngineUnloaded,
    GatewayError,
    LoadingTimeout,
    QueueFull,
    QueueTimeout,
    ShuttingDown,
)
from xandrouting.core.model import ModelKey


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
