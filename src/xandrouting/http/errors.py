"""The one place where an error becomes an answer."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from xandrouting.core.errors import EngineRejected, GatewayError, MethodNotAllowed
from xandrouting.net.client import Headers

_ENCODE = msgspec.json.Encoder().encode


def body_of(error: GatewayError) -> dict[str, Any]:
    """Return the body every error answer has."""
    message = harmless(error.message)
    inner: dict[str, Any] = {
        "message": message,
        "type": error.error_type,
        "code": error.code,
        "param": error.param,
    }
    if isinstance(error, EngineRejected):
        inner |= {k: v for k, v in error.error.items() if v is not None} | {"message": message}
        if not isinstance(inner["code"], str):  # llama.cpp repeats the status there
            inner["code"] = error.code
    if error.details is not None:
        inner["details"] = dict(error.details)
    return {"error": inner, "detail": message}


def harmless(message: str) -> str:
    """Return an engine's words without the two that the XandAI front end swallows."""
    return message.replace("JSON", "json").replace("Unexpected", "unexpected")


def headers_of(error: GatewayError) -> Headers:
    """Return the headers an error answer has besides its length."""
    headers: Headers = [(b"content-type", b"application/json")]
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(math.ceil(error.retry_after_s)).encode()))
    if isinstance(error, MethodNotAllowed):
        headers.append((b"allow", error.allow.encode()))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return headers


def to_bytes(error: GatewayError) -> bytes:
    """Render an error raised before the first response byte."""
    return _ENCODE(body_of(error))


def to_sse(error: GatewayError) -> bytes:
    """Render an error after the stream began: a last event, and no [DONE] after it."""
    return b"data: " + to_bytes(error) + b"\n\n"
