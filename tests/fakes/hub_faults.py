"""What can go wrong at a hub. Switched by `Hub.fault`, per path, at any time."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Event
from typing import Literal

Host = Literal["hub", "cdn"]


@dataclass(frozen=True)
class Cut:
    """Ends the connection after so many bytes of a body: with a reset, or as if that were all."""

    after_bytes: int
    reset: bool = False


@dataclass(frozen=True)
class Stall:
    """Sends so many bytes of a body and then nothing: for a time, or until released or left."""

    after_bytes: int
    for_s: float | None = None
    released: Event = field(default_factory=Event)


@dataclass(frozen=True)
class Refuse:
    """Answers with a status, at the hub or at the CDN, before any body."""

    status: int
    host: Host = "hub"
    retry_after_s: float | None = None
    code: str | None = None  # X-Error-Code


@dataclass(frozen=True)
class Corrupt:
    """Flips the bits of one byte, counted from the file's first."""

    at: int


@dataclass(frozen=True)
class Slow:
    """Sends no more than this."""

    bytes_per_s: float


@dataclass(frozen=True)
class IgnoreRange:
    """Sends the whole file with 200, whatever range was asked for."""


@dataclass(frozen=True)
class NeedsRange:
    """Refuses whoever asks for the whole file, as CDNs do with huge ones."""


@dataclass(frozen=True)
class Html:
    """Sends a page of 200 bytes with 200, as a captive portal would."""


@dataclass(frozen=True)
class WrongLength:
    """Says another size than the listing did, in every header; the body is cut or filled up."""

    by: int


Fault = Cut | Stall | Refuse | Corrupt | Slow | IgnoreRange | NeedsRange | Html | WrongLength
HTML = b"<!doctype html><title>Welcome</title>".ljust(200, b" ")
