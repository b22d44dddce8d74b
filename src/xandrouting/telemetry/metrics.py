"""`GET /metrics`: the counters in Prometheus' text, built when asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from xandrouting.core.ledger import DeviceState
from xandrouting.telemetry.requests import BUCKETS_S, Histogram, RequestStats


@dataclass(frozen=True, slots=True)
class EngineGauge:
    """What the metrics tell of one engine."""

    model: str
    backend: str
    device: str
    state: str
    active: int
    host_bytes: int | None


@dataclass(frozen=True, slots=True)
class PoolGauges:
    """What the metrics tell of the engines, and of each device: its line of the ledger."""

    engines: tuple[EngineGauge, ...]
    devices: tuple[DeviceState, ...]
    queued: int
    loads: int
    load_failures: int
    evictions: int


@dataclass(frozen=True, slots=True)
class DownloadGauges:
    """What the metrics tell of the downloads: how many by state, and the bytes that came."""

    by_state: Mapping[str, int]
    fetched_bytes: int


def _no_downloads() -> DownloadGauges:
    return DownloadGauges({}, 0)


class Metrics:
    """Renders counters that are kept elsewhere; costs nothing between two scrapes.

    `upstreams` tells of each upstream whether it answers.
    """

    def __init__(
        self,
        stats: RequestStats,
        pool: Callable[[], PoolGauges],
        upstreams: Callable[[], Mapping[str, bool]] = dict,
        downloads: Callable[[], DownloadGauges] = _no_downloads,
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Counters(stats, pool, upstreams, downloads))

    def render(self) -> bytes:
        """Return the exposition in Prometheus' text format."""
        return generate_latest(self._registry)


class _Counters(Collector):
    def __init__(
        self,
        stats: RequestStats,
        pool: Callable[[], PoolGauges],
        upstreams: Callable[[], Mapping[str, bool]],
        downloads: Callable[[], DownloadGauges],
    ) -> None:
        self._stats = stats
        self._pool = pool
        self._upstreams = upstreams
        self._downloads = downloads

    def describe(self) -> Iterable[Metric]:
        return ()  # so that registering does not collect

    def collect(self) -> Iterable[Metric]:
        yield from self._request_metrics()
        yield from self._pool_metrics()
        up = GaugeMetricFamily(
            "xandrouting_upstream_up", "1 while it answers.", labels=("upstream",)
        )
        for name, answers in self._upstreams().items():
            up.add_metric((name,), answers)
        yield up
        yield from self._download_metrics()

    def _download_metrics(self) -> Iterable[Metric]:
        downloads = self._downloads()
        states = GaugeMetricFamily(
            "xandrouting_downloads", "Downloads that are known.", labels=("state",)
        )
        for state, count in downloads.by_state.items():
            states.add_metric((state,), count)
        yield states
        yield CounterMetricFamily(
            "xandrouting_download_bytes",
            "Bytes that downloads brought over the wire.",
            value=downloads.fetched_bytes,
        )

    def _request_metrics(self) -> Iterable[Metric]:
        stats = self._stats
        answered = CounterMetricFamily(
            "xandrouting_requests", "Answered requests.", labels=("path", "status")
        )
        for (path, status), count in stats.answered.items():
            answered.add_metric((path, str(status)), count)
        yield answered
        for name, text, value in (
            ("cancelled", "Requests whose client left.", stats.cancelled),
            ("stream_errors", "Answers that broke off after their headers.", stats.stream_errors),
            ("engine_hits", "Requests that found a ready engine.", stats.hits),
            ("engine_misses", "Requests that had to wait for an engine.", stats.misses),
        ):
            yield CounterMetricFamily(f"xandrouting_{name}", text, value=value)
        yield _gauge("requests_active", "Requests under way.", stats.active)
        yield _gauge("uptime_seconds", "Since the server's start.", stats.uptime_s)
        yield _histogram("queue_wait_seconds", "Time without an engine.", stats.queue_wait)
        yield _histogram("first_byte_seconds", "Request to first body byte.", stats.first_byte)
        yield _histogram("request_duration_seconds", "Request to last byte.", stats.duration)

    def _pool_metrics(self) -> Iterable[Metric]:
        pool = self._pool()
        yield _gauge("requests_queued", "Requests that wait for an engine.", pool.queued)
        for name, text, value in (
            ("loads", "Engines that became ready.", pool.loads),
            ("load_failures", "Engines that never became ready.", pool.load_failures),
            ("evictions", "Engines that left to make room.", pool.evictions),
        ):
            yield CounterMetricFamily(f"xandrouting_{name}", text, value=value)
        labels = ("model", "backend", "device")
        active = GaugeMetricFamily(
            "xandrouting_engine_requests_active", "Leases of an engine.", labels=labels
        )
        memory = GaugeMetricFamily(
            "xandrouting_engine_memory_bytes", "PSS of an engine's processes.", labels=labels
        )
        state = GaugeMetricFamily(
            "xandrouting_engine_state", "1 for the state it is in.", labels=(*labels, "state")
        )
        for engine in pool.engines:
            names = (engine.model, engine.backend, engine.device)
            active.add_metric(names, engine.active)
            state.add_metric((*names, engine.state), 1)
            if engine.host_bytes is not None:
                memory.add_metric(names, engine.host_bytes)
        yield from (active, memory, state)
        yield from _device_metrics(pool.devices)


def _device_metrics(devices: Iterable[DeviceState]) -> Iterable[Metric]:
    taken = GaugeMetricFamily(
        "xandrouting_device_memory_bytes",
        "A device's memory: all of it, what engines may take, and who has or is promised what.",
        labels=("device", "what"),
    )
    stale = GaugeMetricFamily(
        "xandrouting_device_stale", "1 while a device cannot be read.", labels=("device",)
    )
    for device in devices:
        for name in ("capacity", "budget", "others", "reserved", "used", "free"):
            taken.add_metric((device.device, name), getattr(device, f"{name}_bytes"))
        stale.add_metric((device.device,), device.stale)
    yield from (taken, stale)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"xandrouting_{name}", text, value=value)


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    buckets: list[tuple[str, float]] = []
    count = 0
    for bound, here in zip((*BUCKETS_S, float("inf")), histogram.counts, strict=True):
        count += here
        buckets.append(("+Inf" if bound == float("inf") else str(bound), count))
    return HistogramMetricFamily(
        f"xandrouting_{name}", text, buckets=buckets, sum_value=histogram.total
    )
