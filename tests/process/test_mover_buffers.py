"""How much a mover lets wait in the kernel, where a kill -9 would lose it."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from xandrouting.downloads import mover_client
from xandrouting.downloads.mover_client import bound_buffer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux tells how far it is")

ALLOWED = Path("/proc/sys/net/core/rmem_max")


@pytest.fixture
def connection() -> Iterator[socket.socket]:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as connection,
    ):
        yield connection


def buffer_bytes(connection: socket.socket) -> int:
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


def test_little_where_the_other_side_is_near(
    connection: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mover_client, "_NEAR_US", 1_000_000)  # this machine may be a slow one
    bound_buffer(connection)
    kernel_doubles = 2 * min(mover_client._NEAR_BYTES, int(ALLOWED.read_text()))
    assert buffer_bytes(connection) == kernel_doubles


def test_as_the_kernel_likes_where_it_is_far(
    connection: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = buffer_bytes(connection)
    monkeypatch.setattr(mover_client, "_NEAR_US", 0)
    bound_buffer(connection)
    assert buffer_bytes(connection) == before
