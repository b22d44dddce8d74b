"""`/upstream/{model}/{path}`: a model's engine as it is, as llama-swap hands it out."""

from __future__ import annotations

from typing import Final

from xandrouting.core.errors import InvalidRequest, ModelNotFound, NotFound
from xandrouting.core.model import Backend
from xandrouting.engines.vllm_sleep import is_public
from xandrouting.http.body import Receive
from xandrouting.http.inference import EngineCall, Exchange, InferenceApi, Scope
from xandrouting.http.model_path import Split, climbs, split
from xandrouting.inventory.model_file import shown
from xandrouting.proxy.forward import Send
from xandrouting.proxy.headers import forwarded
from xandrouting.proxy.request import Routing

UPSTREAM: Final = "/upstream/"
_PREFIX: Final = UPSTREAM.encode()


class UpstreamApi:
    """Passes any request on to a model's engine, which is loaded if it is not."""

    def __init__(self, inference: InferenceApi) -> None:
        self._inference = inference

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await _UpstreamCall(self._inference, scope, send, UPSTREAM).run(receive)


class _UpstreamCall(EngineCall):
    """One request under /upstream."""

    __slots__ = ()

    async def _prepare(self) -> Exchange | None:
        raw: bytes = self._scope["raw_path"]
        if climbs(raw):
            raise InvalidRequest("A path under /upstream may not go up with '..'.")
        found = await self._split(raw.removeprefix(_PREFIX))
        query = self._scope["query_string"]
        asked = b"?" + query if query else b""
        method: str = self._scope["method"]
        if not found.rest:
            await self._redirect(raw + b"/" + asked, keeps_method=method not in ("GET", "HEAD"))
            return None
        route = await self._api.route(Routing(model=found.file.id))
        by_vllm = route.spec.key.backend in (Backend.VLLM, Backend.TRANSFORMERS)
        if by_vllm and not is_public(found.rest):
            raise NotFound(f"Clients may not ask this of the engine of {found.file.id}.")
        self._api.check_loaded(route, autoload=self._api.autoload)
        return Exchange(
            route,
            found.name,
            found.rest + asked,
            forwarded(self._scope["headers"]),
            # The server leaves the body out; the client here would wait for it.
            method=b"GET" if method == "HEAD" else method.encode(),
            raw=True,
        )

    async def _split(self, path: bytes) -> Split:
        found = split(self._api.catalog.names(), path)
        if found is None:
            await self._api.inventory.refresh()  # it may have come since the last look
            found = split(self._api.catalog.names(), path)
        if found is None:
            name = shown(path.decode("latin-1"))
            raise ModelNotFound(
                f"model not found: '{name}' begins with no model's name. GET /models lists all."
            )
        return found

    async def _redirect(self, to: bytes, *, keeps_method: bool) -> None:
        """Have the client ask for the model's root: what is relative to it then leads there."""
        headers = [(b"location", to), (b"content-length", b"0")]
        self._status = 308 if keeps_method else 301
        await self._answer.start(self._status, headers)
        await self._answer.body(b"", last=True)
