"""What llama-server's router would say of our events."""

from __future__ import annotations

import json
from typing import Any

import pytest

from xandrouting.http.router_calls import RouterNews
from xandrouting.telemetry.events import Event

A = "/models/a.gguf"


def told(event: str, *, left: bool = False, **data: Any) -> dict[str, Any] | None:
    """Return the data of what the router's stream says of one event of a model."""
    line = RouterNews(lambda _: left)(
        Event("x-1", "model", "model", {"id": A, "event": event} | data)
    )
    if not line:
        return None
    assert line.startswith(b"data: ")
    assert line.endswith(b"\n\n")
    said = json.loads(line[6:])
    assert (said.pop("model"), said.pop("event"), said.keys()) == (A, "model_status", {"data"})
    found: dict[str, Any] = said["data"]
    return found


@pytest.mark.parametrize(
    ("event", "status"),
    [
        ("starting", "loading"),
        ("ready", "loaded"),
        ("sleeping", "sleeping"),
        ("gone", "unloaded"),
        ("failed", None),
        ("stopping", None),
    ],
)
def test_states(event: str, status: str | None) -> None:
    assert told(event) == (None if status is None else {"status": status})


def test_progress() -> None:
    assert told("progress", progress={"percent": None}) is None
    assert told("progress") is None
    assert told("progress", progress={"percent": 50}) == {
        "status": "loading",
        "progress": {"stages": ["text_model"], "current": "text_model", "value": 0.5},
    }


def test_a_failed_load_tells_the_exit_code() -> None:
    error = {"message": "…", "details": {"reason": "exited", "exit_code": 1}}
    assert told("gone", error=error) == {"status": "unloaded", "exit_code": 1}
    for unknown in ({"message": "…"}, {"details": {"exit_code": None}}):
        assert told("gone", error=unknown) == {"status": "unloaded"}


def test_one_engine_of_several_is_not_the_model() -> None:
    assert told("gone", left=True) is None
    assert told("ready", left=True) == {"status": "loaded"}


def test_the_whole_list() -> None:
    news = RouterNews(lambda _: False)
    reload = b'data: {"model":"*","event":"models_reload"}\n\n'
    assert news(Event("x-1", "snapshot", "snapshot", {})) == b""  # it has just asked
    assert news(Event("x-2", "model", "models_reload", {})) == reload
    assert news(Event("x-3", "snapshot", "snapshot", {})) == reload  # it lost some
    assert news(Event("x-3", "bye", "bye", {})) == b""
