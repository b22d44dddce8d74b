"""What happens, told as it happens to whoever asked for it."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from xandrouting.telemetry.reader import Reader

TOPICS: Final = frozenset(("model", "request", "download", "gauge", "notice", "log"))
UNASKED: Final = TOPICS - {"log"}  # what a subscriber gets that names no topics
RING_EVENTS: Final = 1000
QUEUE_EVENTS: Final = 256

# What a slow subscriber can do without: the next gauge replaces the last, logs are kept elsewhere.
_DISPENSABLE: Final = frozenset(("gauge", "log"))
# Who comes back does not get these: one load's lines would push all else out of the ring.
_UNKEPT: Final = frozenset(("log",))


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. A `snapshot` and a `bye` have their kind for a topic."""

    id: str
    topic: str
    kind: str
    data: Mapping[str, Any]


class EventBus:
    """Passes events on to subscribers, and keeps the last of them for those who come back.

    Of one loop: every call must come from it. `snapshot` returns the whole state that
    events change; it is called while a subscriber is let in, so it may not wait, and in a
    subscriber's own task, so its failure is that subscriber's alone.
    """

    def __init__(self, snapshot: Callable[[], Mapping[str, Any]]) -> None:
        self.epoch = secrets.token_hex(4)  # ids of another process mean nothing here
        self._snapshot = snapshot
        self._number = 0  # of the last event
        self._ring: deque[Event] = deque(maxlen=RING_EVENTS)
        self._subscriptions: set[Subscription] = set()
        self._closed = False

    @property
    def subscribers(self) -> int:
        """How many listen now."""
        return len(self._subscriptions)

    def publish(self, topic: str, kind: str, data: Mapping[str, Any]) -> None:
        """Tell everybody who asked for `topic`; `data` may not change afterwards.

        It never waits and never fails because of a subscriber.
        """
        if topic not in TOPICS:
            raise ValueError(f"no such topic: {topic}")
        if topic in _UNKEPT:
            event = Event(self._id(self._number), topic, kind, data)
        else:
            self._number += 1
            event = Event(self._id(self._number), topic, kind, data)
            self._ring.append(event)
        for subscription in self._subscriptions:
            subscription.offer(event)

    def subscribe(self, topics: frozenset[str] | None, last_id: str | None) -> Subscription:
        """Listen from now on; end it by using it as a context. `topics` None: all but `log`.

        Who was here until `last_id` gets what it missed, if that is all still known; else a
        `snapshot` comes first. After `close` there is only the `bye`.
        """
        wanted = UNASKED if topics is None else topics
        if self._closed:
            subscription = Subscription(self, wanted, ())
            subscription.end(self._now("bye", {}))
            return subscription
        missed = self._since(last_id)
        if missed is None:
            first = [self.snapshot()]
        else:
            first = [event for event in missed if event.topic in wanted]
        subscription = Subscription(self, wanted, first)
        self._subscriptions.add(subscription)
        return subscription

    def snapshot(self) -> Event:
        """Return the state as it is now; who comes back with its id missed what came after."""
        return self._now("snapshot", self._snapshot())

    def forget(self, subscription: Subscription) -> None:
        """Tell this subscription nothing more."""
        self._subscriptions.discard(subscription)

    def close(self) -> None:
        """End every subscription after what it has still to read and a last `bye`."""
        self._closed = True
        bye = self._now("bye", {})
        for subscription in self._subscriptions:
            subscription.end(bye)
        self._subscriptions.clear()

    def _since(self, last_id: str | None) -> list[Event] | None:
        """Return the events after `last_id`; None if that is not known."""
        oldest = self._number - len(self._ring)  # it is not in the ring, all after it are
        # A client may send anything: compare with the ids there are rather than take it apart.
        ids = [self._id(number) for number in range(oldest, self._number + 1)]
        return list(self._ring)[ids.index(last_id) :] if last_id in ids else None

    def _now(self, kind: str, data: Mapping[str, Any]) -> Event:
        # With the last event's id, not one of its own: other subscribers never see this one.
        return Event(self._id(self._number), kind, kind, data)

    def _id(self, number: int) -> str:
        return f"{self.epoch}-{number}"


class Subscription(Reader[Event]):
    """One subscriber's events.

    Who reads too slowly, with `QUEUE_EVENTS` behind, loses the oldest gauges and logs first.
    With none of those left it loses all it has not read, and its next event is a `snapshot`.
    """

    def __init__(self, bus: EventBus, topics: frozenset[str], first: Iterable[Event]) -> None:
        super().__init__()
        self._bus = bus
        self._topics = topics
        self._first = deque(first)  # before the queue, and not of its size: it is known to end
        self._queue: deque[Event] = deque()
        self._behind = False  # nothing is queued, because the snapshot to come will hold it

    def close(self) -> None:
        """End the iteration at once, whatever is still unread."""
        self._bus.forget(self)
        self._first.clear()
        self._queue.clear()
        self._behind = False
        self._ended = True
        self._news.set()

    def offer(self, event: Event) -> None:
        """Take an event of the bus."""
        if event.topic not in self._topics or self._behind:
            return
        if len(self._queue) >= QUEUE_EVENTS and not self._drop_one():
            if event.topic in _DISPENSABLE:
                return
            # The snapshot is made when it is read: it is newest then, whoever published has
            # no part in it, and who never reads again costs nothing.
            self._first.clear()
            self._queue.clear()
            self._behind = True
        else:
            self._queue.append(event)
        self._news.set()

    def end(self, bye: Event) -> None:
        """Take the last event of the bus."""
        self._queue.append(bye)
        self._ended = True
        self._news.set()

    def _next(self) -> Event | None:
        if self._first:
            return self._first.popleft()
        if self._behind:
            self._behind = False
            return self._bus.snapshot()
        return self._queue.popleft() if self._queue else None

    def _drop_one(self) -> bool:
        """Make room by the oldest event one can do without; False if there is none."""
        for place, event in enumerate(self._queue):
            if event.topic in _DISPENSABLE:
                del self._queue[place]
                return True
        return False
