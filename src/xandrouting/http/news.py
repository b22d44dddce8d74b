"""The pool's news as the event stream tells it."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from xandrouting.core.ledger import DeviceState
from xandrouting.core.planner import Decision
from xandrouting.downloads.jobs import JobState
from xandrouting.downloads.running import View
from xandrouting.http import lists
from xandrouting.http.decisions import decision_item, device_items, loading_item
from xandrouting.http.download_items import item_of
from xandrouting.http.errors import body_of
from xandrouting.inventory.inventory import Changes
from xandrouting.pool.engine import EngineNews, News
from xandrouting.pool.pool import EnginePool
from xandrouting.telemetry.events import EventBus
from xandrouting.telemetry.logs import LogLine

# What is worth a message of its own: an engine that left without anybody's wish.
_NOTICES = {"evicted": "evicted", "idle": "ttl_unload", "sleep_failed": "sleep_failed"}
_IDS_IN_AN_EVENT = 100


_SHOWN_DOWNLOADS = 100  # in a snapshot


class Newsroom:
    """Publishes what happens to engines and to the machine's memory."""

    def __init__(self) -> None:
        self.bus = EventBus(self._snapshot)
        self._pool: EnginePool | None = None
        self._downloads: Callable[[], Sequence[View]] = tuple
        self._downloads_told: dict[str, JobState] = {}
        self._stale: frozenset[str] = frozenset()

    def attend(self, pool: EnginePool) -> None:
        """Take the pool whose state a snapshot shows. Before, there is nothing to show."""
        self._pool = pool

    def attend_downloads(self, views: Callable[[], Sequence[View]]) -> None:
        """Take where a snapshot has the downloads from, the newest first."""
        self._downloads = views

    def engine_news(self, item: EngineNews) -> None:
        """Publish one change of an engine, and a notice where people will ask why."""
        engine = item.engine
        if not engine.spec.key.is_local:
            return
        found = None if self._pool is None else self._pool.view(engine.spec.key)
        there = found is not None and found[1] is engine and item.news is not News.GONE
        view = found[0] if found is not None and there else None
        now = asyncio.get_running_loop().time()
        deadline = None if view is None else view.idle_deadline()
        data: dict[str, Any] = {
            "id": engine.spec.key.model,
            "engine": engine.label.decode(),
            "backend": engine.spec.key.backend,
            "device": engine.spec.key.device,
            "event": item.news,
            "state": "gone" if view is None else view.state,
            "at": _now(),
            "memory_bytes": engine.memory.host_bytes,
            "device_bytes": engine.memory.device_bytes,
            "load_seconds": None if engine.load_seconds is None else round(engine.load_seconds, 3),
            "active": 0 if view is None else view.active,
            "pinned": False if view is None else view.pinned,
            "expires_at": None if deadline is None else lists.iso(time.time() + deadline - now),
        }
        loading = loading_item(engine.loading(now))
        if loading is not None:
            data["progress"] = loading.model_dump()
        if item.reason is not None:
            data["reason"] = item.reason
        if item.decision is not None:
            data["decision"] = decision_item(item.decision).model_dump()
        if item.error is not None:
            data["error"] = body_of(item.error)["error"]
        self.bus.publish("model", "model", data)
        if item.news is News.STOPPING and item.reason in _NOTICES:
            self._notice(_NOTICES[item.reason], engine.spec.key.model, item.decision)
        elif item.news is News.FAILED and item.error is not None:
            self.bus.publish("notice", "notice", _failure(data))

    def model_changes(self, changes: Changes) -> None:
        """Publish which models came, went or are others now, some at a time."""
        total = max(len(changes.added), len(changes.removed), len(changes.changed))
        for first in range(0, total, _IDS_IN_AN_EVENT):
            some = slice(first, first + _IDS_IN_AN_EVENT)
            data = {
                "at": _now(),
                "added": changes.added[some],
                "removed": changes.removed[some],
                "changed": changes.changed[some],
            }
            self.bus.publish("model", "inventory", data)

    def download(self, view: View) -> None:
        """Publish how a download is, and a notice when it has ended by itself."""
        data = shown_download(view)
        self.bus.publish("download", "download", data)
        state, before = view.job.state, self._downloads_told.get(view.job.id)
        self._downloads_told[view.job.id] = state
        if state is before:
            return
        if state is JobState.COMPLETED or view.job.failure is not None:
            kept = {name: data[name] for name in ("job_id", "repo_id", "model", "error")}
            notice = {"kind": f"download_{state}", "at": _now(), **kept}
            self.bus.publish("notice", "notice", notice)

    def log_line(self, line: LogLine) -> None:
        """Publish a line of the log."""
        self.bus.publish("log", "log", {**dataclasses.asdict(line), "at": lists.iso(line.at)})

    def survey(self) -> None:
        """Publish the ledger's lines, and a notice when a device can no longer be read."""
        devices = () if self._pool is None else self._pool.devices()
        shown = [item.model_dump() for item in device_items(devices)]
        self.bus.publish("gauge", "gauge", {"at": _now(), "devices": shown})
        self._tell_stale(devices)

    def _tell_stale(self, devices: tuple[DeviceState, ...]) -> None:
        stale = frozenset(device.device for device in devices if device.stale)
        for device in sorted(stale - self._stale):
            data = {"kind": "memory_stale", "device": device, "at": _now()}
            self.bus.publish("notice", "notice", data)
        self._stale = stale

    def _notice(self, kind: str, model: str, decision: Decision | None) -> None:
        data: dict[str, Any] = {"kind": kind, "model": model, "at": _now()}
        if decision is not None:
            data["for"] = decision.model
        self.bus.publish("notice", "notice", data)

    def _snapshot(self) -> dict[str, Any]:
        now = asyncio.get_running_loop().time()
        views = [] if self._pool is None else self._pool.views()
        devices = () if self._pool is None else self._pool.devices()
        return {
            "now": _now(),
            "loaded": [
                lists.loaded_item(view, engine, now=now).model_dump()
                for view, engine in views
                if lists.is_local(view)
            ],
            "requests": [],
            "downloads": [shown_download(view) for view in self._downloads()[:_SHOWN_DOWNLOADS]],
            "system": {"devices": [item.model_dump() for item in device_items(devices)]},
        }


def _now() -> str | None:
    return lists.iso(time.time())


def shown_download(view: View) -> dict[str, Any]:
    """Describe a download without its files: there may be hundreds, four times a second."""
    return item_of(view, with_files=False).model_dump(exclude={"files"})


def _failure(data: dict[str, Any]) -> dict[str, Any]:
    kept = {name: data[name] for name in ("at", "error")}
    return {"kind": "load_failed", "model": data["id"], **kept}
