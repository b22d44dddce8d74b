"""Every failure has one HTTP face, and words a client can show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from tests.unit.scheduling import QWEN, QWEN_1, A, B, make_scheduler
from xandrouting.core.errors import (
    EngineRejected,
    EngineStartFailed,
    EngineUnloaded,
    GatewayError,
    InvalidRequest,
    QueueTimeout,
)
from xandrouting.core.events import Acquire, Effect, EngineExited, Refuse, Shutdown, Tick, Unload


def _family(error: type[GatewayError]) -> Iterator[type[GatewayError]]:
    yield error
    for child in error.__subclasses__():
        yield from _family(child)


FAMILY = sorted(set(_family(GatewayError)), key=lambda error: error.__name__)


@pytest.mark.parametrize("error", FAMILY)
def test_each_error_declares_its_own_face(error: type[GatewayError]) -> None:
    assert {"status", "error_type", "code"} <= vars(error).keys()
    assert 400 <= error.status <= 599
    assert error.error_type.endswith("_error")
    assert error.code == error.code.lower().strip()
    assert error.__doc__


def test_no_two_errors_share_a_code() -> None:
    shared = [code for code, n in Counter(e.code for e in FAMILY).items() if n > 1]
    assert shared == []


def test_an_error_is_its_message() -> None:
    error = InvalidRequest("ttl must be 0 or more.", param="ttl")
    assert str(error) == error.message == "ttl must be 0 or more."
    assert (error.param, error.details, error.detail, error.retry_after_s) == (
        "ttl",
        None,
        "",
        None,
    )


@pytest.mark.parametrize("error", FAMILY)
def test_again_keeps_everything_but_the_traceback(error: type[GatewayError]) -> None:
    first = error("qwen failed.")
    first.param, first.details, first.detail = "model", {"n": 1}, "last lines"
    first.retry_after_s = 0.0
    with pytest.raises(error):
        raise first
    second = first.again()
    assert type(second) is error
    assert second is not first
    assert vars(second) == vars(first)
    assert second.args == first.args
    assert second.__traceback__ is None


def test_again_keeps_what_a_subclass_added() -> None:
    said = {"message": "too many tokens", "n_ctx": 2048}
    second = EngineRejected("too many tokens", status=413, error=said).again()
    assert (second.status, second.error, second.message) == (413, said, "too many tokens")


def test_again_may_say_when() -> None:
    assert QueueTimeout("later").again(retry_after_s=3.0).retry_after_s == 3.0
    assert QueueTimeout("later", retry_after_s=9.0).again(retry_after_s=0.0).retry_after_s == 0.0


def _refusals() -> dict[str, GatewayError]:
    """Every refusal the scheduler words itself, by code."""
    effects: list[Effect] = []

    scheduler = make_scheduler(max_queue=1)
    scheduler.handle(Acquire(A, QWEN, deadline=1.0), now=0.0)
    effects += scheduler.handle(Acquire(B, QWEN), now=0.0)
    effects += scheduler.handle(Tick(), now=1.0)

    scheduler = make_scheduler()
    scheduler.handle(Acquire(A, QWEN), now=0.0)
    effects += scheduler.handle(EngineExited(QWEN_1), now=1.0)

    scheduler = make_scheduler()
    scheduler.handle(Acquire(A, QWEN), now=0.0)
    effects += scheduler.handle(Unload(QWEN_1, force=True), now=1.0)
    scheduler.handle(Acquire(B, QWEN, deadline=2.0), now=1.0)
    effects += scheduler.handle(Tick(), now=2.0)

    scheduler = make_scheduler()
    scheduler.handle(Shutdown(), now=0.0)
    effects += scheduler.handle(Acquire(A, QWEN), now=0.0)

    errors = [effect.error for effect in effects if isinstance(effect, Refuse)]
    return {error.code: error for error in errors}


def test_the_scheduler_words_six_refusals() -> None:
    assert _refusals().keys() == {
        "queue_full",
        "loading_timeout",
        "engine_start_failed",
        "engine_unloaded",
        "queue_timeout",
        "shutting_down",
    }


@pytest.mark.parametrize("error", _refusals().values(), ids=lambda error: error.code)
def test_the_scheduler_s_words_can_be_shown(error: GatewayError) -> None:
    # The XandAI front end swallows messages with either word.
    assert "JSON" not in error.message
    assert "Unexpected" not in error.message
    assert error.message.endswith(".")
    assert QWEN.key.model in error.message or error.code == "shutting_down"
    # Waiting alone helps in all cases but these.
    waiting_helps = not isinstance(error, EngineStartFailed | EngineUnloaded)
    assert (error.retry_after_s is not None) is waiting_helps
