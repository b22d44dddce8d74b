"""How vLLM sleeps: by the calls that its development mode serves, on accelerators only.

It takes `FLAG` and `ENV`. As vLLM 0.32 has it: an engine that sleeps at one level answers a
call for another and does nothing, so it wakes in between; level 2 wakes with nothing in its
weights' memory; a call for sleep on a CPU answers 200, frees nothing and hangs requests. It
asks no key for these paths: the gate in `vllm_path/` does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final
from urllib.parse import unquote_to_bytes

from xandrouting.core.model import Level
from xandrouting.engines.base import Call

FLAG: Final = "--enable-sleep-mode"
ENV: Final = (("VLLM_SERVER_DEV_MODE", "1"),)

# What is for clients, by the first part of a path. In development mode the rest can also stop
# the engine, replace its weights, run its methods by name and tell its environment.
_PUBLIC: Final = frozenset(
    (
        *(b"", b"v1", b"v2", b"health", b"load", b"metrics", b"ping", b"version"),
        *(b"tokenize", b"detokenize", b"classify", b"pooling", b"rerank", b"score"),
        *(b"docs", b"openapi.json", b"redoc"),
    )
)

_AWAKE: Final = {"status": "awake"}
_WAKE: Final = Call(b"/wake_up", answer=_AWAKE)
_WAKE_WEIGHTS: Final = Call(b"/wake_up?tags=weights")
_WAKE_CACHE: Final = Call(b"/wake_up?tags=kv_cache", answer=_AWAKE)
_RELOAD: Final = Call(b"/collective_rpc", json.dumps({"method": "reload_weights"}).encode())
# What the cache held is gone at either level, and vLLM would take it for there.
_RESET: Final = Call(b"/reset_prefix_cache", answer={"success": True})


def is_public(path: bytes) -> bool:
    """Whether a path, as sent and with its query, may be passed on for a client."""
    whole = unquote_to_bytes(path.partition(b"?")[0])
    part = whole.lstrip(b"/").partition(b"/")[0]  # who stands before it may join its slashes
    return part in _PUBLIC


class VllmSleep:
    """The calls of vLLM's sleep mode."""

    def levels_on(self, device: str) -> tuple[Level, ...]:
        """Return both levels on a GPU, none on a CPU."""
        on_gpu = device.partition(":")[0] == "cuda"
        return (Level.OFFLOADED, Level.DROPPED) if on_gpu else ()

    def suspend(self, level: Level, current: Level | None) -> Sequence[Call]:
        """Return the call for sleep; one that sleeps already wakes before it."""
        sleep = Call(b"/sleep?level=%d&mode=abort" % level, answer={"level": int(level)})
        return (sleep,) if current is None else (*self.resume(current), sleep)

    def resume(self, level: Level) -> Sequence[Call]:
        """Return the calls that wake it, its weights read again where they were dropped."""
        if level is Level.OFFLOADED:
            return (_WAKE, _RESET)
        return (_WAKE_WEIGHTS, _RELOAD, _WAKE_CACHE, _RESET)
