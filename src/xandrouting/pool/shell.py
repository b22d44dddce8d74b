"""What the lives of all engines share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from xandrouting.core.events import Event
from xandrouting.pool.engine import EngineNews
from xandrouting.pool.parking import Parking
from xandrouting.pool.preparing import Preparing
from xandrouting.pool.probe import Health
from xandrouting.pool.sleeping import Post
from xandrouting.pool.tasks import Tasks
from xandrouting.pool.watching import Watch


@dataclass(slots=True)
class Counts:
    """What became of engines, since the pool began."""

    loads: int = 0  # engines that became ready
    load_failures: int = 0
    evictions: int = 0


@dataclass(frozen=True, slots=True)
class Shell:
    """The pool, as one engine's life sees it. `parking` None: conversations end with engines."""

    dispatch: Callable[[Event], None]
    on_news: Callable[[EngineNews], None]
    watch: Watch
    preparing: Preparing
    tasks: Tasks
    parking: Parking | None
    health: Health
    post: Post
    load_stall_s: float
    counts: Counts = field(default_factory=Counts)
