"""Which cores an engine is bound to, so that no two have the same ones."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise


def usable_cores() -> frozenset[int]:
    """Return the cores that this process, and so an engine it starts, may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def cores_for(usable: Collection[int], taken: Sequence[Collection[int]]) -> tuple[int, ...]:
    """Choose cores for an engine that starts beside those that have `taken` theirs.

    Those that nobody has; else the half, rounded up, that the fewest have. If an engine has
    exactly these, the next best half, and at last all. So up to four engines have four
    different sets on three cores or more. Two cores have three sets, one has one: with more
    engines than sets some share one.
    """
    load = Counter(core for cores in taken for core in cores)
    ranked = sorted(usable, key=lambda core: (load[core], core))
    free = [core for core in ranked if not load[core]]
    if free:
        return tuple(free)
    size = (len(ranked) + 1) // 2
    around = ranked + ranked
    halves = [tuple(sorted(around[first : first + size])) for first in range(len(ranked))]
    theirs = {frozenset(cores) for cores in taken}
    choices = [*halves, tuple(sorted(usable))]
    return next((cores for cores in choices if frozenset(cores) not in theirs), halves[0])


def as_list(cores: Iterable[int]) -> str:
    """Write cores as the kernel and vLLM do: `0-3,6`."""
    ordered = sorted(cores)
    starts = [core for before, core in pairwise([-2, *ordered]) if core != before + 1]
    ends = [core for core, after in pairwise([*ordered, -2]) if after != core + 1]
    pairs = zip(starts, ends, strict=True)
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in pairs)
