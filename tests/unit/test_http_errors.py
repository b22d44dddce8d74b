"""An error as an answer."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from xandrouting.core.errors import (
    EngineRejected,
    GatewayError,
    InvalidRequest,
    MethodNotAllowed,
    QueueFull,
    Unauthorized,
)
from xandrouting.http.errors import body_of, harmless, headers_of, to_bytes, to_sse


def _family(error: type[GatewayError]) -> Iterator[type[GatewayError]]:
    yield error
    for child in error.__subclasses__():
        yield from _family(child)


FAMILY = sorted(set(_family(GatewayError)), key=lambda error: error.__name__)


@pytest.mark.parametrize("kind", FAMILY)
def test_every_error_has_the_one_shape(kind: type[GatewayError]) -> None:
    error = kind("qwen cannot do that.")
    assert body_of(error) == {
        "error": {
            "message": "qwen cannot do that.",
            "type": kind.error_type,
            "code": kind.code,
            "param": None,
        },
        "detail": "qwen cannot do that.",
    }
    assert json.loads(to_bytes(error)) == body_of(error)
    assert headers_of(error)[0] == (b"content-type", b"application/json")


def test_param_and_details_are_shown_and_detail_is_not() -> None:
    error = InvalidRequest(
        "ttl: too small.", param="ttl", details={"least": 0}, detail="/opt/secret --key=1"
    )
    assert body_of(error)["error"] == {
        "message": "ttl: too small.",
        "type": "invalid_request_error",
        "code": "invalid_request",
        "param": "ttl",
        "details": {"least": 0},
    }
    assert b"secret" not in to_bytes(error)


def test_a_rejection_keeps_the_engine_s_own_fields() -> None:
    said = {
        "message": "the prompt is too long",
        "type": "exceed_context_size_error",
        "code": "context_length_exceeded",
        "param": "messages",
        "n_prompt_tokens": 9000,
        "n_ctx": 4096,
    }
    error = EngineRejected("the prompt is too long", status=413, error=said)
    assert error.status == 413
    assert body_of(error) == {"error": said, "detail": "the prompt is too long"}


@pytest.mark.parametrize("code", [400, None, 1.5, ["x"]])
def test_a_rejection_s_code_is_a_text(code: object) -> None:
    # llama.cpp repeats the status there.
    error = EngineRejected("no", error={"code": code, "message": "no", "type": "t"})
    inner = body_of(error)["error"]
    assert (inner["code"], inner["type"]) == ("engine_rejected", "t")


def test_what_the_engine_left_out_is_filled_in() -> None:
    inner = body_of(EngineRejected("no", error={"type": None, "message": None}))["error"]
    assert inner == {
        "message": "no",
        "type": "invalid_request_error",
        "code": "engine_rejected",
        "param": None,
    }
    assert body_of(EngineRejected("no"))["error"] == inner


def test_two_words_are_never_sent() -> None:
    # The XandAI front end swallows messages with either.
    said = {"message": "Unexpected JSON token", "code": "x"}
    body = body_of(EngineRejected("Unexpected JSON token", error=said))
    assert body["error"]["message"] == body["detail"] == harmless("Unexpected JSON token")
    assert "JSON" not in body["detail"]
    assert "Unexpected" not in body["detail"]
    assert body["detail"] == "unexpected json token"


@pytest.mark.parametrize(
    ("seconds", "sent"), [(0.0, b"0"), (0.2, b"1"), (5.0, b"5"), (9.01, b"10")]
)
def test_retry_after_is_in_whole_seconds_rounded_up(seconds: float, sent: bytes) -> None:
    assert (b"retry-after", sent) in headers_of(QueueFull("later", retry_after_s=seconds))


def test_headers_are_there_only_where_they_mean_something() -> None:
    assert [name for name, _ in headers_of(QueueFull("later"))] == [b"content-type"]
    assert (b"www-authenticate", b"Bearer") in headers_of(Unauthorized("who?"))
    assert (b"allow", b"GET, POST") in headers_of(MethodNotAllowed("no", allow="GET, POST"))


def test_in_a_stream_it_is_one_last_event() -> None:
    error = InvalidRequest("two\nlines é")
    event = to_sse(error)
    assert event.startswith(b"data: {")
    assert event.endswith(b"}\n\n")
    assert event.count(b"\n") == 2
    assert b"[DONE]" not in event
    assert json.loads(event.removeprefix(b"data: ")) == body_of(error)
