"""What lies on disk, as last seen, and a last look before a load."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

from xandrouting.core.errors import InvalidModelFile, ModelNotFound
from xandrouting.inventory import trash
from xandrouting.inventory.architectures import KnownArchitectures
from xandrouting.inventory.header_store import HeaderStore
from xandrouting.inventory.headers import HeaderCache
from xandrouting.inventory.model_file import ModelFile, Snapshot, shown
from xandrouting.inventory.roots import Root
from xandrouting.inventory.scan import Scan, ScanStopped, recheck, scan_all
from xandrouting.inventory.watch import FolderWatch

log = logging.getLogger(__name__)

CHEAP_SCAN_S: Final = 0.03  # a list of models waits for a scan that takes no longer, always
LIST_WAIT_S: Final = 1.0  # a list of models waits so long for a scan, then it shows what is known
SCAN_ANYWAY_S: Final = 60.0  # the system may lose a change when very many come at once
UNWATCHED_SCAN_S: Final = 1.0  # between two looks where changes are not heard of
EMPTY_TRASH_S: Final = 3600.0
# A scan may take this part of the time at most; what is watched is still seen within two seconds.
_REST: Final = 5.0
_MAX_REST_S: Final = 1.0
_UNWATCHED_REST: Final = 20.0


@dataclass(frozen=True, slots=True)
class Changes:
    """What two snapshots differ in, by ids."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]

    def __bool__(self) -> bool:
        """Whether they differ at all."""
        return bool(self.added or self.removed or self.changed)


