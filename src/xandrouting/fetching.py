"""Builds the downloads of a gateway, from the rooms they bring together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from xandrouting.downloads.courier import Courier
from xandrouting.downloads.downloads import Downloads
from xandrouting.downloads.hub import Hub
from xandrouting.downloads.movers import Wiring
from xandrouting.downloads.place import Place
from xandrouting.downloads.running import View
from xandrouting.downloads.store import JobStore
from xandrouting.http.arrivals import load, model_of
from xandrouting.http.loads import Loads
from xandrouting.inventory.inventory import Inventory
from xandrouting.telemetry.metrics import DownloadGauges


def build_downloads(
    *,
    models_dir: Path,
    data_dir: Path,
    endpoint: str,
    token: str | None,
    max_downloads: int,
    inventory: Inventory,
    loads: Loads,
    on_news: Callable[[View], None],
) -> Downloads:
    """Return the downloads into one models directory; its jobs are kept in `data_dir`."""
    wiring = Wiring(
        carrier=partial(Courier, token=token),
        arrive=partial(model_of, inventory),
        load=partial(load, loads),
        on_news=on_news,
    )
    return Downloads(
        Hub(endpoint, token),
        Place(models_dir, [root.name for root in inventory.roots if root.read_only]),
        JobStore.open(data_dir / "downloads.db"),
        wiring,
        max_downloads=max_downloads,
    )


def gauges(downloads: Downloads) -> DownloadGauges:
    """Return what the metrics tell of the downloads."""
    return DownloadGauges(
        {str(state): count for state, count in downloads.counts().items()},
        downloads.fetched_bytes,
    )


def writes_into(downloads: Downloads, folder: str) -> bool:
    """Whether a download has not ended that writes into a folder, relative to the root."""
    return folder.partition("/")[0] in downloads.destinations()
