"""Conversations of engines that left, kept on disk until their model is loaded again.

An engine writes each of its slots to a file of one folder; beside them lies a manifest, written
when the files are whole, that says what they are good for. They are good for one load of the
same file by the same engine version with the same options, within a day. Whatever else is found
is deleted. A file is checked against its manifest before an engine sees it: llama.cpp aborts on
one that was cut short.

Nothing here may keep an engine from leaving or from becoming ready: what fails is logged.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import shutil
import time
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from xandrouting.core.events import Start
from xandrouting.core.model import ModelKey
from xandrouting.engines.base import Slots
from xandrouting.net.client import Client, UpstreamError

log = logging.getLogger(__name__)

KEPT_S: Final = 24 * 3600.0
MIN_TOKENS: Final = 128  # fewer are read again sooner than it is worth
CALL_S: Final = 10.0  # an engine that takes longer to save or to restore is not waited for
MIN_FREE_BYTES: Final = 256 << 20  # of the disk, which is not ours alone
_READ_BYTES: Final = 1 << 20
_JSON: Final = b"content-type: application/json\r\n"
_ANSWER_FAULTS: Final = (ValueError, KeyError, TypeError)


@dataclass(frozen=True, slots=True)
class SavedSlot:
    """One conversation's file."""

    name: str
    tokens: int
    size_bytes: int
    checksum: int

    @classmethod
    def of(cls, values: dict[str, Any]) -> SavedSlot:
        """Read a manifest's entry. Raises ValueError, KeyError or TypeError for any other."""
        name = str(values["name"])
        if Path(name).name != name:
            raise ValueError("a file of another folder")
        numbers = (int(values[field]) for field in ("tokens", "size_bytes", "checksum"))
        return cls(name, *numbers)


@dataclass(frozen=True, slots=True)
class Parked:
    """What one engine left: its manifest."""

    good_for: str
    parked_at: float  # wall time
    slots: tuple[SavedSlot, ...]

    @property
    def size_bytes(self) -> int:
        """All files together."""
        return sum(slot.size_bytes for slot in self.slots)

    @classmethod
    def parse(cls, text: str) -> Parked:
        """Read a manifest. Raises ValueError, KeyError or TypeError for any other text."""
        values: dict[str, Any] = json.loads(text)
        slots = tuple(SavedSlot.of(slot) for slot in values["slots"])
        return cls(str(values["good_for"]), float(values["parked_at"]), slots)


