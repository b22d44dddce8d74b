"""A thousand models on disk: the first look, one more, one after a restart, and a change."""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from bench.llm import starter
from bench.stage import Effort
from bench.table import Row, show
from xandrouting.inventory.headers import open_header_store
from xandrouting.inventory.inventory import Inventory

FILES = 1000
CHANGES = 5
REST_S = 5.0
HEAD_BYTES = 16 << 20  # more than a header takes


def inventory(effort: Effort) -> list[Row]:
    """Look at copies of the starter model's header, whose vocabulary has 49,152 tokens."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        return asyncio.run(_measure(Path(folder), effort))


async def _measure(folder: Path, effort: Effort) -> list[Row]:
    models, store = folder / "models", folder / "headers.db"
    first = _fill(models)
    async with _followed(models, store) as (seen, told):
        cpu_s = time.process_time()
        began = time.monotonic()
        shown_s = None
        while len(seen.snapshot.models) < FILES:
            await asyncio.sleep(0.01)
            if shown_s is None and seen.snapshot.models:
                shown_s = time.monotonic() - began
        first_ms = 1000 * (time.process_time() - cpu_s) / FILES
        whole_s = time.monotonic() - began
        again_ms = statistics.median([await _timed_ms(seen) for _ in range(effort.rounds)])
        head = first.read_bytes()[:HEAD_BYTES]
        change_s = [await _change(models, head, seen, told) for _ in range(CHANGES)]
        await _settled(seen)
        cpu_s = time.process_time()
        await asyncio.sleep(REST_S)
        rest_percent = 100 * (time.process_time() - cpu_s) / REST_S
    restart_ms = statistics.median([await _restart_ms(models, store) for _ in range(effort.rounds)])
    note = f"all in {whole_s:.1f} s, the first of them shown after {show(shown_s, 's')}"
    what = f"of {FILES:,} models, each with 49,152 tokens"
    return [
        Row(f"first scan {what}, CPU per file", first_ms, "ms", 20, note=note),
        Row(f"unchanged rescan {what}", again_ms, "ms", 200),
        Row(f"scan {what} after a restart", restart_ms, "ms", 200),
        Row("a change on disk is told after, at most", max(change_s), "s", 2),
        Row("CPU of watching 1,000 folders at rest", rest_percent, "%"),
    ]


@contextlib.asynccontextmanager
async def _followed(models: Path, store: Path) -> AsyncIterator[tuple[Inventory, asyncio.Event]]:
    told = asyncio.Event()
    seen = Inventory(models, headers=open_header_store(store), on_change=lambda _: told.set())
    async with seen:
        yield seen, told


def _fill(models: Path) -> Path:
    """Put the models there, each in a folder of its own: one file with a thousand names."""
    first = models / "m0" / "m0.gguf"
    first.parent.mkdir(parents=True)
    with starter().open("rb") as source, first.open("wb") as file:
        file.write(source.read(HEAD_BYTES))
        file.truncate(os.fstat(source.fileno()).st_size)
    for number in range(1, FILES):
        path = models / f"m{number}" / f"m{number}.gguf"
        path.parent.mkdir()
        path.hardlink_to(first)
    return first


async def _timed_ms(seen: Inventory) -> float:
    began = time.monotonic()
    await seen.refresh()
    return 1000 * (time.monotonic() - began)


async def _restart_ms(models: Path, store: Path) -> float:
    began = time.monotonic()
    async with _followed(models, store) as (seen, _):
        spent_ms = 1000 * (time.monotonic() - began)
        assert len(seen.snapshot.models) == FILES
    return spent_ms


async def _settled(seen: Inventory) -> None:
    while not seen.follows:  # noqa: ASYNC110 - it tells nobody
        await asyncio.sleep(0.01)


async def _change(models: Path, head: bytes, seen: Inventory, told: asyncio.Event) -> float:
    """Let a model come and go; return how long the later news took."""
    path = models / "new" / "new.gguf"  # one more name of the first would make all look changed
    longest = 0.0
    path.parent.mkdir(exist_ok=True)
    for change in (lambda: path.write_bytes(head), path.unlink):
        await _settled(seen)
        told.clear()
        began = time.monotonic()
        change()
        await told.wait()
        longest = max(longest, time.monotonic() - began)
    return longest
