"""The table of an engine's life, line by line."""

from __future__ import annotations

from itertools import product

import pytest

from xandrouting.core.engine_state import EngineEvent as E
from xandrouting.core.engine_state import EngineState as S
from xandrouting.core.engine_state import InvalidTransition, step

LISTED = {
    (S.STARTING, E.READY): S.READY,
    (S.STARTING, E.STOP): S.STOPPING,
    (S.STARTING, E.EXITED): S.STOPPED,
    (S.READY, E.SLEEP): S.SUSPENDING,
    (S.READY, E.DRAIN): S.DRAINING,
    (S.READY, E.STOP): S.STOPPING,
    (S.READY, E.EXITED): S.STOPPED,
    (S.SUSPENDING, E.SLEEP): S.SUSPENDING,
    (S.SUSPENDING, E.SLEPT): S.SLEEPING,
    (S.SUSPENDING, E.STOP): S.STOPPING,
    (S.SUSPENDING, E.EXITED): S.STOPPED,
    (S.SLEEPING, E.SLEEP): S.SUSPENDING,
    (S.SLEEPING, E.WAKE): S.STARTING,
    (S.SLEEPING, E.STOP): S.STOPPING,
    (S.SLEEPING, E.EXITED): S.STOPPED,
    (S.DRAINING, E.DRAIN): S.DRAINING,
    (S.DRAINING, E.STOP): S.STOPPING,
    (S.DRAINING, E.EXITED): S.STOPPED,
    (S.STOPPING, E.READY): S.STOPPING,
    (S.STOPPING, E.SLEPT): S.STOPPING,
    (S.STOPPING, E.DRAIN): S.STOPPING,
    (S.STOPPING, E.STOP): S.STOPPING,
    (S.STOPPING, E.EXITED): S.STOPPED,
}


@pytest.mark.parametrize(("before", "event"), LISTED)
def test_what_is_listed_happens(before: S, event: E) -> None:
    assert step(before, event) is LISTED[before, event]


@pytest.mark.parametrize(("before", "event"), sorted(set(product(S, E)) - LISTED.keys()))
def test_what_is_not_listed_raises(before: S, event: E) -> None:
    with pytest.raises(InvalidTransition, match=f"^{event} while {before}$"):
        step(before, event)


def test_nothing_follows_the_end() -> None:
    assert not any(before is S.STOPPED for before, _ in LISTED)
    again = [before for before, after in LISTED.items() if after is S.STARTING]
    assert again == [(S.SLEEPING, E.WAKE)]
