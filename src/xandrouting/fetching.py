"""Builds the downloads of a gateway, from the rooms they bring together."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Final

from xandrouting.core.errors import GatewayError
from xandrouting.downloads.courier import Courier
from xandrouting.downloads.downloads import Downloads, Wanted
from xandrouting.downloads.hub import Hub
from xandrouting.downloads.jobs import ENDED
from xandrouting.downloads.movers import Wiring
from xandrouting.downloads.packaged import STARTER, HubOrPackage
from xandrouting.downloads.place import Place
from xandrouting.downloads.running import View
from xandrouting.downloads.store import JobStore
from xandrouting.http.arrivals import load, model_of
from xandrouting.http.loads import Loads
from xandrouting.inventory import trash
from xandrouting.inventory.inventory import Inventory
from xandrouting.launch.turns import come_in_batches
from xandrouting.settings import Settings
from xandrouting.telemetry.metrics import DownloadGauges

log = logging.getLogger(__name__)


def build_downloads(
    settings: Settings, inventory: Inventory, loads: Loads, on_news: Callable[[View], None]
) -> Downloads:
    """Return the downloads into the models directory of these settings."""
    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    wiring = Wiring(
        carrier=partial(Courier, token=token),
        arrive=partial(model_of, inventory),
        load=partial(load, loads),
        on_news=on_news,
        on_moving=lambda moving: come_in_batches(on=not moving),
    )
    return Downloads(
        HubOrPackage(Hub(settings.hf_endpoint, token)),
        Place(
            settings.models_dir,
            [root.name for root in inventory.roots if root.read_only],
            make_room=partial(trash.make_room, inventory.roots[0]),
        ),
        JobStore.open(settings.data_dir / "downloads.db"),
        wiring,
        max_downloads=settings.max_downloads,
    )


STARTER_FOLDER: Final = "smollm2-135m-instruct"
STARTER_MODEL: Final = Wanted(
    f"{STARTER.repo_id}:Q4_1", revision=STARTER.commit, destination=STARTER_FOLDER
)


async def fetch_starter(downloads: Downloads, inventory: Inventory) -> None:
    """Download the starter model if no model is here or on its way; return when that has ended."""
    # A first scan that takes long has found one already, if there is one.
    if inventory.snapshot.models or (await inventory.refresh()).models:
        return
    unfinished = [view.job for view in downloads.views() if view.job.state not in ENDED]
    if any(job.order.destination != STARTER_FOLDER for job in unfinished):
        return
    log.info("no model here: the starter model is downloaded repo=%s", STARTER.repo_id)
    try:
        # One of an earlier start goes on by itself, or was paused and stays so.
        job = unfinished[0] if unfinished else (await downloads.submit(STARTER_MODEL)).job
        failure = (await downloads.until_settled(job.id)).job.failure
    except GatewayError as error:
        log.warning("starter model not downloaded code=%s %s", error.code, error.message)
    else:
        if failure is not None:
            log.warning("starter model not downloaded code=%s %s", failure.code, failure.message)


def gauges(downloads: Downloads) -> DownloadGauges:
    """Return what the metrics tell of the downloads."""
    return DownloadGauges(
        {str(state): count for state, count in downloads.counts().items()},
        downloads.fetched_bytes,
    )


def writes_into(downloads: Downloads, folder: str) -> bool:
    """Whether a download has not ended that writes into a folder, relative to the root."""
    return folder.partition("/")[0] in downloads.destinations()
