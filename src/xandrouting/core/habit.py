"""How a model is asked for, remembered over the lives of its engines."""

from __future__ import annotations

from dataclasses import dataclass

from xandrouting.core.eviction import decayed


@dataclass(slots=True)
class Habit:
    """How often and in what haste. Times are the scheduler's clock."""

    uses: float = 0.0  # decayed, as of `granted_at`
    granted_at: float | None = None  # the last time; None: never
    rests_since: float | None = None  # None: somebody uses it or waits for it, or nobody ever did
    pause_s: float | None = None  # its last rest until it was asked for again; None: none yet

    def asked(self, now: float) -> None:
        """Somebody wants it, whether or not an engine is there."""
        if self.rests_since is not None:
            self.pause_s = now - self.rests_since
            self.rests_since = None

    def granted(self, now: float) -> None:
        """Somebody has it."""
        self.uses = self.uses_at(now) + 1.0
        self.granted_at = now

    def rests(self, now: float) -> None:
        """Nobody has it any more."""
        self.rests_since = now

    def uses_at(self, now: float) -> float:
        """How often it was asked for, older uses counting less."""
        return 0.0 if self.granted_at is None else decayed(self.uses, now - self.granted_at)

    def comes_back_within(self, seconds: float) -> bool:
        """Whether it was asked for again so soon the last time; not, if never."""
        return self.pause_s is not None and self.pause_s <= seconds
