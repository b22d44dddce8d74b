"""A port for an engine that nobody else is given before it listens."""

from __future__ import annotations

import socket
from typing import Final

HOST: Final = "127.0.0.1"


def reserve_port() -> int:
    """Return a port of 127.0.0.1 that the kernel gives to nobody else for a minute.

    A connection in TIME_WAIT keeps it from being picked for an outgoing connection or for
    another port 0. Only a listener with SO_REUSEADDR or SO_REUSEPORT may still have it, as
    every server sets one of them: Python's the first, llama.cpp's the second.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((HOST, 0))
        listener.listen(1)
        port: int = listener.getsockname()[1]
        with socket.create_connection((HOST, port)):
            accepted, _ = listener.accept()
            accepted.close()  # who closes first waits
    return port
