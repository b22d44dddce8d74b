"""The composition root: builds every room's objects, starts them and ends them in order."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Self

from starlette.middleware.cors import CORSMiddleware

from xandrouting import __version__, fetching
from xandrouting.backends import Backends, engine_libraries
from xandrouting.core.budget import BudgetTooLarge, budget_bytes
from xandrouting.core.errors import GatewayError, MethodNotAllowed
from xandrouting.core.figures import Figures
from xandrouting.core.ledger import Ledger
from xandrouting.core.model import HOST, Backend, EngineSpec
from xandrouting.core.scheduler import Scheduler
from xandrouting.core.sizes import in_words
from xandrouting.engines.upstream import OLLAMA, Upstream
from xandrouting.fetching import build_downloads
from xandrouting.http.body import Receive
from xandrouting.http.control import build_control
from xandrouting.http.errors import headers_of, to_bytes
from xandrouting.http.gate import Gate
from xandrouting.http.inference import HOT_PATHS, InferenceApi, Scope
from xandrouting.http.loads import Loads
from xandrouting.http.news import Newsroom
from xandrouting.http.preloads import Preloads
from xandrouting.http.schemas import EngineStatus
from xandrouting.http.services import Services
from xandrouting.http.upstream import UPSTREAM, UpstreamApi
from xandrouting.inventory.architectures import KnownArchitectures
from xandrouting.inventory.headers import open_header_store
from xandrouting.inventory.inventory import Inventory
from xandrouting.inventory.model_file import ModelFile
from xandrouting.inventory.roots import roots_of
from xandrouting.launch.base import Survey
from xandrouting.launch.external import ExternalLauncher
from xandrouting.launch.local import LocalLauncher
from xandrouting.pool.figure_store import FigureStore
from xandrouting.pool.learning import Learning
from xandrouting.pool.parking import Parking
from xandrouting.pool.pool import EnginePool, Kind
from xandrouting.proxy.forward import Send
from xandrouting.proxy.request import LoadRequest
from xandrouting.routing.catalog import Catalog
from xandrouting.settings import Settings
from xandrouting.telemetry.logs import LogBook
from xandrouting.telemetry.metrics import EngineGauge, Metrics, PoolGauges
from xandrouting.telemetry.requests import RequestStats
from xandrouting.upstreams.upstreams import Upstreams
from xandrouting.upstreams.values import Address

log = logging.getLogger(__name__)

Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]


class CannotStart(Exception):
    """The settings do not fit this machine; the text says which and why."""


class Gateway:
    """Every room's objects, built from the settings. Use as an async context.

    `node` runs this machine's engines; `survey` is what it has before any of them.
    """

    def __init__(
        self,
        settings: Settings,
        engines: Backends,
        node: LocalLauncher,
        survey: Survey,
        logs: LogBook,
    ) -> None:
        self._settings = settings
        self.stats = RequestStats()
        self._newsroom = Newsroom()
        self.inventory = Inventory(
            roots_of(settings.models_dir, settings.further_roots),
            KnownArchitectures(engine_libraries()),
            headers=open_header_store(settings.data_dir / "headers.db"),
            on_change=self._newsroom.model_changes,
        )
        self._store = FigureStore.open(settings.data_dir / "figures.db")
        figures = self._store.load()
        self._scheduler = build_scheduler(settings, survey, figures)
        self._engines, keys = engines, settings.upstream_keys
        self._lacks_pinned = False  # what was pinned by the settings was no model, or not yet
        self.upstreams = Upstreams(addresses(settings))
        self._local = node
        self._external = ExternalLauncher()
        self._parking = Parking(settings.data_dir / "parked", settings.parking_quota)
        kinds = {
            **{name: Kind(adapter, node) for name, adapter in engines.adapters.items()},
            Backend.UPSTREAM: Kind(Upstream(keys), self._external),
            Backend.OLLAMA: Kind(Upstream(keys, Backend.OLLAMA), self._external),
        }
        self.pool = EnginePool(
            self._scheduler,
            kinds,
            node=node,
            learning=Learning(figures, self._store),
            load_stall_s=settings.load_stall_s,
            parking=self._parking,
            spares=spare_backends(settings),
            on_news=self._newsroom.engine_news,
            on_survey=self._newsroom.survey,
        )
        self._newsroom.attend(self.pool)
        self._logs = logs
        logs.hand_on(self._newsroom.log_line)
        self.catalog = self._build_catalog(kinds)
        self.gate = build_gate(settings)
        self.inference = self._build_inference()
        self.loads = Loads(self.inference, self.pool)
        self.preloads = Preloads(self.loads, self.upstreams, wait_s=settings.max_load_wait_s)
        self.downloads = build_downloads(
            settings, self.inventory, self.loads, self._newsroom.download
        )
        self._newsroom.attend_downloads(self.downloads.views)
        app = dispatcher(self.inference, build_control(self._services()), self.gate)
        self.asgi = opened_to(settings.cors_origins, app)

    def _build_catalog(self, kinds: Mapping[Backend, Kind]) -> Catalog:
        return Catalog(
            lambda: self.inventory.snapshot,
            {backend: kind.adapter for backend, kind in kinds.items()},
            upstreams={name: there.url for name, there in addresses(self._settings).items()},
            unavailable=self._engines.lacks,
            devices=self._engines.devices,
            device_fallback=self._settings.device_fallback,
            versions=self._engines.versions,
        )

    def _build_inference(self) -> InferenceApi:
        settings = self._settings
        return InferenceApi(
            gate=self.gate,
            catalog=self.catalog,
            inventory=self.inventory,
            pool=self.pool,
            stats=self.stats,
            upstreams=self.upstreams,
            upstream_timeout_s=settings.upstream_timeout_s,
            keepalive_after_s=settings.keepalive_after_s,
            max_load_wait_s=settings.max_load_wait_s,
            max_queue_wait_s=settings.max_queue_wait_s,
            max_body_bytes=settings.max_body_bytes,
            autoload=settings.models_autoload,
        )

    def _services(self) -> Services:
        return Services(
            version=__version__,
            max_loaded=self._settings.max_loaded,
            inference=self.inference,
            pool=self.pool,
            loads=self.loads,
            parking=self._parking,
            catalog=self.catalog,
            inventory=self.inventory,
            upstreams=self.upstreams,
            stats=self.stats,
            metrics=Metrics(
                self.stats,
                self._gauges,
                self._upstreams_up,
                partial(fetching.gauges, self.downloads),
            ),
            bus=self._newsroom.bus,
            logs=self._logs,
            backends=self._statuses,
            default_ttl_s=self._settings.default_ttl,
            downloads=self.downloads,
            is_downloaded_into=partial(fetching.writes_into, self.downloads),
        )

    async def __aenter__(self) -> Self:
        await self.inventory.__aenter__()
        if self._settings.pinned or self._settings.preload:
            await self.inventory.refresh()  # their names must be known
        await self._parking.open()
        await self.pool.__aenter__()
        await self.upstreams.__aenter__()
        await self.downloads.__aenter__()
        try:
            self._pin()
        except CannotStart:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close_streams()
        await self.downloads.aclose()
        await self.preloads.aclose()
        await self.loads.aclose()
        await self.upstreams.aclose()
        await self.pool.aclose()
        await self.inventory.__aexit__()
        await self._parking.aclose()
        await self._local.aclose()
        await self._external.aclose()
        self._store.close()

    async def fetch_starter(self) -> None:
        """Download the starter model if the settings say so and no model is here."""
        if self._settings.starter:
            await fetching.fetch_starter(self.downloads, self.inventory)
            if self._lacks_pinned:  # it may be the one
                self._pin()

    async def preload(self) -> None:
        """Begin to load what the settings name; what fails is logged and nothing else."""
        pinned = self._settings.pinned
        await self.preloads.begin((*pinned, *self._settings.preload), pinned=pinned)

    def serves(self, model: ModelFile) -> bool:
        """Whether a request for this model could be answered as it is by default."""
        try:
            self.catalog.route(LoadRequest(model=model.id))
        except GatewayError:
            return False
        return model.problem is None

    def close_streams(self) -> None:
        """End the streams of events and of the log, which would never end by themselves."""
        self._newsroom.bus.close()
        self._logs.close()

    def _pin(self) -> None:
        """Pin what the settings name.

        Raises:
            CannotStart: together they are larger than what engines may take.
        """
        specs: list[EngineSpec] = []
        self._lacks_pinned = False
        for name in self._settings.pinned:
            try:
                specs.append(self.catalog.route(LoadRequest(model=name)).spec)
            except GatewayError as error:
                self._lacks_pinned = True
                log.warning("pin ignored model=%s %s", name, error.message)
        together = self._scheduler.fit_together(specs)
        if not together.fits:
            sizes = ", ".join(f"{m} {in_words(size)}" for m, size in together.sizes)
            raise CannotStart(
                f"the pinned models do not fit together: {sizes}; engines may take "
                f"{together.limits}. Pin fewer, or raise ram_budget or vram_budget"
            )
        for spec in specs:
            if spec.key.is_local:  # an Ollama keeps what is pinned by how it is loaded
                self.pool.pin(spec.key.model, pinned=True)

    def _statuses(self) -> Mapping[str, EngineStatus]:
        found = {str(backend): status for backend, status in self._engines.statuses.items()}
        ollama = next((one for one in self.upstreams.states() if one.name == OLLAMA), None)
        available = ollama is not None and ollama.available
        found[OLLAMA] = EngineStatus(
            status="available" if available else "unavailable",
            available=available,
            reason="ollama_base_url is none" if ollama is None else ollama.reason,
            version=None if ollama is None else ollama.version,
        )
        return found

    def _upstreams_up(self) -> Mapping[str, bool]:
        return {state.name: state.available for state in self.upstreams.states()}

    def _gauges(self) -> PoolGauges:
        engines = tuple(
            EngineGauge(
                view.engine.key.model,
                view.engine.key.backend,
                view.engine.key.device,
                view.state,
                view.active,
                engine.memory.host_bytes,
            )
            for view, engine in self.pool.views()
        )
        pool = self.pool
        return PoolGauges(
            engines,
            pool.devices(),
            pool.queued,
            pool.loads,
            pool.load_failures,
            pool.evictions,
        )


def dispatcher(inference: InferenceApi, control: Asgi, gate: Gate) -> Asgi:
    """Return the application: hot paths by one look-up, everything else through FastAPI."""
    upstream = UpstreamApi(inference)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(UPSTREAM):
            await upstream(scope, receive, send)
            return
        hot = scope["type"] == "http" and scope["path"] in HOT_PATHS
        if hot and scope["method"] == "POST":
            await inference(scope, receive, send)
            return
        if scope["type"] == "http":
            try:
                gate.check(scope["method"], scope["path"], dict(scope["headers"]))
                if hot:
                    raise MethodNotAllowed(f"{scope['path']} takes POST.")
            except GatewayError as error:
                await _refuse(error, send)
                return
        await control(scope, receive, send)

    return app


def opened_to(origins: Sequence[str], app: Asgi) -> Asgi:
    """Return the application with answers that web pages of these origins may read."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "POST", "DELETE"),
        allow_headers=("*",),
        expose_headers=("x-request-id", "x-xandrouting-engine", "x-xandrouting-load"),
    )


