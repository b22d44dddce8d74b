"""The calls of llama-swap, over the same engines; `/upstream` is in a file of its own.

Built to llama-swap's README.md and to the handlers in its internal/server.
docs/compatibility.md lists what differs.
"""

from __future__ import annotations

import shlex

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

from xandrouting.core.engine import EngineView
from xandrouting.core.engine_state import EngineState
from xandrouting.core.errors import ModelNotFound
from xandrouting.http.lifecycle import engines_of, let_go, local_engines
from xandrouting.http.model_path import named
from xandrouting.http.router_calls import arguments
from xandrouting.http.schemas import Running, RunningItem, SwapMessage
from xandrouting.http.services import Services
from xandrouting.pool.engine import Engine
from xandrouting.proxy.request import UnloadRequest

_STATES = {
    EngineState.STARTING: "starting",
    EngineState.READY: "ready",
    EngineState.SUSPENDING: "ready",  # a request wakes it
    EngineState.SLEEPING: "ready",
    EngineState.DRAINING: "stopping",
    EngineState.STOPPING: "stopping",
}


def add_swap_calls(app: FastAPI, services: Services) -> None:
    """Add the calls that clients of llama-swap use."""

    @app.get("/running", tags=["llama-swap"])
    async def running() -> Running:
        """List every engine that is not gone, as llama-swap does."""
        items = [_running(view, engine) for view, engine in local_engines(services)]
        return Running(running=sorted(items, key=lambda item: item.model))

    @app.get("/unload", tags=["llama-swap"], response_class=PlainTextResponse)
    async def unload() -> str:
        """Unload every engine at once, as llama-swap does."""
        await let_go(services, local_engines(services), force=True)
        return "OK"

    @app.post("/api/models/unload", tags=["llama-swap"])
    async def unload_all() -> SwapMessage:
        """Unload every engine at once, as llama-swap does."""
        await let_go(services, local_engines(services), force=True)
        return SwapMessage(msg="ok")

    @app.post(
        "/api/models/unload/{model:path}", tags=["llama-swap"], response_class=PlainTextResponse
    )
    async def unload_model(model: str) -> str:
        """Unload a model at once, as llama-swap does; its name may hold slashes."""
        try:
            going = engines_of(services, UnloadRequest(model=named(model)))
        except ModelNotFound as error:
            raise ModelNotFound(f"model not found: {error.message}", param="model") from None
        await let_go(services, going, force=True)
        return "OK"


def _running(view: EngineView, engine: Engine) -> RunningItem:
    return RunningItem(
        model=view.engine.key.model,
        state=_STATES[view.state],
        cmd=shlex.join(arguments(view)),
        proxy="" if engine.handle is None else engine.handle.base_url,
        ttl=int(view.ttl_s),
        name="",
        description="",
    )
