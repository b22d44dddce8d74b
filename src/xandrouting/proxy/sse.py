"""Server-sent events, as far as a relay needs to know them: where one ends."""

from __future__ import annotations

import re
from typing import Final

DONE: Final = (b"data: [DONE]\n\n", b"data: [DONE]\r\n\r\n")
_TIGHT: Final = re.compile(rb"^data:(?! )", re.MULTILINE)
_ERROR: Final = re.compile(rb'^data: ?\{ ?"error" ?: ?[{"]', re.MULTILINE)
HOLD_BYTES: Final = 256 * 1024  # an event larger than this is passed on in pieces


def split_events(data: bytes) -> tuple[bytes, bytes]:
    """Split `data` after its last whole event; the second part is the beginning of the next.

    An event ends with an empty line, in LF or CRLF. A beginning that grows past
    `HOLD_BYTES` counts as whole, so that what is held back stays small.
    """
    if data.endswith((b"\n\n", b"\r\n\r\n")):
        return data, b""
    lf, crlf = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
    end = max(lf + 2 if lf >= 0 else 0, crlf + 4 if crlf >= 0 else 0)
    if len(data) - end > HOLD_BYTES:
        return data, b""
    return data[:end], data[end:]


def split_error(data: bytes) -> tuple[bytes, bytes]:
    """Split whole events before the first that is an error; b"" as the second part: none is.

    A model's own text cannot look like one: in it every quotation mark is escaped.
    """
    found = _ERROR.search(data)
    return (data, b"") if found is None else (data[: found.start()], data[found.start() :])


def spaced(data: bytes) -> bytes:
    """Return events with the blank behind `data:` that many clients wait for."""
    if not data.startswith(b"data:") or data.startswith(b"data: "):
        return data
    return _TIGHT.sub(b"data: ", data)


def comment(text: str) -> bytes:
    """Return an SSE comment, which every client skips."""
    return b": " + text.encode() + b"\n\n"
