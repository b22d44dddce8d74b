"""The calls of vLLM's sleep mode, as vLLM 0.32 takes them, and who may make them."""

from __future__ import annotations

import pytest

from xandrouting.core.model import Level
from xandrouting.engines.vllm_sleep import VllmSleep, is_public
from xandrouting.pool.sleeping import _holds

SLEEP = VllmSleep()


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:1"])
def test_it_is_offered_on_a_gpu(device: str) -> None:
    assert SLEEP.levels_on(device) == (Level.OFFLOADED, Level.DROPPED)


def test_it_is_never_offered_on_a_cpu() -> None:
    assert SLEEP.levels_on("cpu") == ()


def test_an_engine_that_is_awake_is_called_once() -> None:
    [call] = SLEEP.suspend(Level.OFFLOADED, None)
    assert (call.path, call.body) == (b"/sleep?level=1&mode=abort", b"")
    assert _holds(b'{"status": "sleeping", "level": 1}', call.answer)
    assert not _holds(b'{"status": "sleeping", "level": 2}', call.answer)


def test_one_that_sleeps_wakes_before_it_sleeps_deeper() -> None:
    assert [call.path for call in SLEEP.suspend(Level.DROPPED, Level.OFFLOADED)] == [
        b"/wake_up",
        b"/reset_prefix_cache",
        b"/sleep?level=2&mode=abort",
    ]


def test_what_was_dropped_is_read_before_the_cache_is_there() -> None:
    calls = SLEEP.resume(Level.DROPPED)
    assert [call.path for call in calls] == [
        b"/wake_up?tags=weights",
        b"/collective_rpc",
        b"/wake_up?tags=kv_cache",
        b"/reset_prefix_cache",
    ]
    assert calls[1].body == b'{"method": "reload_weights"}'


@pytest.mark.parametrize("answer", [b"", b"[]", b"awake", b'{"status": "sleeping"}', b'"awake"'])
def test_an_answer_that_says_something_else_is_none(answer: bytes) -> None:
    [wake, _] = SLEEP.resume(Level.OFFLOADED)
    assert not _holds(answer, wake.answer)
    assert _holds(b'{"status": "awake", "tags": null}', wake.answer)


@pytest.mark.parametrize(
    "path", [b"", b"/", b"/v1/models", b"/v1/completions?x=1", b"/health", b"/metrics", b"/docs"]
)
def test_what_is_for_clients(path: bytes) -> None:
    assert is_public(path)


@pytest.mark.parametrize(
    "path",
    [
        b"/sleep",
        b"/sleep?level=2",
        b"/sleep/",
        b"//sleep",
        b"/%73leep",
        b"/wake_up",
        b"/collective_rpc",
        b"/reset_prefix_cache",
        b"/is_sleeping",
        b"/pause",
        b"/update_weights",
        b"/server_info",
        b"/start_profile",
    ],
)
def test_what_is_not(path: bytes) -> None:
    assert not is_public(path)
