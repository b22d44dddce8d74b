"""After a failed start, a pause: so that a broken model is not started over and over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from xandrouting.core.cover import fill
from xandrouting.core.errors import GatewayError, InvalidRequest
from xandrouting.core.model import EngineSpec, LoadOptions, ModelKey

MAX_DOUBLINGS: Final = 64  # 2.0**1024 is an OverflowError, after a day of failures


@dataclass(frozen=True, slots=True)
class _Failure:
    error: GatewayError
    revision: str
    count: int
    until: float | None  # None: for as long as the file stays the same


class Backoffs:
    """What failed to start, and until when nobody tries it again.

    A failure is held against the same file with the same options only: an impossible
    context that one client asked for does not keep the others from the model. Options that the
    engine refuses are not tried again: a running engine would have to end for each try.
    """

    def __init__(self, *, first_s: float, max_s: float) -> None:
        self._first_s = first_s
        self._max_s = max_s
        self._failures: dict[tuple[ModelKey, LoadOptions], _Failure] = {}
        self._last: dict[str, _Failure] = {}  # by model; gone when a later start succeeds

    def note(
        self, key: ModelKey, options: LoadOptions, revision: str, error: GatewayError, now: float
    ) -> None:
        """Remember a failed start; each in a row doubles the pause, up to its limit."""
        before = self._failures.get((key, options))
        count = 1
        if before is not None and before.revision == revision:
            count = before.count + 1
        pause_s = min(self._first_s * 2.0 ** min(count - 1, MAX_DOUBLINGS), self._max_s)
        if isinstance(error, InvalidRequest):  # the options are at fault, and will be again
            self._failures[key, options] = _Failure(error, revision, count, until=None)
            return
        failure = _Failure(error, revision, count, now + pause_s)
        self._failures[key, options] = self._last[key.model] = failure

    def clear(self, key: ModelKey, options: LoadOptions) -> None:
        """Forget the failures of what has started after all."""
        self._failures.pop((key, options), None)
        self._last.pop(key.model, None)

    def refusal(self, spec: EngineSpec, now: float) -> GatewayError | None:
        """Return what to refuse a request with, if its engine failed a moment ago."""
        failure = self._failures.get((spec.key, fill(spec.wants, spec.defaults)))
        if failure is None or failure.revision != spec.revision:
            return None
        if failure.until is None:
            return failure.error.again()
        if now >= failure.until:
            return None
        return failure.error.again(retry_after_s=failure.until - now)

    def last(self, model: str, revision: str) -> GatewayError | None:
        """Return why the last start of this file failed; None: it did not."""
        failure = self._last.get(model)
        return failure.error if failure is not None and failure.revision == revision else None