async def _refuse(error: GatewayError, send: Send) -> None:
    body = to_bytes(error)
    headers = [*headers_of(error), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def build_gate(settings: Settings) -> Gate:
    """Return who may come in, by the settings."""
    return Gate(
        api_key=settings.api_key.get_secret_value() if settings.api_key else None,
        check_host=settings.is_loopback,
        hosts=settings.allowed_hosts,
        origins=settings.cors_origins,
    )


def build_scheduler(settings: Settings, survey: Survey, figures: Figures) -> Scheduler:
    """Return the scheduler of this machine.

    Raises:
        CannotStart: the budgets are more than it has.
    """
    return Scheduler(
        Ledger(max_engines=settings.max_loaded, budgets=budgets(settings, survey)),
        figures=figures,
        default_ttl_s=settings.default_ttl,
        soft_idle_s=settings.soft_idle_s,
        max_queue=settings.max_queue,
        fair_wait_s=settings.fair_wait_s,
        min_residency_s=settings.min_residency_s,
    )


def budgets(settings: Settings, survey: Survey) -> Mapping[str, int]:
    """Return what engines may take of each device.

    Raises:
        CannotStart: more is set than a device has.
    """
    found = {}
    for reading in survey.devices:
        name = "ram_budget" if reading.device == HOST else "vram_budget"
        try:
            found[reading.device] = budget_bytes(getattr(settings, name), reading)
        except BudgetTooLarge as error:
            raise CannotStart(f"{name}: {error}") from error
    return found


def spare_backends(settings: Settings) -> frozenset[Backend]:
    """Return whose engines take spares: vLLM's are for Transformers too."""
    named = {Backend(name) for name in settings.spares}
    return frozenset(named | ({Backend.TRANSFORMERS} if Backend.VLLM in named else set()))


def addresses(settings: Settings) -> Mapping[str, Address]:
    """Return where the other servers are; one configured as `ollama` goes before the known one."""
    keys, found = settings.upstream_keys, {}
    if settings.ollama_base_url is not None:
        expected = "ollama_base_url" in settings.model_fields_set
        found[OLLAMA] = Address(settings.ollama_base_url, keys.get(OLLAMA, ""), expected)
    for name, url in settings.upstreams.items():
        found[name] = Address(url, keys.get(name, ""))
    return found