class Inventory:
    """What lies under the roots. All reading happens in threads.

    The first root, or the only one, is the models directory. `architectures` tells what the
    engine can load; None: everything is tried. `headers` remembers what was read across
    restarts. `on_change` hears, on the loop, of every difference.

    Use it as a context to have it follow what changes on disk.
    """

    def __init__(
        self,
        roots: Path | Sequence[Root],
        architectures: KnownArchitectures | None = None,
        *,
        headers: HeaderStore | None = None,
        on_change: Callable[[Changes], None] = lambda _: None,
    ) -> None:
        self.roots = (Root(roots),) if isinstance(roots, Path) else tuple(roots)
        self._architectures = architectures
        self._headers = headers
        self._cache = HeaderCache(headers)
        self._on_change = on_change
        self._snapshot = Snapshot()
        self._begun = 0  # how many scans began
        self._shown = 0  # the number of the scan that `snapshot` is of
        self._scan_s = 0.0  # how long the last one took
        self._scanning: asyncio.Task[Scan] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = threading.Event()
        self._stirred = asyncio.Event()  # something changed since a scan began
        self._settled = False  # and nothing that is watched did since the last one
        self._watch = FolderWatch([root.path for root in self.roots], self._stirred.set)
        self._leaving: set[str] = set()

    async def __aenter__(self) -> Self:
        """Begin to follow what changes; return when a first scan is over, or after a while."""
        self._tasks = [
            asyncio.create_task(self._follow(), name="inventory"),
            asyncio.create_task(self._empty_trash(), name="trash"),
        ]
        await self.look()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop following; a scan that runs ends early."""
        self._closed.set()
        for task in self._tasks:
            task.cancel()
        scans = [] if self._scanning is None else [self._scanning]
        await asyncio.gather(*self._tasks, *scans, return_exceptions=True)
        await self._watch.aclose()
        if self._headers is not None:
            await asyncio.to_thread(self._headers.close)

    @property
    def snapshot(self) -> Snapshot:
        """What is known; empty before the first scan.

        The object stays the same for as long as the files do.
        """
        return self._snapshot

    @property
    def follows(self) -> bool:
        """Whether `snapshot` is all there is: every change is heard of, and there was none."""
        return self._settled and not self._stirred.is_set()

    async def look(self) -> Snapshot:
        """Return what a list of models shows, soon.

        It is a scan that began after this call, unless that takes long: then, what is heard of
        changes, or what a scan that runs found so far.
        """
        if self.follows and self._scan_s > CHEAP_SCAN_S:
            return self._snapshot
        with suppress(TimeoutError):
            async with asyncio.timeout(LIST_WAIT_S):
                return await self.refresh()
        return self._snapshot

    async def refresh(self) -> Snapshot:
        """Scan, and return what a scan that began after this call found.

        Callers who wait for the same scan to begin share it, and none of them owns it.
        """
        wanted = self._begun + 1
        while self._shown < wanted:
            await self._next_scan()
        return self._snapshot

    async def verify(self, model: ModelFile) -> ModelFile:
        """Return `model` as its files are now; call it right before a load.

        Raises:
            ModelNotFound: its files are gone since the last scan.
            InvalidModelFile: no engine could load it; the message says why and what to do.
        """
        found = await asyncio.to_thread(self._recheck, model)
        if found is None or model.id in self._leaving:
            raise ModelNotFound(
                f"The files of '{shown(model.id)}' are no longer there. "
                "GET /v1/models/inventory lists what is.",
                param="model",
                detail=str(model.path),
            )
        if found.problem is not None:
            raise InvalidModelFile(
                f"'{shown(model.id)}' cannot be loaded: {shown(found.problem)}. "
                f"{_remedy(found.problem)}",
                param="model",
                detail=str(model.path),
            )
        return found

    @contextmanager
    def leaving(self, model: ModelFile) -> Iterator[None]:
        """Let nobody load a model that is about to be deleted."""
        self._leaving.add(model.id)
        try:
            yield
        finally:
            self._leaving.discard(model.id)

    async def _next_scan(self) -> Scan:
        """Wait for the scan that runs, or for one that begins now."""
        if self._scanning is None or self._scanning.done():
            self._begun += 1
            self._scanning = asyncio.create_task(self._scan(self._begun), name="scan")
        return await asyncio.shield(self._scanning)

    async def _scan(self, number: int) -> Scan:
        loop = asyncio.get_running_loop()
        began = time.monotonic()
        shown = self._snapshot

        def show(found: Snapshot) -> None:
            nonlocal shown
            judged = replace(found, models=tuple(map(self._judged, found.models)))
            if judged != shown:
                changes = changes_between(shown, judged)
                shown = judged
                loop.call_soon_threadsafe(self._show, judged, changes)

        def work() -> Scan:
            found = scan_all(
                self.roots, self._cache, before=shown, tell=show, is_stopped=self._closed.is_set
            )
            show(found.snapshot)
            return found

        found = await asyncio.to_thread(work)
        self._scan_s = time.monotonic() - began
        self._shown = number
        return found

    def _show(self, snapshot: Snapshot, changes: Changes) -> None:
        self._snapshot = snapshot
        if changes:
            self._on_change(changes)

    async def _follow(self) -> None:
        try:
            await self._keep_up()
        except ScanStopped:
            pass
        except Exception:  # the edge of the task
            self._settled = False  # lists scan for themselves again
            log.exception("models are no longer followed")

    async def _keep_up(self) -> None:
        """Scan whenever something changed, and now and then though nothing was heard of."""
        while True:
            self._settled = False
            self._stirred.clear()
            wanted = self._begun + 1
            found = await self._next_scan()
            while self._shown < wanted:
                found = await self._next_scan()
            watches_anew = await self._watch.watch(found.folders)
            await asyncio.sleep(min(_MAX_REST_S, self._scan_s * _REST))
            if watches_anew:
                continue  # what changed while nobody watched is seen by another scan
            self._settled = self._watch.works
            unwatched_s = max(UNWATCHED_SCAN_S, self._scan_s * _UNWATCHED_REST)
            with suppress(TimeoutError):
                async with asyncio.timeout(SCAN_ANYWAY_S if self._settled else unwatched_s):
                    await self._stirred.wait()

    async def _empty_trash(self) -> None:
        """Remove, now and every hour, what was deleted a day before."""
        while True:
            try:
                await asyncio.to_thread(trash.empty, self.roots)
            except OSError as error:
                log.warning("trash not emptied reason=%s", error)
            await asyncio.sleep(EMPTY_TRASH_S)

    def _recheck(self, model: ModelFile) -> ModelFile | None:
        found = recheck(self.roots, model, self._cache)
        return None if found is None else self._judged(found)

    def _judged(self, model: ModelFile) -> ModelFile:
        """Return the model with its problem if the engine does not know what it is."""
        name = None if model.header is None else model.header.architecture
        if model.problem is not None or name is None or self._architectures is None:
            return model
        if self._architectures.knows(name):
            return model
        return replace(model, problem=f"the engine does not know the architecture {name!r}")


def changes_between(before: Snapshot, after: Snapshot) -> Changes:
    """Return what is new, what is gone and what is another now."""
    old: Mapping[str, ModelFile] = {model.id: model for model in before.models}
    new: Mapping[str, ModelFile] = {model.id: model for model in after.models}
    return Changes(
        added=tuple(name for name in new if name not in old),
        removed=tuple(name for name in old if name not in new),
        changed=tuple(name for name in new if name in old and new[name] != old[name]),
    )


def _remedy(problem: str) -> str:
    if "git-lfs" in problem:
        return "Fetch it with `git lfs pull`, or download it again."
    if "tokenizer" in problem or "config.json is missing" in problem:
        return "vLLM needs all of the model's repository: download the rest into the same folder."
    if "symlink" in problem:
        return "Put the file itself where the symlink is."
    if "parts missing" in problem:
        return "Download the missing parts into the same folder."
    if "unreadable" in problem:
        return "Let the user that the server runs as read the file."
    if "does not know the architecture" in problem:
        return "Update the engine, or choose another model."
    if "not a model" in problem:
        return "Ask for the model it belongs to."
    return "Download it again, or delete it."
