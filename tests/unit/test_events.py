"""The event bus: who hears what, who comes back, who is too slow."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from tests.fakes.loop import virtual_time
from xandrouting.telemetry.events import (
    QUEUE_EVENTS,
    RING_EVENTS,
    TOPICS,
    Event,
    EventBus,
    Subscription,
)


class Rooms:
    """A state that events change: the last value told for each model."""

    def __init__(self) -> None:
        self.models: dict[str, int] = {}
        self.looks = 0
        self.broken = False
        self.bus = EventBus(self.snapshot)

    def snapshot(self) -> Mapping[str, Any]:
        self.looks += 1
        if self.broken:
            raise ZeroDivisionError
        return dict(self.models)

    def change(self, model: str, value: int) -> None:
        self.models[model] = value
        self.bus.publish("model", "model", {model: value})

    def tell(self, topic: str, *values: int) -> None:
        for value in values:
            self.bus.publish(topic, topic, {"n": value})


async def read(subscription: Subscription) -> list[Event]:
    """Return all it has to say now; fails if there is no end to it."""
    events: list[Event] = []
    try:
        async with asyncio.timeout(1.0):
            async for event in subscription:
                events.append(event)  # noqa: PERF401 - what came before the timeout counts
    except TimeoutError:
        pass
    return events


def told(events: list[Event]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(event.kind, event.data) for event in events]


def numbers(events: list[Event]) -> list[int]:
    return [event.data["n"] for event in events]


@virtual_time
async def test_snapshot_first_then_what_happens() -> None:
    rooms = Rooms()
    rooms.change("a", 1)
    with rooms.bus.subscribe(None, None) as subscription:
        rooms.change("a", 2)
        rooms.bus.publish("request", "request_done", {"id": "r1"})
        events = await read(subscription)
    assert events == [
        Event(f"{rooms.bus.epoch}-1", "snapshot", "snapshot", {"a": 1}),
        Event(f"{rooms.bus.epoch}-2", "model", "model", {"a": 2}),
        Event(f"{rooms.bus.epoch}-3", "request", "request_done", {"id": "r1"}),
    ]


@virtual_time
async def test_who_waits_is_woken() -> None:
    rooms = Rooms()
    with rooms.bus.subscribe(frozenset(("gauge",)), None) as subscription:
        await read(subscription)
        waiting = asyncio.create_task(anext(subscription))
        await asyncio.sleep(5.0)
        assert not waiting.done()
        rooms.tell("gauge", 7)
        assert (await waiting).data == {"n": 7}
        assert asyncio.get_running_loop().time() == pytest.approx(1.0 + 5.0)


@virtual_time
async def test_a_cancelled_wait_loses_nothing() -> None:
    rooms = Rooms()
    with rooms.bus.subscribe(None, None) as subscription:
        await read(subscription)
        waiting = asyncio.create_task(anext(subscription))
        await asyncio.sleep(1.0)
        rooms.tell("notice", 1)
        waiting.cancel()  # woken and cancelled in the same turn
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert numbers(await read(subscription)) == [1]


@pytest.mark.parametrize(
    ("topics", "heard"),
    [
        (None, TOPICS - {"log"}),
        (frozenset(("log",)), {"log"}),
        (frozenset(("model", "gauge")), {"model", "gauge"}),
        (TOPICS, TOPICS),
    ],
)
@virtual_time
async def test_topics(topics: frozenset[str] | None, heard: frozenset[str]) -> None:
    rooms = Rooms()
    before = rooms.bus.snapshot().id
    with rooms.bus.subscribe(topics, None) as subscription:
        for topic in TOPICS:
            rooms.tell(topic, 1)
        first, *live = await read(subscription)
        assert first.kind == "snapshot"
        assert {event.topic for event in live} == heard
    with rooms.bus.subscribe(topics, before) as subscription:
        # What is missed is chosen the same way, but for the log, which is kept elsewhere.
        missed = [event for event in live if event.topic != "log"]
        assert await read(subscription) == missed


@virtual_time
async def test_the_log_pushes_nothing_out_of_what_is_kept() -> None:
    rooms = Rooms()
    rooms.tell("notice", 1)
    for _ in range(RING_EVENTS + 1):
        rooms.tell("log", 2)
    with rooms.bus.subscribe(TOPICS, f"{rooms.bus.epoch}-0") as subscription:
        assert numbers(await read(subscription)) == [1]
    assert rooms.looks == 0


def test_a_topic_nobody_knows_is_a_bug() -> None:
    with pytest.raises(ValueError, match="gague"):
        Rooms().tell("gague", 1)


@virtual_time
async def test_each_subscriber_has_its_own_place() -> None:
    rooms = Rooms()
    with rooms.bus.subscribe(None, None) as one:
        rooms.tell("notice", 1)
        with rooms.bus.subscribe(None, None) as other:
            rooms.tell("notice", 2)
            assert numbers((await read(one))[1:]) == [1, 2]
            assert numbers((await read(other))[1:]) == [2]
            assert rooms.bus.subscribers == 2
        assert rooms.bus.subscribers == 1
    assert rooms.bus.subscribers == 0


# Coming back.


@virtual_time
async def test_who_comes_back_gets_what_it_missed_and_then_what_happens() -> None:
    rooms = Rooms()
    rooms.tell("notice", 1, 2, 3)
    with rooms.bus.subscribe(None, f"{rooms.bus.epoch}-1") as subscription:
        rooms.tell("notice", 4)
        assert numbers(await read(subscription)) == [2, 3, 4]
    assert rooms.looks == 0


@virtual_time
async def test_who_missed_nothing_gets_nothing() -> None:
    rooms = Rooms()
    rooms.tell("notice", 1)
    with rooms.bus.subscribe(None, f"{rooms.bus.epoch}-1") as subscription:
        assert await read(subscription) == []


@pytest.mark.parametrize("published", [0, 5])
@virtual_time
async def test_a_snapshot_s_id_is_a_place_to_come_back_to(published: int) -> None:
    rooms = Rooms()
    rooms.tell("notice", *range(published))
    with rooms.bus.subscribe(None, None) as subscription:
        [snapshot] = await read(subscription)
    rooms.tell("notice", 10, 11)
    with rooms.bus.subscribe(None, snapshot.id) as subscription:
        assert numbers(await read(subscription)) == [10, 11]


@virtual_time
async def test_the_ring_holds_the_last_thousand() -> None:
    rooms = Rooms()
    last = RING_EVENTS + 10
    rooms.tell("notice", *range(1, last + 1))
    with rooms.bus.subscribe(None, f"{rooms.bus.epoch}-10") as subscription:
        rooms.tell("notice", last + 1)  # so much missed is no reason to lose any of it
        assert numbers(await read(subscription)) == list(range(11, last + 2))
    with rooms.bus.subscribe(None, f"{rooms.bus.epoch}-10") as subscription:
        [event] = await read(subscription)  # one more has been told since
        assert event.kind == "snapshot"


@pytest.mark.parametrize(
    "last_id",
    [
        *("", "-", "1", "other-1", " {epoch}-1", "\x00", "{epoch}", "{epoch}-", "{epoch}-4"),
        *("{epoch}--1", "{epoch}-01", "{epoch}-٣", "{epoch}-" + "9" * 5000),
    ],
)
@virtual_time
async def test_an_id_that_is_none_of_ours_gets_a_snapshot(last_id: str) -> None:
    rooms = Rooms()
    rooms.tell("notice", 1, 2, 3)
    last_id = last_id.replace("{epoch}", rooms.bus.epoch)
    with rooms.bus.subscribe(None, last_id) as subscription:
        assert [event.kind for event in await read(subscription)] == ["snapshot"]


def test_another_process_is_another_epoch() -> None:
    assert Rooms().bus.epoch != Rooms().bus.epoch


# Too slow.


@virtual_time
async def test_the_oldest_gauges_and_logs_go_first() -> None:
    rooms = Rooms()
    with rooms.bus.subscribe(TOPICS, None) as subscription:
        await read(subscription)
        rooms.tell("gauge", 1)
        rooms.tell("download", 2)
        rooms.tell("log", 3)
        rooms.tell("gauge", 4)
        rooms.tell("model", *range(5, QUEUE_EVENTS + 1))
        rooms.tell("notice", QUEUE_EVENTS + 1)
        rooms.tell("request", QUEUE_EVENTS + 2)
        heard = await read(subscription)
    assert numbers(heard) == [2, *range(4, QUEUE_EVENTS + 3)]


@pytest.mark.parametrize("topic", ["gauge", "log"])
@virtual_time
async def test_a_gauge_or_log_pushes_nothing_else_out(topic: str) -> None:
    rooms = Rooms()
    with rooms.bus.subscribe(TOPICS, None) as subscription:
        await read(subscription)
        rooms.tell("model", *range(QUEUE_EVENTS))
        rooms.tell(topic, -1)
        assert numbers(await read(subscription)) == list(range(QUEUE_EVENTS))
        rooms.tell(topic, *range(QUEUE_EVENTS + 5))
        assert numbers(await read(subscription)) == list(range(5, QUEUE_EVENTS + 5))
    assert rooms.looks == 1


@pytest.mark.parametrize("topic", ["model", "request", "download", "notice"])
@virtual_time
async def test_one_more_than_fits_makes_a_snapshot_of_all(topic: str) -> None:
    rooms = Rooms()
    with rooms.bus.subscribe(None, None) as subscription:
        rooms.tell("model", *range(QUEUE_EVENTS))
        rooms.tell(topic, 1)
        rooms.change("a", 2)
        assert rooms.looks == 1  # only when it is read: it is to be the newest there is
        assert told(await read(subscription)) == [("snapshot", {"a": 2})]
        rooms.change("a", 3)
        assert told(await read(subscription)) == [("model", {"a": 3})]


@virtual_time
async def test_who_never_reads_costs_no_snapshots() -> None:
    rooms = Rooms()
    with rooms.bus.subscribe(None, None):
        for value in range(10 * QUEUE_EVENTS):
            rooms.change("a", value)
        assert rooms.looks == 1


@virtual_time
async def test_too_slow_after_coming_back() -> None:
    rooms = Rooms()
    rooms.tell("notice", *range(500))
    with rooms.bus.subscribe(None, f"{rooms.bus.epoch}-0") as subscription:
        for value in range(QUEUE_EVENTS + 1):
            rooms.change("a", value)
        assert told(await read(subscription)) == [("snapshot", {"a": QUEUE_EVENTS})]


@virtual_time
async def test_the_snapshot_s_failure_is_the_slow_reader_s_own() -> None:
    rooms = Rooms()
    with rooms.bus.subscribe(None, None) as slow, rooms.bus.subscribe(None, None) as quick:
        await read(quick)
        rooms.broken = True
        for value in range(QUEUE_EVENTS + 1):
            rooms.tell("model", value)
            assert (await anext(quick)).data == {"n": value}
        with pytest.raises(ZeroDivisionError):
            await anext(slow)


@pytest.mark.parametrize("pause", [1, 7, 100, 300, 1200])
@virtual_time
async def test_what_a_reader_knows_is_what_is(pause: int) -> None:
    """However slowly it reads and how often it comes back: applied, events give the state."""
    rooms, known, last_id = Rooms(), dict[str, int](), None
    value = 0
    for _ in range(6):
        with rooms.bus.subscribe(frozenset(("model",)), last_id) as subscription:
            for _ in range(3):
                for _ in range(pause):
                    value += 1
                    rooms.change(f"m{value % 11}", value)
                    rooms.tell("gauge", value)
                for event in await read(subscription):
                    if event.kind == "snapshot":
                        known.clear()
                    known.update(event.data)
                    last_id = event.id
                assert known == rooms.models
        for _ in range(pause):  # while it is away
            value += 1
            rooms.change(f"m{value % 11}", value)


# The end.


@virtual_time
async def test_close_ends_all_after_what_is_unread_and_a_bye() -> None:
    rooms = Rooms()
    with rooms.bus.subscribe(None, None) as one, rooms.bus.subscribe(frozenset(), None) as other:
        waiting = asyncio.create_task(read(other))
        await asyncio.sleep(0)
        rooms.tell("notice", 1)
        rooms.bus.close()
        rooms.tell("notice", 2)
        assert rooms.bus.subscribers == 0
        assert [event.kind for event in await read(one)] == ["snapshot", "notice", "bye"]
        bye = Event(f"{rooms.bus.epoch}-1", "bye", "bye", {})
        assert (await waiting)[1:] == [bye]
        assert await read(one) == await read(other) == []
    assert asyncio.get_running_loop().time() == 0.0  # all had ended by themselves


@virtual_time
async def test_a_full_queue_has_room_for_the_bye() -> None:
    rooms = Rooms()
    with rooms.bus.subscribe(None, None) as subscription:
        rooms.tell("model", *range(QUEUE_EVENTS))
        rooms.bus.close()
        kinds = [event.kind for event in await read(subscription)]
    assert kinds == ["snapshot", *["model"] * QUEUE_EVENTS, "bye"]


@virtual_time
async def test_who_comes_after_the_end_gets_a_bye() -> None:
    rooms = Rooms()
    rooms.tell("notice", 1)
    rooms.bus.close()
    with rooms.bus.subscribe(None, f"{rooms.bus.epoch}-0") as subscription:
        rooms.tell("notice", 2)
        assert [event.kind for event in await read(subscription)] == ["bye"]
    assert (rooms.bus.subscribers, rooms.looks) == (0, 0)
    assert asyncio.get_running_loop().time() == 0.0


@pytest.mark.parametrize("behind", [False, True])
@virtual_time
async def test_closing_a_subscription_wakes_its_reader_with_nothing_more(behind: bool) -> None:
    rooms = Rooms()
    subscription = rooms.bus.subscribe(None, None)
    reading = asyncio.create_task(read(subscription))
    await asyncio.sleep(0.5)
    rooms.tell("notice", *range(QUEUE_EVENTS + behind))
    subscription.close()
    rooms.tell("notice", -1)
    assert [event.kind for event in await reading] == ["snapshot"]
    assert asyncio.get_running_loop().time() == 0.5
    assert rooms.bus.subscribers == 0
    subscription.close()  # once more changes nothing
