"""Requests that go to an engine, the hot paths first. Plain ASGI, looked up before FastAPI.

Each call is one coroutine: read, route, claim, ask, relay, release. The connection tells of
the client's leaving, during a long prefill too, when nothing is sent, and cancels it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from urllib.parse import parse_qs

from xandrouting.core.errors import (
    EngineDied,
    GatewayError,
    InvalidRequest,
    ModelNotFound,
    UpstreamRedirects,
    UpstreamUnreachable,
)
from xandrouting.http.body import ClientLeft, Receive, read_body
from xandrouting.http.errors import headers_of, to_bytes, to_sse
from xandrouting.http.gate import Gate
from xandrouting.http.protocol import Connection, connection_of
from xandrouting.inventory.inventory import Inventory
from xandrouting.net.client import Response
from xandrouting.pool.engine import Engine
from xandrouting.pool.pool import Claim, EnginePool
from xandrouting.proxy.forward import Answer, Explain, Send, ask, check_foreign, relay
from xandrouting.proxy.headers import EVENT_STREAM_HEADERS
from xandrouting.proxy.request import BodyParser, Chat, Inference, Routing, body_for
from xandrouting.proxy.sse import comment
from xandrouting.routing.catalog import Catalog, Route
from xandrouting.telemetry.requests import RequestStats
from xandrouting.upstreams.upstreams import Upstreams

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]

COMMENT_EVERY_S: Final = 10.0
DEATH_WAIT_S: Final = 2.0  # from an engine's refusing connections to its being known as dead
MAX_REQUEST_ID: Final = 128
# What an engine may want to know of the client's request besides its body.
_PASSED_HEADERS: Final = frozenset((b"anthropic-version", b"anthropic-beta", b"openai-beta"))


@dataclass(frozen=True, slots=True)
class Kind:
    """What one hot path asks of a body and of an engine."""

    body: type[Inference]
    parser: BodyParser[Any]
    embeddings: bool = False


def _kind(body: type[Inference], *, embeddings: bool = False) -> Kind:
    return Kind(body, BodyParser(body), embeddings)


_ANY: Final = _kind(Inference)

HOT_PATHS: Final[Mapping[str, Kind]] = {
    "/v1/chat/completions": _kind(Chat),
    "/v1/completions": _ANY,
    "/v1/embeddings": _kind(Inference, embeddings=True),
    "/v1/rerank": _ANY,
    "/v1/responses": _ANY,
    "/v1/messages": _ANY,
    "/v1/messages/count_tokens": _ANY,
    "/tokenize": _ANY,
    "/detokenize": _ANY,
}


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a call asks of which engine.

    `spelling` is the model's name as the client wrote it. `stream`: a client that waits gets
    headers and comments. `headers` are whole lines for the engine. `raw`: the engine's
    refusals are passed on as they are.
    """

    route: Route
    spelling: str
    path: bytes
    headers: bytes
    method: bytes = b"POST"
    stream: bool = False
    raw: bool = False


class InferenceApi:
    """Answers the hot paths. `autoload`: a model that is not loaded is, unless asked otherwise."""

    def __init__(
        self,
        *,
        gate: Gate,
        catalog: Catalog,
        inventory: Inventory,
        pool: EnginePool,
        stats: RequestStats,
        upstreams: Upstreams,
        upstream_timeout_s: float,
        keepalive_after_s: float,
        max_load_wait_s: float,
        max_queue_wait_s: float,
        max_body_bytes: int,
        autoload: bool = True,
    ) -> None:
        self.gate = gate
        self.catalog = catalog
        self.inventory = inventory
        self.pool = pool
        self.stats = stats
        self.upstreams = upstreams
        self.upstream_timeout_s = upstream_timeout_s
        self.keepalive_after_s = keepalive_after_s
        self.max_load_wait_s = max_load_wait_s
        self.max_queue_wait_s = max_queue_wait_s
        self.max_body_bytes = max_body_bytes
        self.autoload = autoload
        self._prefix = f"req_{secrets.token_hex(4)}"
        self._numbers = itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await _HotCall(self, scope, send, scope["path"]).run(receive)

    async def route(self, fields: Routing, *, embeddings: bool = False) -> Route:
        """Return the route of a request, checked on disk if it will cause a load.

        Raises:
            GatewayError: no such model, or a file no engine could load, and so on.
        """
        try:
            route = self.catalog.route(fields, embeddings=embeddings)
        except ModelNotFound:
            await self.inventory.refresh()  # it may have come since the last look
            route = self.catalog.route(fields, embeddings=embeddings)
        if route.file is None or self.pool.holds(route.spec.key):
            return route
        now = await self.inventory.verify(route.file)
        if now.revision == route.file.revision:
            return route
        await self.inventory.refresh()
        return self.catalog.route(fields, embeddings=embeddings)

    def check_loaded(self, route: Route, *, autoload: bool) -> None:
        """Let a request pass that causes no load, or that may.

        One that loads or sleeps counts as loaded.

        Raises:
            InvalidRequest: the model is not loaded, and `autoload` is off.
        """
        key = route.spec.key
        if autoload or not key.is_local or self.pool.view(key) is not None:
            return
        raise InvalidRequest(
            f"model is not loaded: {key.model}. Load it with POST /models/load, or let requests "
            "load it: leave autoload=false out, or set models_autoload.",
            param="model",
        )

    def request_id(self) -> bytes:
        """Return a new id for a request whose client sent none."""
        return f"{self._prefix}{next(self._numbers):08x}".encode()