class Parking:
    """One folder of parked conversations, at most `quota_bytes` of them; 0: none are kept."""

    def __init__(self, folder: Path, quota_bytes: int) -> None:
        self._folder = folder
        self.quota_bytes = quota_bytes
        self._parked: dict[str, Parked] = {}  # by the name all files of an engine begin with
        self._sealing: dict[str, asyncio.Task[None]] = {}
        self._promised: dict[str, int] = {}  # bytes, to those that are saving
        # Tokens by slot, of engines that live. They do not tell of what no request has used yet.
        self._restored: dict[str, dict[int, int]] = {}

    async def open(self) -> None:
        """Look at what an earlier server left, and delete what is of no use or too much."""
        self._parked = await asyncio.to_thread(self._look)
        await self._drop_down_to(self.quota_bytes)

    @property
    def folder(self) -> str:
        """Where engines save, as llama.cpp wants it; empty: they shall not."""
        return f"{self._folder}/" if self.quota_bytes else ""

    @property
    def size_bytes(self) -> int:
        """What is parked, all together."""
        return sum(parked.size_bytes for parked in self._parked.values())

    @property
    def count(self) -> int:
        """How many conversations are parked."""
        return sum(len(parked.slots) for parked in self._parked.values())

    async def park(self, start: Start, client: Client, slots: Slots) -> None:
        """Save what the engine's slots hold. It still runs, and nobody else may ask it now."""
        if not self.quota_bytes or start.spec.mmproj is not None:  # what it saw cannot be saved
            return
        began = time.monotonic()
        stem = _stem(start.engine.key)
        await self._until_sealed(stem)
        await self._drop((stem,))
        restored = self._restored.pop(stem, {})
        saved: list[SavedSlot] = []
        try:
            async with asyncio.timeout(CALL_S):
                answer = await _ask(client, slots.list_path)
                states = (
                    replace(state, tokens=state.tokens or restored.get(state.id, 0))
                    for state in slots.states(answer)
                )
                worth = [s for s in states if s.tokens >= MIN_TOKENS and not s.busy]
                for state in sorted(worth, key=lambda s: -s.tokens):
                    if not await self._make_room(stem, _most_bytes(start, state.tokens), saved):
                        continue  # a shorter one may fit
                    name = f"{stem}-{state.id}.slot"
                    path, body = slots.save(state.id, name)
                    saved.append(SavedSlot(name, state.tokens, 0, 0))  # it may be left half written
                    size = slots.saved_bytes(await _ask(client, path, body))
                    saved[-1] = SavedSlot(name, state.tokens, size, 0)
        except asyncio.CancelledError:
            self._delete(slot.name for slot in saved)
            raise
        except (UpstreamError, OSError, _Refused, *_ANSWER_FAULTS) as error:
            reason = str(error) or type(error).__name__
            log.warning("conversation not parked engine=%s error=%s", start.engine, reason)
            half = [slot.name for slot in saved if not slot.size_bytes]
            await asyncio.to_thread(self._delete, half)
        finally:
            self._promised.pop(stem, None)
        whole = tuple(slot for slot in saved if slot.size_bytes)
        if whole:
            tokens, took_s = sum(slot.tokens for slot in whole), time.monotonic() - began
            log.info("parked engine=%s tokens=%d took_s=%.3f", start.engine, tokens, took_s)
            parked = self._parked[stem] = Parked(good_for(start), time.time(), whole)
            # The engine need not wait for the checksums.
            task = self._sealing[stem] = asyncio.create_task(self._seal(stem, parked))
            task.add_done_callback(lambda _: self._sealing.pop(stem, None))

    async def fetch(self, start: Start) -> tuple[SavedSlot, ...]:
        """Return what there is for an engine that starts, checked; delete what is not for it.

        Meant to run beside the load.
        """
        stem = _stem(start.engine.key)
        self._restored.pop(stem, None)  # an earlier engine's
        await self._until_sealed(stem)
        parked = self._parked.get(stem)
        if parked is None:
            return ()
        if parked.good_for != good_for(start) or _is_old(parked):
            log.info("parked conversation of no use any more engine=%s", start.engine)
            await self._drop((stem,))
            return ()
        whole = await asyncio.to_thread(self._whole, parked.slots)
        for slot in parked.slots:
            if slot not in whole:
                log.warning("parked file damaged engine=%s file=%s", start.engine, slot.name)
        if not whole:
            await self._drop((stem,))
        return whole

    async def restore(
        self, start: Start, whole: Iterable[SavedSlot], client: Client, slots: Slots
    ) -> None:
        """Read into the engine's slots what was fetched for it, and keep it no longer."""
        stem = _stem(start.engine.key)
        if stem not in self._parked:
            return
        # Before it is tried: what ends an engine must not end the next one too.
        await asyncio.to_thread(self._delete, [f"{stem}.json"])
        began = time.monotonic()
        restored = self._restored[stem] = {}
        try:
            async with asyncio.timeout(CALL_S):
                for slot, saved in zip(range(start.options.n_parallel or 1), whole, strict=False):
                    path, body = slots.restore(slot, saved.name)
                    restored[slot] = slots.restored_tokens(await _ask(client, path, body))
        except (UpstreamError, TimeoutError, _Refused, *_ANSWER_FAULTS) as error:
            reason = str(error) or type(error).__name__
            log.warning("conversation not restored engine=%s error=%s", start.engine, reason)
        tokens, took_s = sum(restored.values()), time.monotonic() - began
        log.info("restored engine=%s tokens=%d took_s=%.3f", start.engine, tokens, took_s)
        await self._drop((stem,))

    async def drop_old(self) -> None:
        """Delete what nobody came back for."""
        await self._drop([stem for stem, parked in self._parked.items() if _is_old(parked)])

    async def aclose(self) -> None:
        """Let what is being sealed be sealed."""
        if self._sealing:
            await asyncio.wait(self._sealing.values())

    async def _make_room(self, stem: str, size_bytes: int, saved: Iterable[SavedSlot]) -> bool:
        """Delete the oldest until so much more may be saved; False: it may not.

        Raises:
            OSError: there is no folder, and none can be made.
        """
        taken = sum(slot.size_bytes for slot in saved) + size_bytes
        others = sum(promised for other, promised in self._promised.items() if other != stem)
        if taken + others > self.quota_bytes:
            return False
        self._promised[stem] = taken  # before others get a chance to look
        free = await asyncio.to_thread(self._free_bytes)
        if free - size_bytes < MIN_FREE_BYTES:
            self._promised[stem] -= size_bytes
            return False
        await self._drop_down_to(self.quota_bytes - sum(self._promised.values()))
        return True

    async def _drop_down_to(self, limit_bytes: int) -> None:
        """Delete the oldest until no more than this is parked."""
        while self._parked and self.size_bytes > limit_bytes:
            oldest = min(self._parked, key=lambda stem: self._parked[stem].parked_at)
            await self._drop((oldest,))

    def _free_bytes(self) -> int:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return shutil.disk_usage(self._folder).free

    async def _until_sealed(self, stem: str) -> None:
        sealing = self._sealing.get(stem)
        if sealing is not None:
            await asyncio.wait({sealing})

    async def _seal(self, stem: str, parked: Parked) -> None:
        try:
            sealed = await asyncio.to_thread(self._sealed, stem, parked)
        except OSError as error:
            if self._parked.get(stem) is parked:
                log.warning("conversation not parked file=%s error=%s", stem, error.strerror)
            await self._drop((stem,))
            await asyncio.to_thread(self._delete, [f"{stem}.new"])
            return
        if self._parked.get(stem) is parked:
            self._parked[stem] = sealed
        else:  # dropped meanwhile, for another's sake
            await asyncio.to_thread(self._delete, [f"{stem}.json"])

    def _sealed(self, stem: str, parked: Parked) -> Parked:
        """Write the manifest of files that are whole."""
        slots = tuple(
            SavedSlot(slot.name, slot.tokens, *self._sum(slot.name)) for slot in parked.slots
        )
        sealed = Parked(parked.good_for, parked.parked_at, slots)
        unfinished = self._folder / f"{stem}.new"
        unfinished.touch(mode=0o600)
        unfinished.write_text(json.dumps(asdict(sealed)))
        unfinished.replace(self._folder / f"{stem}.json")
        return sealed

    def _whole(self, slots: Iterable[SavedSlot]) -> tuple[SavedSlot, ...]:
        return tuple(slot for slot in slots if self._is_whole(slot))

    def _is_whole(self, slot: SavedSlot) -> bool:
        try:
            return self._sum(slot.name) == (slot.size_bytes, slot.checksum)
        except OSError:
            return False

    def _sum(self, name: str) -> tuple[int, int]:
        """Return a file's size and checksum."""
        size = checksum = 0
        with (self._folder / name).open("rb", buffering=0) as file:
            while data := file.read(_READ_BYTES):
                size += len(data)
                checksum = zlib.crc32(data, checksum)
        return size, checksum

    async def _drop(self, stems: Iterable[str]) -> None:
        """Forget what is parked under these names, and delete it."""
        names: list[str] = []
        for stem in list(stems):
            parked = self._parked.pop(stem, None)
            if parked is not None:
                names += [f"{stem}.json", *(slot.name for slot in parked.slots)]
        if names:
            await asyncio.to_thread(self._delete, names)

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                (self._folder / name).unlink(missing_ok=True)
            except OSError as error:
                log.warning("parked file not deleted file=%s error=%s", name, error.strerror)

    def _look(self) -> dict[str, Parked]:
        """Read every manifest, and delete every file that none of them names."""
        found: dict[str, Parked] = {}
        try:
            names = {path.name for path in self._folder.iterdir()}
        except OSError:
            return {}  # there is none yet, or not for us
        known: set[str] = set()
        for name in names if self.quota_bytes else ():
            path = self._folder / name
            try:
                parked = Parked.parse(path.read_text()) if path.suffix == ".json" else None
            except (OSError, *_ANSWER_FAULTS) as error:
                log.warning("parked manifest unreadable file=%s error=%s", name, error)
                continue
            if parked is not None and not _is_old(parked):
                found[path.stem] = parked
                known |= {name, *(slot.name for slot in parked.slots)}
        self._delete(names - known)
        return found


