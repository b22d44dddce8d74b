"""The models directory, as last seen, and a last look before a load."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from xandrouting.core.errors import InvalidModelFile, ModelNotFound
from xandrouting.inventory.architectures import KnownArchitectures
from xandrouting.inventory.model_file import ModelFile, Snapshot, shown
from xandrouting.inventory.scan import HeaderCache, recheck, scan


class Inventory:
    """What lies under one models directory. All reading happens in threads.

    `architectures` tells what the engine can load; None: everything is tried.
    """

    def __init__(self, root: Path, architectures: KnownArchitectures | None = None) -> None:
        self._root = root
        self._architectures = architectures
        self._cache = HeaderCache()
        self._snapshot = Snapshot()
        self._turn = asyncio.Lock()  # whoever holds it scans
        self._begun = 0  # how many scans began
        self._shown = 0  # the number of the scan that `snapshot` is of

    @property
    def snapshot(self) -> Snapshot:
        """What the last completed scan found; empty before the first.

        The object stays the same for as long as the files do.
        """
        return self._snapshot

    async def refresh(self) -> Snapshot:
        """Scan, and return what a scan that began after this call found.

        Callers who wait for the same scan to begin share it. Cancelling one hands its scan's
        turn to the next.
        """
        wanted = self._begun + 1
        async with self._turn:
            if self._shown < wanted:
                self._begun += 1
                number = self._begun
                self._snapshot = await asyncio.to_thread(self._scan)
                self._shown = number
            return self._snapshot

    async def verify(self, model: ModelFile) -> ModelFile:
        """Return `model` as its files are now; call it right before a load.

        Raises:
            ModelNotFound: its files are gone since the last scan.
            InvalidModelFile: no engine could load it; the message says why and what to do.
        """
        found = await asyncio.to_thread(self._recheck, model)
        if found is None:
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

    def _recheck(self, model: ModelFile) -> ModelFile | None:
        found = recheck(self._root, model, self._cache)
        return None if found is None else self._judged(found)

    def _scan(self) -> Snapshot:
        before = self._snapshot
        found = scan(self._root, self._cache)
        found = replace(found, models=tuple(self._judged(model) for model in found.models))
        return before if found == before else found

    def _judged(self, model: ModelFile) -> ModelFile:
        """Return the model with its problem if the engine does not know what it is."""
        name = None if model.header is None else model.header.architecture
        if model.problem is not None or name is None or self._architectures is None:
            return model
        if self._architectures.knows(name):
            return model
        return replace(model, problem=f"the engine does not know the architecture {name!r}")


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
    if "architecture" in problem:
        return "Update the engine, or choose another model."
    if "not a model" in problem:
        return "Ask for the model it belongs to."
    return "Download it again, or delete it."
