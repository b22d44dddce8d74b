"""Which headers cross the gateway."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from xandrouting.net.client import Headers

# Hop by hop, the engine's own business, or set by the gateway itself.
_DROPPED: Final = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"transfer-encoding",
        b"te",
        b"trailer",
        b"upgrade",
        b"proxy-authenticate",
        b"proxy-connection",
        b"server",
        b"date",
        b"set-cookie",
        b"cache-control",
        b"x-accel-buffering",
        b"x-request-id",
        b"access-control-allow-origin",
        b"access-control-allow-credentials",
        b"access-control-allow-methods",
        b"access-control-allow-headers",
        b"access-control-expose-headers",
        b"access-control-max-age",
        # What would bind a browser to more than this one answer.
        b"alt-svc",
        b"clear-site-data",
        b"nel",
        b"refresh",
        b"report-to",
        b"reporting-endpoints",
        b"strict-transport-security",
        b"www-authenticate",
    )
)

_OURS: Final = b"x-xandrouting-"  # a gateway behind this one says the same of itself

EVENT_STREAM: Final = b"text/event-stream"

STREAM_HEADERS: Final[Headers] = [
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

EVENT_STREAM_HEADERS: Final[Headers] = [
    (b"content-type", EVENT_STREAM),
    *STREAM_HEADERS,
]


def passed_on(headers: Headers) -> Headers:
    """Return the upstream's headers that the client gets."""
    return [pair for pair in headers if pair[0] not in _DROPPED and not pair[0].startswith(_OURS)]


# Between the client and the gateway alone, or set anew for the engine.
_NOT_FORWARDED: Final = frozenset(
    (
        b"accept-encoding",  # an event stream must stay readable here
        b"authorization",
        b"connection",
        b"content-length",
        b"cookie",
        b"expect",
        b"host",
        b"keep-alive",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-api-key",
    )
)


def forwarded(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return a client's headers as the lines that an engine gets of them."""
    lines = [b"%b: %b\r\n" % pair for pair in headers if pair[0] not in _NOT_FORWARDED]
    return b"".join(lines)