class _Refused(Exception):
    """The engine's answer was an error; the text says which."""


async def _ask(client: Client, path: bytes, body: bytes | None = None) -> bytes:
    """Return the answer of a GET, or of a POST where there is a body."""
    method, headers = (b"GET", b"") if body is None else (b"POST", _JSON)
    response = await client.request(method, path, body or b"", headers)
    try:
        answer = await response.read(1 << 20)
        if response.status != 200:
            raise _Refused(f"status {response.status}")
        return answer
    finally:
        response.close()


def good_for(start: Start) -> str:
    """Return what has to be the same for a conversation to be read back: model, engine, options."""
    spec = start.spec
    asked = start.options
    options = (asked.n_ctx, asked.n_parallel, asked.cache_type_k, asked.cache_type_v)
    return " ".join(map(str, (spec.learned_as, spec.revision, *options, asked.embeddings)))


def _stem(key: ModelKey) -> str:
    return hashlib.sha256(f"{key.model}|{key.backend}|{key.device}".encode()).hexdigest()[:32]


def _most_bytes(start: Start, tokens: int) -> int:
    """Return what so many tokens take at most, by what the engine's whole cache was reckoned at."""
    assert start.decision is not None  # every start has one
    footprint, options = start.decision.footprint, start.options
    cache = footprint.host.kv_cache + footprint.device.kv_cache
    return cache * tokens // max(1, (options.n_ctx or 1) * (options.n_parallel or 1))


def _is_old(parked: Parked) -> bool:
    return not 0 <= time.time() - parked.parked_at < KEPT_S