class EngineCall(ABC):
    """One request that goes to an engine. `counted_as` is its path in the counters."""

    __slots__ = (
        "_answer",
        "_api",
        "_arrived",
        "_body",
        "_counted_as",
        "_headers",
        "_left",
        "_loop",
        "_scope",
        "_status",
        "_task",
    )

    def __init__(self, api: InferenceApi, scope: Scope, send: Send, counted_as: str) -> None:
        self._api = api
        self._scope = scope
        self._counted_as = counted_as
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self._loop = asyncio.get_running_loop()
        self._arrived = self._loop.time()
        self._body = b""  # what the engine gets; empty again once it has begun to answer
        self._left = False
        self._status = 200
        self._task: asyncio.Task[Any] | None = None
        self._answer = Answer(send, [(b"x-request-id", self._request_id())])

    @abstractmethod
    async def _prepare(self) -> Exchange | None:
        """Return what to ask of which engine; None: the call was answered without one."""

    async def run(self, receive: Receive) -> None:
        """Answer it."""
        api, scope = self._api, self._scope
        connection = connection_of(scope)
        api.stats.active += 1
        try:
            api.gate.check(scope["method"], scope["path"], self._headers)
            self._body = await read_body(self._headers, receive, api.max_body_bytes)
            self._task = asyncio.current_task(self._loop)
            connection.on_lost = self._client_left
            await self._serve()
        except GatewayError as error:
            await self._fail(error, connection)
        except ClientLeft:
            self._left = True
        except asyncio.CancelledError:
            if not self._left:
                raise
            if self._task is not None:
                self._task.uncancel()
        finally:
            connection.on_lost = None
            self._count(api.stats)

    async def _serve(self) -> None:
        asked = await self._prepare()
        if asked is None:
            return
        try:
            await self._exchange(asked)
        except (UpstreamUnreachable, EngineDied):
            if not asked.route.spec.key.is_local:
                raise  # it was tried again already
            # An engine of ours that listens no more has just died, and its end is on its way
            # to the scheduler. The next one may have the request: this one refused it, or
            # closed a kept connection on it at once (`RACE_S` in net/client.py).
            await self._api.pool.until_gone(asked.route.spec.key, timeout_s=DEATH_WAIT_S)
            await self._exchange(asked)

    async def _exchange(self, asked: Exchange) -> None:
        """Hold a lease until the client has the engine's answer."""
        api, route = self._api, asked.route
        claim = api.pool.claim(
            route.spec,
            ttl_s=route.ttl_s,
            # A stream is told how far the load is.
            wait_s=None if asked.stream else api.max_load_wait_s,
            queue_wait_s=api.max_queue_wait_s,
            spelling=asked.spelling,
        )
        try:
            engine = claim.engine or await self._wait(claim, stream=asked.stream)
            self._tell(claim, engine, route)
            name = f"The {'engine of' if claim.key.is_local else 'upstream'} {claim.key.model}"
            explain = None if asked.raw else partial(_explained, engine, self._scope["path"])
            response = await self._ask(asked, engine, name, explain)
            self._body = b""
            # A client may ask for another model as soon as it has its answer.
            await relay(
                response,
                self._answer,
                name=name,
                explain=explain,
                on_whole=claim.release,
                may_be_empty=claim.key.is_local,
            )
        finally:
            claim.release()

    async def _ask(
        self, asked: Exchange, engine: Engine, name: str, explain: Explain | None
    ) -> Response:
        """Ask the engine, and another's server with what that takes: see `Upstreams.reach`."""
        api, key = self._api, asked.route.spec.key
        client = engine.client
        assert client is not None  # a granted engine listens
        ask_once = partial(
            ask,
            client,
            asked.path,
            self._body,
            method=asked.method,
            headers=asked.headers,
            name=name,
            explain=explain,
        )
        if key.is_local:
            return await ask_once()
        response = await api.upstreams.reach(
            key.model, partial(ask_once, silence_s=api.upstream_timeout_s)
        )
        try:
            check_foreign(response, name=name)
        except UpstreamRedirects as error:
            log.warning("upstream redirects upstream=%s %s", key.model, error.detail)
            raise
        return response

    def _client_left(self) -> None:
        if not self._answer.finished and self._task is not None:
            self._left = True
            self._task.cancel()

    async def _wait(self, claim: Claim, *, stream: bool) -> Engine:
        """Wait for the engine; a stream gets comments meanwhile, so that nobody gives up."""
        if not stream:
            return await claim.granted()
        pause_s = self._api.keepalive_after_s
        while True:
            try:
                async with asyncio.timeout(pause_s):
                    return await claim.granted()
            except TimeoutError:
                pass
            if not self._answer.started:
                await self._answer.start(200, EVENT_STREAM_HEADERS)
                self._answer.events = True
            await self._answer.body(comment(self._api.pool.progress(claim)))
            pause_s = min(max(self._api.keepalive_after_s, 1.0), COMMENT_EVERY_S)

    def _tell(self, claim: Claim, engine: Engine, route: Route) -> None:
        """Say in the headers which engine it is and what the wait for it was."""
        stats = self._api.stats
        load, queue, queue_s = b"hit", b"dur=0.000", 0.0
        if claim.hit:
            stats.hits += 1
        else:
            stats.misses += 1
            ready = engine.ready or claim.asked
            queue_s = max(0.0, engine.started - claim.asked)
            load_s = max(0.0, ready - max(engine.started, claim.asked))
            load = b"%b;dur=%.3f" % (b"cold" if claim.first else b"waited", load_s)
            queue = b"dur=%.3f" % queue_s
        stats.queue_wait.add(queue_s)
        if self._answer.started:
            return
        self._answer.headers[1:] = [
            (b"x-xandrouting-engine", _labelled(engine, route)),
            (b"x-xandrouting-load", load),
            (b"x-xandrouting-queue", queue),
        ]
        if route.device_fallback is not None:
            told = f"{route.device_fallback}->{route.spec.key.device}"
            self._answer.headers.append((b"x-xandrouting-device-fallback", told.encode()))

    async def _fail(self, error: GatewayError, connection: Connection) -> None:
        """Tell the client of an error, as far as it can still be told."""
        self._status = error.status
        if error.status >= 500:
            log.info("request failed code=%s status=%d %s", error.code, error.status, error.message)
        answer = self._answer
        if not answer.started:
            body = to_bytes(error)
            length = (b"content-length", b"%d" % len(body))
            await answer.start(error.status, [*headers_of(error), length])
            await answer.body(body, last=True)
            return
        self._api.stats.stream_errors += 1
        if answer.events:
            with connection.closing():
                await answer.body(to_sse(error), last=True)
            return
        # A plain answer that is cut short: only the closed connection can say so. The server
        # would call it our mistake if we ended before it knows.
        lost = asyncio.Event()
        connection.on_lost = lost.set
        connection.close()
        await lost.wait()

    def _count(self, stats: RequestStats) -> None:
        stats.active -= 1
        if self._left:
            stats.cancelled += 1
            return
        now = self._loop.time()
        stats.answered[self._counted_as, self._status] += 1
        stats.duration.add(now - self._arrived)
        if self._answer.first_byte is not None:
            stats.first_byte.add(self._answer.first_byte - self._arrived)

    def _request_id(self) -> bytes:
        value = self._headers.get(b"x-request-id", b"")
        if 0 < len(value) <= MAX_REQUEST_ID and value.isascii():
            return value
        return self._api.request_id()


