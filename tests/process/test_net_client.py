"""The upstream client against a server that misbehaves as it is told, over real sockets."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import inspect
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from tests.fakes.raw_server import Peer, Request, raw_server
from tests.waiting import async_wait_for
from xandrouting.net import client as module
from xandrouting.net.client import (
    JOIN_BYTES,
    PAUSE_BYTES,
    Client,
    ConnectError,
    Response,
    UpstreamError,
)

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
ONE_READ_BYTES = 256 * 1024  # of either loop


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run the test on asyncio's loop and on uvloop: they cut and pause each in their own way."""

    async def at_most_20_s(**fixtures: Any) -> None:
        async with asyncio.timeout(20):
            await test(**fixtures)

    @functools.wraps(test)
    def run(new_loop: Callable[[], asyncio.AbstractEventLoop], **fixtures: Any) -> None:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(at_most_20_s(**fixtures))

    signature = inspect.signature(test)
    kind = inspect.Parameter.KEYWORD_ONLY
    added = inspect.Parameter("new_loop", kind)
    parameters = [*signature.parameters.values(), added]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return pytest.mark.parametrize("new_loop", LOOPS.values(), ids=LOOPS.keys())(run)


def answer(body: bytes, *lines: bytes, status: bytes = b"200 OK") -> bytes:
    fields = b"".join(line + b"\r\n" for line in lines)
    return b"HTTP/1.1 %b\r\n%bcontent-length: %d\r\n\r\n%b" % (status, fields, len(body), body)


