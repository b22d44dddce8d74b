"""Why no connection could be made, in words for people."""

from __future__ import annotations

import errno
import socket
import ssl
from typing import Final

_WORDS: Final = {
    errno.ECONNREFUSED: "connection refused",
    errno.ECONNRESET: "the connection was closed at once",
    errno.EHOSTUNREACH: "its machine cannot be reached",
    errno.ENETUNREACH: "its network cannot be reached",
}


def why_not(error: OSError, timeout_s: float) -> str:
    """Return what an error means that came within `timeout_s`, or is that time's end."""
    match error:
        case TimeoutError():
            return f"no connection within {timeout_s:g} s"
        case socket.gaierror():
            return "its name cannot be resolved"
        case ssl.SSLCertVerificationError():
            return f"its certificate is refused: {error.verify_message}"
        case ssl.SSLError():
            return "it does not speak TLS: is its address http:// and not https://?"
    return _WORDS.get(error.errno or 0, f"no connection ({type(error).__name__})")
