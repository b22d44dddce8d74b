"""One engine's life, as a table.

An engine lives once. Loading its model again makes a new engine with the next incarnation
number, so late news of the old one is never taken for news of the new one.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class InvalidTransition(Exception):
    """An event that cannot happen in this state did: a bug of ours, never a client's doing."""


class EngineState(StrEnum):
    """What is true of an engine."""

    STARTING = "starting"  # launched or being placed; the health probe has not passed yet
    READY = "ready"  # takes new leases
    SUSPENDING = "suspending"  # told to give its memory back, which still counts; takes no lease
    SLEEPING = "sleeping"  # its process waits, its model is not where it is worked with
    DRAINING = "draining"  # takes no new lease; the leases it has run to their end
    STOPPING = "stopping"  # told to exit; its memory still counts
    STOPPED = "stopped"  # exited and reaped; its memory is free again


class EngineEvent(StrEnum):
    """What happens to an engine."""

    READY = "ready"  # the health probe passed
    SLEEP = "sleep"  # it is told to give its memory back, or more of it
    SLEPT = "slept"  # it has
    WAKE = "wake"  # it is told to load again
    DRAIN = "drain"  # it shall leave once its leases have ended
    STOP = "stop"  # it is told to exit
    EXITED = "exited"  # its process tree is gone and reaped


S, E = EngineState, EngineEvent

TRANSITIONS: Final[dict[EngineState, dict[EngineEvent, EngineState]]] = {
    S.STARTING: {E.READY: S.READY, E.STOP: S.STOPPING, E.EXITED: S.STOPPED},
    S.READY: {
        E.SLEEP: S.SUSPENDING,
        E.DRAIN: S.DRAINING,
        E.STOP: S.STOPPING,
        E.EXITED: S.STOPPED,
    },
    S.SUSPENDING: {
        E.SLEEP: S.SUSPENDING,
        E.SLEPT: S.SLEEPING,
        E.STOP: S.STOPPING,
        E.EXITED: S.STOPPED,
    },
    S.SLEEPING: {
        E.SLEEP: S.SUSPENDING,
        E.WAKE: S.STARTING,
        E.STOP: S.STOPPING,
        E.EXITED: S.STOPPED,
    },
    S.DRAINING: {E.DRAIN: S.DRAINING, E.STOP: S.STOPPING, E.EXITED: S.STOPPED},
    # READY and SLEPT here are news that was on its way when the engine was told to stop.
    S.STOPPING: {
        E.READY: S.STOPPING,
        E.SLEPT: S.STOPPING,
        E.DRAIN: S.STOPPING,
        E.STOP: S.STOPPING,
        E.EXITED: S.STOPPED,
    },
    S.STOPPED: {},
}


def step(state: EngineState, event: EngineEvent) -> EngineState:
    """Return the state after `event`; raise InvalidTransition where the table has no entry."""
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise InvalidTransition(f"{event} while {state}") from None