def saying(*pieces: bytes, close: bool = False) -> Callable[[Peer], Coroutine[Any, Any, None]]:
    """A script: read one request, say this, and go on listening unless it is to close."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(*pieces)
        if close:
            peer.close()
        await peer.left()

    return script


async def echo(peer: Peer) -> None:
    """Answer every request with its line, for as long as the client stays."""
    try:
        while True:
            request = await peer.request()
            await peer.send(answer(request.line.encode()))
    except (asyncio.IncompleteReadError, ConnectionError):
        pass


async def fetch(client: Client, path: bytes = b"/") -> bytes:
    _, body = await client.get(path)
    return body


async def whole(response: Response) -> bytes:
    parts = []
    while await response.more():
        parts.append(response.take())
        assert parts[-1]
    assert response.complete
    assert response.take() == b""
    return b"".join(parts)


def closed_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port: int = unused.getsockname()[1]
    return port


# The request.


@on_both_loops
async def test_the_request_is_what_it_should_be() -> None:
    got: list[Request] = []

    async def script(peer: Peer) -> None:
        got.append(await peer.request())
        await peer.send(answer(b""))
        got.append(await peer.request())
        await peer.send(answer(b""))

    async with raw_server(script) as server:
        client = Client(server.url + "/api/v2/", api_key="k3y")
        response = await client.request(b"POST", b"/v1/x?a=b", b"{}", b"content-type: a/b\r\n")
        response.close()
        await fetch(client, b"/health")
        client.close()
    assert [request.line for request in got] == [
        "POST /api/v2/v1/x?a=b HTTP/1.1",
        "GET /api/v2/health HTTP/1.1",
    ]
    assert got[0].headers == {
        "host": server.url.removeprefix("http://"),
        "accept": "*/*",
        "authorization": "Bearer k3y",
        "content-type": "a/b",
        "content-length": "2",
    }
    assert got[0].body == b"{}"
    assert got[1].headers["content-length"] == "0"
    assert got[1].headers["authorization"] == "Bearer k3y"


@on_both_loops
async def test_without_a_key_none_is_sent() -> None:
    async def script(peer: Peer) -> None:
        assert "authorization" not in (await peer.request()).headers
        await peer.send(answer(b""))

    async with raw_server(script) as server:
        await fetch(Client(server.url))


@on_both_loops
async def test_a_closed_client_asks_nobody() -> None:
    """Its engine is being ended and may still listen: the request can go to the next one."""

    async def script(_: Peer) -> None:
        raise AssertionError("it was asked")

    async with raw_server(script) as server:
        client = Client(server.url)
        client.close()
        with pytest.raises(ConnectError):
            await client.request(b"GET", b"/")


@pytest.mark.parametrize("size", [JOIN_BYTES - 1, JOIN_BYTES + 1, 16 << 20])
@on_both_loops
async def test_a_body_of_any_size_arrives(size: int) -> None:
    body = bytes(range(251)) * (size // 251 + 1)

    async def script(peer: Peer) -> None:
        request = await peer.request()
        await peer.send(answer(hashlib.sha256(request.body).hexdigest().encode()))
        await peer.left()

    async with raw_server(script) as server:
        client = Client(server.url)
        response = await client.request(b"POST", b"/", body)
        assert await whole(response) == hashlib.sha256(body).hexdigest().encode()
        response.close()
        client.close()


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
@on_both_loops
async def test_an_ipv6_address_is_written_in_brackets() -> None:
    hosts: list[str] = []

    async def script(peer: Peer) -> None:
        hosts.append((await peer.request()).headers["host"])
        await peer.send(answer(b"six"))

    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on this machine")
    async with raw_server(script, host="::1") as server:
        assert await fetch(Client(server.url)) == b"six"
    assert hosts == [server.url.removeprefix("http://")]
    assert hosts[0].startswith("[::1]:")


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://h", b"h:80"),
        ("https://h", b"h:443"),
        ("http://h:8/p/", b"h:8"),
        ("http://H.Example/", b"h.example:80"),
        ("http://[2001:db8::7]:9", b"[2001:db8::7]:9"),
    ],
)
@on_both_loops
async def test_addresses(url: str, host: bytes) -> None:
    assert b"\r\nhost: " + host + b"\r\n" in Client(url)._fixed


@pytest.mark.parametrize("url", ["", "h:80", "ftp://h", "http://", "/path", "http://h:99999"])
@on_both_loops
async def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ValueError):
        Client(url)


# The answer.


BODIES = {
    "by length": (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",),
    "in chunks": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
    ),
    "in chunks with trailers": (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n",
        b"5;ext=1\r\nhello\r\n0\r\nx-sum: 1\r\n\r\n",
    ),
    "byte by byte": tuple(
        bytes([byte])
        for byte in b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    ),
    "after 100 Continue": (b"HTTP/1.1 100 Continue\r\n\r\n", answer(b"hello")),
    "after early hints": (
        b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
        + answer(b"hello"),
    ),
}


@pytest.mark.parametrize("pieces", BODIES.values(), ids=BODIES)
@on_both_loops
async def test_a_body_is_read_and_its_connection_kept(pieces: tuple[bytes, ...]) -> None:
    async with raw_server(saying(*pieces)) as server:
        client = Client(server.url)
        response = await client.request(b"GET", b"/")
        assert response.status == 200
        assert response.header(b"link") is None
        assert await whole(response) == b"hello"
        response.close()
        response.close()
        assert client.connections == len(client._idle) == 1
        client.close()
        await server.ended(0)


UNTIL_EOF = {
    "no length": b"HTTP/1.1 200 OK\r\n\r\nhello",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\nserver: old\r\n\r\nhello",
    "not chunked": b"HTTP/1.1 200 OK\r\ntransfer-encoding: identity\r\n\r\nhello",
}


@pytest.mark.parametrize("data", UNTIL_EOF.values(), ids=UNTIL_EOF)
@on_both_loops
async def test_a_body_may_end_with_its_connection(data: bytes) -> None:
    async with raw_server(saying(data, close=True), echo) as server:
        client = Client(server.url)
        response = await client.request(b"GET", b"/")
        assert await whole(response) == b"hello"
        response.close()
        assert await fetch(client, b"/next") == b"GET /next HTTP/1.1"
        assert server.accepted == 2
        client.close()


@pytest.mark.parametrize(("status", "kept"), [(b"204 No Content", 1), (b"304 Not Modified", 0)])
@on_both_loops
async def test_an_answer_without_a_body_ends_with_its_headers(status: bytes, kept: int) -> None:
    async with raw_server(saying(b"HTTP/1.1 " + status + b"\r\nx: y\r\n\r\n")) as server:
        client = Client(server.url)
        response = await client.request(b"GET", b"/")
        assert (await whole(response), response.header(b"x")) == (b"", b"y")
        response.close()
        assert len(client._idle) == kept
        client.close()


@on_both_loops
async def test_headers_are_as_sent_with_names_in_lower_case() -> None:
    sent = answer(b"", b"X-One: A b", b"x-one: second", b"Content-Type: Text/Plain")
    async with raw_server(saying(sent)) as server:
        client = Client(server.url)
        response = await client.request(b"GET", b"/")
        assert response.headers == [
            (b"x-one", b"A b"),
            (b"x-one", b"second"),
            (b"content-type", b"Text/Plain"),
            (b"content-length", b"0"),
        ]
        assert response.header(b"x-one") == b"A b"
        assert response.header(b"X-One") is None
        client.close()


@on_both_loops
async def test_each_piece_is_there_as_soon_as_it_came() -> None:
    go = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(3):
            await go.wait()
            go.clear()
            await peer.send(b"2\r\nab\r\n")
        await peer.send(b"0\r\n\r\n")

    async with raw_server(script) as server:
        client = Client(server.url)
        response = await client.request(b"GET", b"/")
        for _ in range(3):
            assert response.take() == b""
            go.set()
            assert await response.more()
            assert response.take() == b"ab"
        assert not await response.more()
        client.close()


GARBAGE = {
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
    "binary": bytes(range(256)),
    "HTTP/2": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00",
    "an upgrade": b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nhi",
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
    "a length and chunks": (
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
    ),
    "a header of no shape": b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
@on_both_loops
async def test_garbage_is_an_error(data: bytes) -> None:
    async with raw_server(saying(data)) as server:
        client = Client(server.url)
        with pytest.raises(UpstreamError) as caught:
            await client.request(b"GET", b"/")
        assert caught.value.began
        await server.ended(0)  # the connection was cut
        assert client.connections == 0


CUT_SHORT = {
    "by length": b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhello",
    "in chunks": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
    "in a chunk": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\nhello",
    "a broken chunk": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n",
}


@pytest.mark.parametrize("data", CUT_SHORT.values(), ids=CUT_SHORT)
@on_both_loops
async def test_an_answer_cut_short_gives_what_came_and_then_the_error(data: bytes) -> None:
    async with raw_server(saying(data, close=True)) as server:
        client = Client(server.url)
        response = await client.request(b"GET", b"/")
        with pytest.raises(UpstreamError) as caught:
            await whole(response)
        assert caught.value.began
        with pytest.raises(UpstreamError):
            await response.more()
        response.close()
        assert not response.complete
        await async_wait_for(lambda: client.connections == 0)


@on_both_loops
async def test_a_reset_is_no_end_of_a_body() -> None:
    go = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\nhello")
        await go.wait()
        peer.reset()

    async with raw_server(script) as server:
        client = Client(server.url)
        response = await client.request(b"GET", b"/")
        assert await response.more()
        assert response.take() == b"hello"
        go.set()
        with pytest.raises(UpstreamError):
            await response.more()


@on_both_loops
async def test_get_reads_no_more_than_it_may() -> None:
    begun = b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n" + b"x" * 50
    async with raw_server(saying(begun)) as server:
        client = Client(server.url)
        assert await client.get(b"/", limit=10) == (200, b"x" * 10)
        await server.ended(0)
        await async_wait_for(lambda: client.connections == 0)


# Kept connections.


@on_both_loops
async def test_a_connection_is_kept_and_used_again() -> None:
    async with raw_server(echo) as server:
        client = Client(server.url)
        for number in range(5):
            path = b"/%d" % number
            assert await fetch(client, path) == b"GET " + path + b" HTTP/1.1"
        assert (server.accepted, client.connections) == (1, 1)
        client.close()


@on_both_loops
async def test_the_last_one_used_is_the_first_one_taken() -> None:
    def named(name: bytes) -> Callable[[Peer], Coroutine[Any, Any, None]]:
        async def script(peer: Peer) -> None:
            try:
                while True:
                    await peer.request()
                    await peer.send(answer(name))
            except (asyncio.IncompleteReadError, ConnectionError):
                pass

        return script

    async with raw_server(named(b"A"), named(b"B"), named(b"C")) as server:
        client = Client(server.url)
        responses = {}
        for name in (b"A", b"B", b"C"):
            responses[name] = await client.request(b"GET", b"/")
            assert await whole(responses[name]) == name
        for name in (b"B", b"C", b"A"):
            responses[name].close()
        taken = [await client.request(b"GET", b"/") for _ in range(3)]
        assert [await whole(response) for response in taken] == [b"A", b"C", b"B"]
        assert server.accepted == 3
        client.close()


@on_both_loops
async def test_a_connection_idle_for_long_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with raw_server(echo, echo) as server:
        client = Client(server.url)
        await fetch(client)
        with monkeypatch.context() as patch:
            patch.setattr(module, "IDLE_S", -1.0)  # any time is too long
            await fetch(client)
        assert server.accepted == 2
        await server.ended(0)  # the old one was cut
        await fetch(client)
        assert server.accepted == 2
        client.close()


@on_both_loops
async def test_only_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_IDLE", 2)
    async with raw_server(*[echo] * 5) as server:
        client = Client(server.url)
        await asyncio.gather(*(fetch(client) for _ in range(5)))
        await async_wait_for(lambda: client.connections == 2)
        client.close()


@on_both_loops
async def test_a_hundred_at_once_have_a_connection_each() -> None:
    async with raw_server(*[echo] * 100) as server:
        client = Client(server.url)
        paths = [b"/%d" % number for number in range(100)]
        bodies = await asyncio.gather(*(fetch(client, path) for path in paths))
        assert bodies == [b"GET " + path + b" HTTP/1.1" for path in paths]
        client.close()


@pytest.mark.parametrize(
    "data",
    [
        answer(b"hello", b"connection: close"),
        b"HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\n\r\nhello",
    ],
    ids=["says close", "HTTP/1.0", "until its end"],
)
@on_both_loops
async def test_a_connection_that_will_close_is_not_kept(data: bytes) -> None:
    async with raw_server(saying(data, close=True), echo) as server:
        client = Client(server.url)
        assert await fetch(client) == b"hello"
        assert await fetch(client, b"/b") == b"GET /b HTTP/1.1"
        assert server.accepted == 2
        client.close()


@on_both_loops
async def test_who_says_close_and_stays_is_cut() -> None:
    async with raw_server(saying(answer(b"hello", b"connection: close")), echo) as server:
        client = Client(server.url)
        assert await fetch(client) == b"hello"
        await server.ended(0)
        await fetch(client)
        client.close()


@on_both_loops
async def test_one_that_was_closed_meanwhile_is_not_used() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer(b"bye"))
        peer.close()

    async with raw_server(script, echo) as server:
        client = Client(server.url)
        assert await fetch(client) == b"bye"
        await async_wait_for(lambda: client.connections == 0)
        await fetch(client)
        client.close()


@on_both_loops
async def test_one_that_speaks_unasked_is_cut() -> None:
    go = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer(b"once"))
        await go.wait()
        await peer.send(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
        await peer.left()

    async with raw_server(script, echo) as server:
        client = Client(server.url)
        assert await fetch(client) == b"once"
        go.set()
        await server.ended(0)
        await async_wait_for(lambda: client.connections == 0)
        assert await fetch(client) == b"GET / HTTP/1.1"
        client.close()


@pytest.mark.parametrize(
    "data",
    [
        answer(b"hello") + answer(b" and more"),
        answer(b"hello", b"connection: close") + b"more",
        answer(b"hello") + b"\x00\x01",
    ],
    ids=["a second answer", "more after the last", "garbage"],
)
@pytest.mark.parametrize("apart", [False, True])
@on_both_loops
async def test_more_than_the_answer_is_not_the_answer(data: bytes, apart: bool) -> None:
    at = data.index(b"hello") + 5
    pieces = (data[:at], data[at:]) if apart else (data,)
    async with raw_server(saying(*pieces), echo) as server:
        client = Client(server.url)
        response = await client.request(b"GET", b"/")
        assert await whole(response) == b"hello"
        response.close()
        await server.ended(0)
        assert await fetch(client) == b"GET / HTTP/1.1"
        client.close()


# A kept connection that closes as it is used.


def closing_at_the_second(
    last_words: bytes = b"", *, reset: bool = False
) -> Callable[[Peer], Coroutine[Any, Any, None]]:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer(b"first"))
        await peer.request()
        if last_words:
            await peer.send(last_words)
        if reset:
            peer.reset()

    return script


@pytest.mark.parametrize("reset", [False, True])
@on_both_loops
async def test_it_is_asked_once_more_on_a_fresh_one(reset: bool) -> None:
    async with raw_server(closing_at_the_second(reset=reset), echo) as server:
        client = Client(server.url)
        assert await fetch(client) == b"first"
        response = await client.request(b"POST", b"/again", b"body")
        assert await whole(response) == b"POST /again HTTP/1.1"
        assert server.accepted == 2
        client.close()


@on_both_loops
async def test_the_fresh_one_is_fresh_even_if_others_are_kept() -> None:
    """Both kept connections are dead: trying the second would fail as well."""
    scripts = [closing_at_the_second(), closing_at_the_second(), echo]
    async with raw_server(*scripts) as server:
        client = Client(server.url)
        assert await asyncio.gather(fetch(client), fetch(client)) == [b"first"] * 2
        assert await fetch(client, b"/third") == b"GET /third HTTP/1.1"
        assert server.accepted == 3
        client.close()


@on_both_loops
async def test_not_when_a_byte_of_the_answer_had_come() -> None:
    async with raw_server(closing_at_the_second(b"H")) as server:
        client = Client(server.url)
        await fetch(client)
        with pytest.raises(UpstreamError) as caught:
            await fetch(client)
        assert caught.value.began
        assert server.accepted == 1


@on_both_loops
async def test_not_when_the_connection_was_fresh() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()

    async with raw_server(script) as server:
        client = Client(server.url)
        with pytest.raises(UpstreamError) as caught:
            await client.request(b"POST", b"/", b"body")
        assert not caught.value.began
        assert not isinstance(caught.value, ConnectError)
        assert server.accepted == 1
        await async_wait_for(lambda: client.connections == 0)


@on_both_loops
async def test_and_only_once() -> None:
    async def closing(peer: Peer) -> None:
        await peer.request()

    async with raw_server(closing_at_the_second(), closing) as server:
        client = Client(server.url)
        await fetch(client)
        with pytest.raises(UpstreamError):
            await fetch(client)
        assert server.accepted == 2


# No connection.


@on_both_loops
async def test_nobody_listens() -> None:
    client = Client(f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(ConnectError) as caught:
        await client.request(b"GET", b"/")
    assert not caught.value.began
    assert client.connections == 0


@on_both_loops
async def test_nobody_accepts() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        waiting = [socket.socket() for _ in range(3)]
        try:
            for other in waiting:
                other.setblocking(False)
                other.connect_ex(address)
            client = Client(f"http://127.0.0.1:{address[1]}", connect_timeout_s=0.05)
            with pytest.raises(ConnectError, match=r"no connection within 0\.05 s"):
                await client.request(b"GET", b"/")
            assert client.connections == 0
        finally:
            for other in waiting:
                other.close()


@on_both_loops
async def test_tls_where_there_is_none() -> None:
    async def plain(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await peer.left()

    async with raw_server(plain) as server:
        client = Client(server.url.replace("http:", "https:"))
        with pytest.raises(ConnectError):
            await client.request(b"GET", b"/")


# Giving up.


async def cut_at(peer: Peer, gone: asyncio.Event) -> None:
    await peer.left()
    gone.set()


@on_both_loops
async def test_a_cancel_before_the_answer_cuts_the_connection() -> None:
    asked, gone = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        asked.set()
        await cut_at(peer, gone)

    async with raw_server(script) as server:
        client = Client(server.url)
        asking = asyncio.create_task(client.request(b"GET", b"/"))
        await asked.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await gone.wait()
        await async_wait_for(lambda: client.connections == 0)


@on_both_loops
async def test_a_cancel_while_a_large_body_is_sent_cuts_the_connection() -> None:
    begun, gone = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer._reader.readexactly(10_000)
        begun.set()
        await cut_at(peer, gone)

    async with raw_server(script) as server:
        client = Client(server.url)
        asking = asyncio.create_task(client.request(b"POST", b"/", bytes(32 << 20)))
        await begun.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await gone.wait()


@pytest.mark.parametrize("cancelled", [True, False])
@on_both_loops
async def test_an_answer_read_by_half_cuts_the_connection(cancelled: bool) -> None:
    gone = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n")
        await cut_at(peer, gone)

    async with raw_server(script, echo) as server:
        client = Client(server.url)
        response = await client.request(b"GET", b"/")
        assert await response.more()
        assert response.take() == b"x"
        if cancelled:
            waiting = asyncio.create_task(response.more())
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        response.close()
        await gone.wait()
        assert await fetch(client) == b"GET / HTTP/1.1"
        assert server.accepted == 2
        client.close()


BEGUN = {
    "by length": b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\nhalf",
    # Its end is the connection's end, but not the one we make.
    "until its end": b"HTTP/1.1 200 OK\r\n\r\nhalf",
}


@pytest.mark.parametrize("begun", BEGUN.values(), ids=BEGUN)
@on_both_loops
async def test_close_cuts_what_is_in_use_and_what_is_kept(begun: bytes) -> None:
    asked = asyncio.Event()

    async def silent(peer: Peer) -> None:
        await peer.request()
        asked.set()
        await peer.left()

    async with raw_server(echo, saying(begun), silent) as server:
        client = Client(server.url)
        kept, used = [await client.request(b"GET", b"/") for _ in range(2)]
        assert await whole(kept)
        assert await used.more()
        used.take()
        reading = asyncio.create_task(used.more())
        asking = asyncio.create_task(client.request(b"GET", b"/"))
        await asked.wait()
        kept.close()
        client.close()
        for waiting in (reading, asking):
            with pytest.raises(UpstreamError):
                await waiting
        used.close()
        for number in range(3):
            await server.ended(number)
        await async_wait_for(lambda: client.connections == 0)


@on_both_loops
async def test_a_client_closed_while_it_connects_has_no_connection_that_lasts() -> None:
    async def script(peer: Peer) -> None:
        await peer.left()

    async with raw_server(script) as server:
        client = Client(server.url)
        request = asyncio.ensure_future(client.request(b"GET", b"/"))
        await asyncio.sleep(0)  # it connects
        client.close()
        with pytest.raises(UpstreamError):
            await request
        await server.ended(0)
        assert client.connections == 0


# A server faster than its reader.

FLOOD_BYTES = 64 << 20


@on_both_loops
async def test_a_flood_is_not_taken_faster_than_it_is_read() -> None:
    peers: list[Peer] = []

    async def flood(peer: Peer) -> None:
        peers.append(peer)
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % FLOOD_BYTES)
        await peer.send(*[bytes(1 << 18)] * (FLOOD_BYTES >> 18))
        await peer.left()

    async with raw_server(flood, echo) as server:
        client = Client(server.url)
        response = await client.request(b"GET", b"/")
        connection = response._connection
        await async_wait_for(lambda: connection._paused)
        for _ in range(20):  # time enough for the loop to read on, if it did
            await fetch(client)
        assert PAUSE_BYTES <= response._size <= PAUSE_BYTES + ONE_READ_BYTES
        assert peers[0].sent_bytes < FLOOD_BYTES

        total = 0
        while await response.more():
            assert response._size <= PAUSE_BYTES + ONE_READ_BYTES
            total += len(response.take())
        assert total == FLOOD_BYTES
        response.close()
        assert len(client._idle) == 2
        client.close()


@on_both_loops
async def test_an_answer_that_nobody_took_leaves_no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_BYTES", 10)
    async with raw_server(echo) as server:
        client = Client(server.url)
        response = await client.request(b"GET", b"/")
        await async_wait_for(lambda: response.complete)
        assert response._connection._paused
        response.close()
        assert await fetch(client, b"/next") == b"GET /next HTTP/1.1"
        assert server.accepted == 1
        client.close()


@on_both_loops
async def test_a_flood_given_up_cuts_the_connection() -> None:
    gone = asyncio.Event()

    async def flood(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while True:
                await peer.send(bytes(1 << 18))
        except ConnectionError:
            gone.set()

    async with raw_server(flood) as server:
        client = Client(server.url)
        response = await client.request(b"GET", b"/")
        await async_wait_for(lambda: response._connection._paused)
        response.close()
        await gone.wait()
        await async_wait_for(lambda: client.connections == 0)
