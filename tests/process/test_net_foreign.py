"""The client at somebody else's server: how long it is listened to, and why it is not reached."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
import threading
from pathlib import Path

import pytest

from tests.fakes.raw_server import Peer, raw_server
from tests.process.test_net_client import closed_port, on_both_loops, saying, whole
from tests.waiting import async_wait_for
from xandrouting.net.client import (
    MAX_HEAD_BYTES,
    PAUSE_BYTES,
    Client,
    ConnectError,
    SilentError,
    UpstreamError,
)

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


# Silence.


@on_both_loops
async def test_one_that_says_nothing_is_given_up() -> None:
    async def silent(peer: Peer) -> None:
        await peer.request()
        await peer.left()

    async with raw_server(silent) as server:
        client = Client(server.url)
        with pytest.raises(SilentError, match=r"nothing came for 0\.1 s") as caught:
            await client.request(b"POST", b"/", silence_s=0.1)
        assert not caught.value.began
        await server.ended(0)  # it was cut
        assert client.connections == 0


@on_both_loops
async def test_one_that_falls_silent_is_given_up() -> None:
    async def stops(peer: Peer) -> None:
        await peer.request()
        await peer.send(HEAD + chunk(b"a"))
        await peer.left()

    async with raw_server(stops) as server:
        response = await Client(server.url).request(b"POST", b"/", silence_s=0.1)
        assert await response.more()
        assert response.take() == b"a"
        with pytest.raises(SilentError) as caught:
            await response.more()
        assert caught.value.began
        response.close()
        await server.ended(0)


@on_both_loops
async def test_one_that_goes_on_slowly_is_not() -> None:
    async def slow(peer: Peer) -> None:
        await peer.request()
        await peer.send(HEAD)
        for _ in range(6):
            await asyncio.sleep(0.1)
            await peer.send(chunk(b"a"))
        await peer.send(chunk(b""))
        await peer.left()

    async with raw_server(slow) as server:
        client = Client(server.url)
        response = await client.request(b"POST", b"/", silence_s=0.4)
        assert await whole(response) == b"aaaaaa"
        response.close()
        assert client.connections == 1  # and it is kept
        client.close()


@on_both_loops
async def test_a_client_that_does_not_read_is_no_silence() -> None:
    body = b"x" * (64 * PAUSE_BYTES)

    async with raw_server(saying(HEAD + chunk(body) + chunk(b""))) as server:
        client = Client(server.url)
        response = await client.request(b"POST", b"/", silence_s=0.2)
        assert await response.more()
        await asyncio.sleep(0.5)
        assert await whole(response) == body
        client.close()


@on_both_loops
async def test_the_next_request_begins_anew() -> None:
    async def twice(peer: Peer) -> None:
        for _ in range(2):
            await peer.request()
            await peer.send(HEAD + chunk(b"a") + chunk(b""))
        await peer.left()

    async with raw_server(twice) as server:
        client = Client(server.url)
        for silence_s in (0.1, None):
            response = await client.request(b"POST", b"/", silence_s=silence_s)
            await whole(response)
            response.close()
            await asyncio.sleep(0.2)  # the first one's time is over
        assert server.accepted == 1
        client.close()


# Why there is no connection.


@on_both_loops
async def test_why_it_is_not_reached() -> None:
    port = closed_port()
    for url, why in (
        (f"http://127.0.0.1:{port}", "^connection refused$"),
        (f"http://localhost:{port}", "^connection refused$"),  # at both of its addresses
        ("http://nobody.invalid", "^its name cannot be resolved$"),
    ):
        with pytest.raises(ConnectError, match=why):
            await Client(url).request(b"GET", b"/")


@on_both_loops
async def test_a_name_that_nobody_answers_for_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loops look up names in a few threads: two on uvloop."""
    answers = threading.Event()
    look_up = socket.getaddrinfo

    def slow(host: str, *more: object, **named: object) -> object:
        if host == "slow.invalid":
            answers.wait(20)
        return look_up(host, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    slow_one = [Client("http://slow.invalid", connect_timeout_s=0.1) for _ in range(8)]
    try:
        for client in slow_one:
            with pytest.raises(ConnectError, match=r"^no connection within 0\.1 s$"):
                await client.request(b"GET", b"/")
        async with raw_server(saying(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")) as server:
            client = Client(server.url.replace("127.0.0.1", "localhost"))
            assert (await client.get(b"/"))[0] == 200
            client.close()
    finally:
        answers.set()
        await async_wait_for(lambda: not any("slow.inv" in t.name for t in threading.enumerate()))


@on_both_loops
async def test_a_name_is_looked_up_once_for_all_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def none(host: str, *_: object, **__: object) -> object:
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "no")

    monkeypatch.setattr(socket, "getaddrinfo", none)
    client = Client("http://a.invalid")
    asking = (client.request(b"GET", b"/") for _ in range(20))
    errors = await asyncio.gather(*asking, return_exceptions=True)
    assert {str(error) for error in errors} == {"its name cannot be resolved"}
    assert asked == ["a.invalid"]


@on_both_loops
async def test_headers_without_an_end_are_given_up() -> None:
    async def endless(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n")
        try:
            while peer.sent_bytes < 100 * MAX_HEAD_BYTES:
                await peer.send(b"x-more: " + b"a" * 8000 + b"\r\n")
        except ConnectionError:
            pass

    async with raw_server(endless) as server:
        client = Client(server.url)
        with pytest.raises(UpstreamError, match="its headers have no end"):
            await client.request(b"POST", b"/")
        await server.ended(0)
        assert client.connections == 0


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
@on_both_loops
async def test_a_certificate_nobody_vouches_for(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ("-subj", "/CN=localhost", "-days", "1", "-nodes")
    made = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-keyout", key, "-out", certificate)
    subprocess.run([*made, *subject], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = await asyncio.start_server(lambda _, w: w.close(), "127.0.0.1", 0, ssl=context)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ConnectError, match=r"^its certificate is refused: self-signed"):
            await Client(f"https://localhost:{port}").request(b"GET", b"/")
