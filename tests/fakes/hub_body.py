"""A fake hub's bodies: ranges, signatures, and bytes that go wrong on their way."""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import re
import select
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from tests.fakes.hub_content import File
from tests.fakes.hub_faults import Corrupt, Cut, Fault, Slow, Stall

_PIECE_BYTES = 4 << 20
_TICK_S = 0.005  # of a slow body
_SIOCOUTQNSD = 0x894B  # Linux: what was sent and not acknowledged is not in it
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class Signatures:
    """Signed addresses, as a CDN checks them."""

    def __init__(self, ttl_s: float = 3600.0) -> None:
        self.ttl_s = ttl_s
        self._secret = os.urandom(16)

    def sign(self, what: str) -> str:
        expires = f"{time.time() + self.ttl_s:.3f}"
        return f"Expires={expires}&Signature={self._of(what, expires)}"

    def valid(self, what: str, query: Mapping[str, Sequence[str]]) -> bool:
        expires, signature = (query.get(name, [""])[0] for name in ("Expires", "Signature"))
        if not hmac.compare_digest(signature, self._of(what, expires)):
            return False
        return float(expires) > time.time()

    def _of(self, what: str, expires: str) -> str:
        return hmac.new(self._secret, f"{what} {expires}".encode(), hashlib.sha256).hexdigest()


def range_of(asked: str, size: int) -> tuple[int, int] | None:
    """Return where an asked range begins and ends; None: it cannot be satisfied."""
    match = _RANGE.fullmatch(asked.strip())
    if match is None:
        return None
    start = int(match[1])
    end = min(int(match[2]) + 1, size) if match[2] else size
    return (start, end) if start < end else None


def unsent_bytes(connection: socket.socket) -> int:
    """Count what waits in the kernel and has not been sent yet."""
    try:
        packed = fcntl.ioctl(connection, _SIOCOUTQNSD, b"\0" * 4)
    except OSError:
        return 0
    return int(struct.unpack("i", packed)[0])


def send_body(
    connection: socket.socket,
    file: File,
    start: int,
    end: int,
    faults: Sequence[Fault],
    sent: Callable[[File, int], None],
) -> bool:
    """Send what is between two offsets, with its faults; return whether all went out."""
    corrupt = {fault.at for fault in faults if isinstance(fault, Corrupt)}
    rate = min((fault.bytes_per_s for fault in faults if isinstance(fault, Slow)), default=None)
    breaks = sorted(
        (fault for fault in faults if isinstance(fault, Cut | Stall)),
        key=lambda fault: fault.after_bytes,
    )
    at = start
    try:
        for fault in breaks:
            until = min(start + fault.after_bytes, end)
            at = _send(connection, file, at, until, corrupt, rate, sent)
            if until == end and fault.after_bytes > end - start:
                break  # it was over before that
            if isinstance(fault, Cut):
                if fault.reset:
                    sent(file, -unsent_bytes(connection))  # a reset drops it
                _cut(connection, reset=fault.reset)
                return False
            if not _stall(connection, fault):
                return False
        _send(connection, file, at, end, corrupt, rate, sent)
    except OSError:
        sent(file, -unsent_bytes(connection))
        return False
    return True


def _send(
    connection: socket.socket,
    file: File,
    start: int,
    end: int,
    corrupt: set[int],
    rate: float | None,
    sent: Callable[[File, int], None],
) -> int:
    piece = _PIECE_BYTES if rate is None else max(1, min(_PIECE_BYTES, int(rate * _TICK_S)))
    began, at = time.monotonic(), start
    while at < end:
        size = min(piece, end - at)
        if at + size > file.blob.size or any(at <= byte < at + size for byte in corrupt):
            data = bytearray(file.blob.read(at, size).ljust(size, b"\0"))
            for byte in corrupt:
                if at <= byte < at + size:
                    data[byte - at] ^= 0xFF
            connection.sendall(data)
        else:
            size = os.sendfile(connection.fileno(), file.blob.fd, at, size)
        at += size
        sent(file, size)
        if rate is not None:
            ahead_s = (at - start) / rate - (time.monotonic() - began)
            if ahead_s > 0 and _left(connection, ahead_s):
                raise ConnectionAbortedError
    return at


def _left(connection: socket.socket, timeout_s: float) -> bool:
    """Wait; return whether the other side went away meanwhile."""
    readable, _, _ = select.select([connection], [], [], timeout_s)
    if not readable:
        return False
    return connection.recv(1, socket.MSG_PEEK) == b""


def _stall(connection: socket.socket, fault: Stall) -> bool:
    """Say nothing for the time; return False if the other side went away."""
    deadline = None if fault.for_s is None else time.monotonic() + fault.for_s
    while not fault.released.is_set() and (deadline is None or time.monotonic() < deadline):
        if _left(connection, _TICK_S):
            return False
    return True


def _cut(connection: socket.socket, *, reset: bool) -> None:
    with suppress(OSError):
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            connection.shutdown(socket.SHUT_WR)
