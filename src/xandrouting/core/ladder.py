"""How deep an idle engine sleeps: chosen by what each level costs, as far as it was seen.

Offloaded where main memory has room for the weights, else dropped where waking beats a cold
start by enough; else it stays awake until its TTL. A level that did not do what it promised
is not tried again for the same file. What is known lasts as long as the gateway lives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from xandrouting.core.model import EngineSpec, Level, ModelKey

WORTH: Final = 0.5  # of a cold start: a sleeper's process takes memory, so waking must save that
# Until it was measured, as vLLM's authors publish it for 1.2 GB on an A100: 0.26 s and 0.85 s.
GUESSED_WAKE_S: Final = 0.1
GUESSED_BYTES_PER_S: Final = {Level.OFFLOADED: 5e9, Level.DROPPED: 1.5e9}


@dataclass(frozen=True, slots=True)
class Rung:
    """One level, for one model. `measured`: its engine has slept so and woken again before.

    `takes_bytes` of main memory more than the engine has awake; `sleep_s` None: not seen yet.
    """

    level: Level
    takes_bytes: int
    wake_s: float
    measured: bool
    sleep_s: float | None = None

    def is_worth(self, cold_s: float) -> bool:
        """Whether it beats ending the engine, for the next request and one that comes too soon."""
        return self.wake_s <= WORTH * cold_s and (self.sleep_s or 0.0) + self.wake_s <= cold_s


@dataclass(slots=True)
class _Seen:
    sleep_s: float | None = None
    wake_s: float | None = None
    grown_bytes: int = 0
    failed: bool = False


class Ladder:
    """What each level took, by model."""

    def __init__(self) -> None:
        self._seen: dict[tuple[ModelKey, str, Level], _Seen] = {}

    def next(
        self,
        spec: EngineSpec,
        current: Level | None,
        *,
        weights_bytes: int,
        host_free_bytes: int | None,
        cold_s: float,
    ) -> Rung | None:
        """Return how an engine shall sleep that is awake, or sleeps at `current`; None: as it does.

        `host_free_bytes` None: main memory has no limit.
        """
        for level in spec.levels:
            if (current is not None and level <= current) or self._of(spec, level).failed:
                continue
            rung = self.rung(spec, level, weights_bytes)
            fits = host_free_bytes is None or rung.takes_bytes <= host_free_bytes
            if level is Level.REST or (fits and rung.is_worth(cold_s)):
                return rung
        return None

    def rung(self, spec: EngineSpec, level: Level, weights_bytes: int) -> Rung:
        """Return what a level costs: as seen before, else as estimated."""
        seen = self._of(spec, level)
        takes_bytes = max(weights_bytes, seen.grown_bytes) if level is Level.OFFLOADED else 0
        if seen.wake_s is not None:
            return Rung(level, takes_bytes, seen.wake_s, True, seen.sleep_s)
        guessed_s = GUESSED_WAKE_S
        if level is not Level.REST:
            guessed_s += weights_bytes / GUESSED_BYTES_PER_S[level]
        return Rung(level, takes_bytes, guessed_s, False, seen.sleep_s)

    def note_slept(
        self, spec: EngineSpec, level: Level, *, sleep_s: float, grown_bytes: int
    ) -> None:
        """Note that a level was reached, and by how much the engine's main memory grew."""
        seen = self._note(spec, level)
        seen.sleep_s, seen.grown_bytes = sleep_s, max(0, grown_bytes)

    def note_woken(self, spec: EngineSpec, level: Level, *, wake_s: float) -> None:
        """Note how long it took to wake from it."""
        self._note(spec, level).wake_s = wake_s

    def note_failed(self, spec: EngineSpec, level: Level) -> None:
        """Note that the level freed nothing, or that it does not wake from it."""
        self._note(spec, level).failed = True

    def _of(self, spec: EngineSpec, level: Level) -> _Seen:
        return self._seen.get((spec.key, spec.revision, level), _Seen())

    def _note(self, spec: EngineSpec, level: Level) -> _Seen:
        return self._seen.setdefault((spec.key, spec.revision, level), _Seen())
