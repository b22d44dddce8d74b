"""What loads took, kept for the next ones: in memory for the scheduler, on disk for a restart."""

from __future__ import annotations

from xandrouting.core.events import Start
from xandrouting.core.figures import FigureKey, Figures
from xandrouting.core.model import Figure, MemoryUse
from xandrouting.pool.figure_store import FigureStore


class Learning:
    """Notes what running engines are seen to take. Without a store it lasts as long as we do."""

    def __init__(self, figures: Figures, store: FigureStore | None = None) -> None:
        self._figures = figures
        self._store = store

    def see(self, start: Start, use: MemoryUse, load_s: float | None, again: bool) -> None:
        """Note what an engine takes: the first time with its load, then only if it is more."""
        spec = start.spec
        if use.host_bytes is None or load_s is None or not spec.learned_as:
            return
        key = FigureKey(spec.learned_as, spec.key.device, len(start.placement), start.options)
        device_bytes = use.device_bytes or 0
        if again:
            grown = self._figures.grow(*key, host_bytes=use.host_bytes, device_bytes=device_bytes)
            if not grown:
                return
        else:
            self._figures.note(*key, Figure(use.host_bytes, device_bytes, load_s))
        kept = self._figures.find(*key)
        if self._store is not None and kept is not None:
            self._store.save(*key, kept)
