"""What engines took in earlier loads: it replaces the estimate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from xandrouting.core.model import Figure, LoadOptions

MAX_FIGURES: Final = 10_000

_NEW_SECONDS: Final = 0.3  # what one more load weighs in the mean
_RISE: Final = 1.01  # less is not worth a write


class FigureKey(NamedTuple):
    """What two loads must have in common to take the same.

    `learned_as` names the file and the engine's version, `device` is resolved as in
    ModelKey, `placement_cards` counts the accelerators the engine is spread over.
    """

    learned_as: str
    device: str
    placement_cards: int
    options: LoadOptions


class Figures:
    """Figures of earlier loads; the ones unused for longest leave when there are too many.

    Nothing is kept for an empty `learned_as`.
    """

    def __init__(self, items: Iterable[tuple[FigureKey, Figure]] = ()) -> None:
        """Begin with `items`, the one used last at the end."""
        self._figures: dict[FigureKey, Figure] = {}  # the one used last at the end
        self._load_s: dict[tuple[str, str], float] = {}
        for key, figure in items:
            self._keep(key, figure)
            self._keep_load_s(key, figure.load_s)

    def items(self) -> list[tuple[FigureKey, Figure]]:
        """Return all of them, the one used last at the end."""
        return list(self._figures.items())

    def find(
        self, learned_as: str, device: str, placement_cards: int, options: LoadOptions
    ) -> Figure | None:
        """Return what just such an engine takes; None: there was none yet."""
        key = FigureKey(learned_as, device, placement_cards, options)
        figure = self._figures.get(key)
        if figure is not None:
            self._keep(key, figure)
        return figure

    def load_s(self, learned_as: str, device: str) -> float | None:
        """Return the seconds of this file's last load on `device`, whatever its options."""
        return self._load_s.get((learned_as, device))

    def note(
        self,
        learned_as: str,
        device: str,
        placement_cards: int,
        options: LoadOptions,
        figure: Figure,
    ) -> Figure:
        """Take one load's figure into account and return what is kept now.

        More bytes count at once. Fewer bring what is kept down by a tenth at most, so that
        neither one load that took little nor one that took much is believed for ever.
        """
        if not learned_as:
            return figure
        key = FigureKey(learned_as, device, placement_cards, options)
        before = self._figures.get(key)
        kept = figure if before is None else _merged(before, figure)
        self._keep(key, kept)
        self._keep_load_s(key, figure.load_s)
        return kept

    def grow(
        self,
        learned_as: str,
        device: str,
        placement_cards: int,
        options: LoadOptions,
        *,
        host_bytes: int,
        device_bytes: int,
    ) -> bool:
        """Raise the bytes to what a running engine was seen to take.

        Returns whether anything changed: a rise of 1 % or less is left out, so that an
        engine that grows page by page is not written down page by page. An engine whose
        load was never noted has nothing to raise.
        """
        key = FigureKey(learned_as, device, placement_cards, options)
        before = self._figures.get(key)
        if before is None:
            return False
        grown = Figure(
            host_bytes=_risen(before.host_bytes, host_bytes),
            device_bytes=_risen(before.device_bytes, device_bytes),
            load_s=before.load_s,
        )
        self._keep(key, grown)
        return grown != before

    def _keep(self, key: FigureKey, figure: Figure) -> None:
        self._figures.pop(key, None)
        self._figures[key] = figure
        if len(self._figures) > MAX_FIGURES:
            del self._figures[next(iter(self._figures))]

    def _keep_load_s(self, key: FigureKey, load_s: float) -> None:
        file = key.learned_as, key.device
        self._load_s.pop(file, None)
        self._load_s[file] = load_s
        if len(self._load_s) > MAX_FIGURES:
            del self._load_s[next(iter(self._load_s))]


def _merged(before: Figure, new: Figure) -> Figure:
    return Figure(
        host_bytes=max(new.host_bytes, before.host_bytes * 9 // 10),
        device_bytes=max(new.device_bytes, before.device_bytes * 9 // 10),
        load_s=before.load_s + _NEW_SECONDS * (new.load_s - before.load_s),
    )


def _risen(before: int, seen: int) -> int:
    return seen if seen > before * _RISE else before
