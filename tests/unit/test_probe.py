"""When an engine counts as ready, dead or stalled, on a clock that jumps."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any, cast

import pytest

from tests.fakes.launcher import READY_LINE, FakeHandle, FakeHealth, Memory
from tests.fakes.loop import virtual_time
from xandrouting.core.model import LaunchPlan, StartFailure
from xandrouting.net.client import Client, ConnectError, UpstreamError
from xandrouting.pool.probe import (
    ANSWER_S,
    MOVED_BYTES,
    POLL_MAX_S,
    Health,
    Illness,
    StartError,
    http_health,
    until_ill,
    until_ready,
)

WITH_LINE = LaunchPlan(ready_line=READY_LINE)
WITHOUT_LINE = LaunchPlan()
NOBODY = cast("Client", None)  # the fake health asks nobody

MIB = 1 << 20


def engine(plan: LaunchPlan = WITH_LINE, **life: Any) -> FakeHandle:
    return FakeHandle("qwen#1", plan, [], **life)


async def probe(
    handle: FakeHandle,
    health: Health | None = None,
    *,
    stall_s: float = 30.0,
) -> float:
    """Return when the engine was found ready."""
    await until_ready(
        handle,
        handle.plan,
        NOBODY,
        stall_s=stall_s,
        health=health or FakeHealth(),
    )
    return now()


def now() -> float:
    return asyncio.get_running_loop().time()


def later(delay_s: float, call: Callable[..., object], *args: object) -> None:
    asyncio.get_running_loop().call_later(delay_s, call, *args)


# Ready.


@virtual_time
async def test_after_the_ready_line_it_is_asked_at_once() -> None:
    health = FakeHealth()
    assert await probe(engine(load_s=7.3), health) == pytest.approx(7.3)
    assert health.asked_at == [pytest.approx(7.3)]


@virtual_time
async def test_the_line_alone_is_not_ready() -> None:
    health = FakeHealth(from_s=9.0)
    assert 9.0 <= await probe(engine(load_s=7.3), health) <= 9.0 + POLL_MAX_S


@virtual_time
async def test_without_a_line_it_is_polled_ever_slower() -> None:
    health = FakeHealth(from_s=5.0)
    assert 5.0 <= await probe(engine(WITHOUT_LINE), health) <= 5.0 + POLL_MAX_S
    pauses = [round(b - a, 6) for a, b in pairwise(health.asked_at)]
    assert pauses[0] == pytest.approx(0.01)
    assert pauses[-1] == pytest.approx(POLL_MAX_S)
    assert pauses == sorted(pauses)


# Dead.


@pytest.mark.parametrize("plan", [WITH_LINE, WITHOUT_LINE])
@virtual_time
async def test_an_exit_is_noticed_at_once(plan: LaunchPlan) -> None:
    handle = engine(plan, load_s=3.3, exit_status=-9)
    with pytest.raises(StartError) as caught:
        await probe(handle, FakeHealth(from_s=float("inf")))
    assert (caught.value.failure, caught.value.status) == (None, -9)
    assert now() == pytest.approx(3.3)


@virtual_time
async def test_an_exit_after_the_line_is_noticed_at_once() -> None:
    handle = engine(load_s=3.0)
    later(5.0, handle.die, 1)
    with pytest.raises(StartError):
        await probe(handle, FakeHealth(from_s=float("inf")))
    assert now() == pytest.approx(5.0)


@virtual_time
async def test_a_line_and_an_exit_together_are_an_exit() -> None:
    handle = engine(load_s=3.0)
    later(3.0, handle.die, 1)
    with pytest.raises(StartError):
        await probe(handle)


@virtual_time
async def test_who_is_dead_already_is_not_asked() -> None:
    handle, health = engine(), FakeHealth()
    handle.die(1)
    with pytest.raises(StartError):
        await probe(handle, health)
    assert health.asked_at == []


# Stalled.


@pytest.mark.parametrize("plan", [WITH_LINE, WITHOUT_LINE])
@virtual_time
async def test_nothing_moves_for_too_long(plan: LaunchPlan) -> None:
    handle = engine(plan, load_s=float("inf"))
    with pytest.raises(StartError) as caught:
        await probe(handle, FakeHealth(from_s=float("inf")), stall_s=30.0)
    assert (caught.value.failure, caught.value.status) == (StartFailure.STALLED, None)
    assert 30.0 <= now() <= 31.0
    assert handle.exit_status is None  # the pool ends it


@virtual_time
async def test_a_ready_line_after_which_nobody_answers_is_a_stall_too() -> None:
    with pytest.raises(StartError):
        await probe(engine(load_s=10.0), FakeHealth(from_s=float("inf")), stall_s=30.0)
    assert 40.0 <= now() <= 41.0


@virtual_time
async def test_output_is_movement() -> None:
    handle = engine(load_s=float("inf"))
    for second in range(20, 100, 20):
        later(second, handle.say, "loading tensors")
    with pytest.raises(StartError):
        await probe(handle, stall_s=30.0)
    assert 110.0 <= now() <= 111.5


@pytest.mark.parametrize(
    ("memory", "ends"),
    [
        (lambda age_s: int(age_s) * MIB, None),
        (lambda age_s: 10_000 * MIB - int(age_s) * MIB, 31.0),  # shared with one more process
        (lambda age_s: 50 * MIB, 31.0),
        (lambda age_s: 50 * MIB + int(age_s), 31.0),  # a trickle
        (lambda age_s: int(min(age_s, 50.0)) * MIB, 80.0),
        (lambda age_s: None, 30.0),
    ],
)
@virtual_time
async def test_memory_that_moves_is_movement(memory: Memory, ends: float | None) -> None:
    handle = engine(load_s=300.0, memory=memory)
    if ends is None:
        assert await probe(handle, stall_s=30.0) == pytest.approx(300.0)
    else:
        with pytest.raises(StartError):
            await probe(handle, stall_s=30.0)
        assert ends <= now() <= ends + 1.0


@virtual_time
async def test_a_slow_trickle_moves_once_it_has_come_far_enough() -> None:
    per_second = MOVED_BYTES // 20
    handle = engine(load_s=300.0, memory=lambda age_s: int(age_s * per_second))
    assert await probe(handle, stall_s=30.0) == pytest.approx(300.0)


@virtual_time
async def test_memory_is_looked_at_once_a_second_at_most() -> None:
    handle = engine(WITHOUT_LINE)
    await probe(handle, FakeHealth(from_s=10.0))
    assert 8 <= handle.measured <= 10


@pytest.mark.parametrize("after_s", [0.0, 2.0, 6.0])
@virtual_time
async def test_a_cancelled_probe_leaves_no_task(after_s: float) -> None:
    probing = asyncio.create_task(
        probe(engine(load_s=5.0), FakeHealth(from_s=float("inf")), stall_s=100.0)
    )
    await asyncio.sleep(after_s)
    probing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probing


# Asking by HTTP.


class Asked:
    """Stands in for the client: one answer to every GET."""

    def __init__(self, answer: Callable[[], Awaitable[tuple[int, bytes]]]) -> None:
        self.paths: list[bytes] = []
        self._answer = answer

    async def get(self, path: bytes) -> tuple[int, bytes]:
        self.paths.append(path)
        return await self._answer()


async def ask(asked: Asked, plan: LaunchPlan = WITHOUT_LINE) -> bool:
    return await http_health(cast("Client", asked), plan)


@pytest.mark.parametrize(("status", "ready"), [(200, True), (503, False), (401, False)])
@virtual_time
async def test_only_200_is_ready(status: int, ready: bool) -> None:
    async def answer() -> tuple[int, bytes]:
        return status, b"ok"

    asked = Asked(answer)
    assert await ask(asked, LaunchPlan(health_path="/live")) is ready
    assert asked.paths == [b"/live"]


@pytest.mark.parametrize("error", [ConnectError("refused"), UpstreamError("cut", began=True)])
@virtual_time
async def test_who_does_not_answer_is_not_ready(error: Exception) -> None:
    async def answer() -> tuple[int, bytes]:
        raise error

    assert await ask(Asked(answer)) is False


@virtual_time
async def test_who_takes_too_long_to_answer_is_not_ready() -> None:
    async def answer() -> tuple[int, bytes]:
        await asyncio.sleep(1000.0)
        return 200, b""

    assert await ask(Asked(answer)) is False
    assert now() == pytest.approx(ANSWER_S)


@virtual_time
async def test_without_an_address_to_ask_it_is_ready() -> None:
    assert await http_health(NOBODY, LaunchPlan(health_path="")) is True


@virtual_time
async def test_an_engine_that_takes_questions_and_never_answers_stalls() -> None:
    async def answer() -> tuple[int, bytes]:
        await asyncio.Event().wait()
        raise AssertionError

    handle = engine(load_s=1.0)
    client = cast("Client", Asked(answer))
    with pytest.raises(StartError) as caught:
        await until_ready(handle, WITH_LINE, client, stall_s=30.0, health=http_health)
    assert caught.value.failure is StartFailure.STALLED
    assert 30.0 <= now() <= 31.0 + ANSWER_S + POLL_MAX_S


# Ill.


class Answers:
    """A client whose GETs are answered with these in turn; the last one for ever."""

    def __init__(self, *answers: int | Exception) -> None:
        self._answers = list(answers)

    async def get(self, path: bytes) -> tuple[int, bytes]:
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer, b""


def refused() -> ConnectError:
    error = ConnectError("connection refused")
    error.__cause__ = ConnectionRefusedError()
    return error


WATCHED = LaunchPlan(health_every_s=0.5)
SILENT = UpstreamError("cut", began=False)


@pytest.mark.parametrize(
    ("answers", "illness", "at_s"),
    [
        ((200, 200, 503), Illness.SICK, 1.5),
        ((200, refused(), refused()), Illness.DEAF, 1.5),
        ((refused(), 200, refused(), refused()), Illness.DEAF, 2.0),  # one refusal is nothing
        ((ConnectError("slow"), SILENT, TimeoutError(), 404, 500), Illness.SICK, 2.5),
    ],
)
@virtual_time
async def test_what_makes_an_engine_ill(
    answers: tuple[int | Exception, ...], illness: Illness, at_s: float
) -> None:
    found = await until_ill(cast("Client", Answers(*answers)), WATCHED)
    assert found is illness
    assert now() == pytest.approx(at_s)


@pytest.mark.parametrize("plan", [LaunchPlan(), WATCHED])
@virtual_time
async def test_a_healthy_engine_is_never_ill(plan: LaunchPlan) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(3600):
            await until_ill(cast("Client", Answers(200)), plan)
