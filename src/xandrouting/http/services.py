"""What the control calls ask and command, handed to them as one value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from xandrouting.downloads.downloads import Downloads
from xandrouting.http.inference import InferenceApi
from xandrouting.http.loads import Loads
from xandrouting.http.schemas import EngineStatus
from xandrouting.inventory.inventory import Inventory
from xandrouting.pool.parking import Parking
from xandrouting.pool.pool import EnginePool
from xandrouting.routing.catalog import Catalog
from xandrouting.telemetry.events import EventBus
from xandrouting.telemetry.logs import LogBook
from xandrouting.telemetry.metrics import Metrics
from xandrouting.telemetry.requests import RequestStats
from xandrouting.upstreams.upstreams import Upstreams


@dataclass(frozen=True, slots=True)
class Services:
    """The rooms behind the control calls. `backends` tells what can serve here, and why not.

    `default_ttl_s` is how long a model idles whose requests do not say. `max_loaded` is how
    many engines there may be at once; None: as many as fit. `is_downloaded_into` tells whether a
    download writes into a folder of the models directory, or below it.
    """

    version: str
    max_loaded: int | None
    inference: InferenceApi
    pool: EnginePool
    loads: Loads
    parking: Parking
    catalog: Catalog
    inventory: Inventory
    upstreams: Upstreams
    stats: RequestStats
    metrics: Metrics
    bus: EventBus
    logs: LogBook
    backends: Callable[[], Mapping[str, EngineStatus]]
    default_ttl_s: float
    downloads: Downloads
    is_downloaded_into: Callable[[str], bool] = lambda _: False