def _explained(
    engine: Engine, path: str, status: int, error: Mapping[str, Any]
) -> GatewayError | None:
    return engine.adapter.explain(status, error, path)


def _labelled(engine: Engine, route: Route) -> bytes:
    """Return which engine it is, and what the server chose it by if it did."""
    if not route.chosen_by:
        return engine.label
    return b"%b;auto=%b" % (engine.label, route.chosen_by.encode())


class _HotCall(EngineCall):
    """One request on a hot path."""

    __slots__ = ()

    async def _prepare(self) -> Exchange:
        kind = HOT_PATHS[self._scope["path"]]
        fields: Inference = kind.parser.parse(self._body)
        route = await self._api.route(fields, embeddings=kind.embeddings)
        self._api.check_loaded(route, autoload=self._autoload())
        self._body = body_for(self._body, fields, route.asked_model)
        # `fields` does not outlive this: parts of it hold on to the whole body.
        return Exchange(
            route,
            fields.model,
            self._engine_path(),
            self._engine_headers(),
            stream=fields.stream is True,
        )

    def _autoload(self) -> bool:
        """Return what the query says, as llama-server reads it, or else the setting."""
        query = self._scope["query_string"]
        if b"autoload" in query:
            said, *_ = parse_qs(query.decode("latin-1")).get("autoload", [""])
            if said:
                return said in ("true", "1")
        return self._api.autoload

    def _engine_path(self) -> bytes:
        query = self._scope["query_string"]
        path: bytes = self._scope["raw_path"]
        return path + b"?" + query if query else path

    def _engine_headers(self) -> bytes:
        lines = [b"content-type: application/json\r\n"]
        lines += [
            b"%b: %b\r\n" % (n, self._headers[n]) for n in _PASSED_HEADERS & self._headers.keys()
        ]
        return b"".join(lines)
