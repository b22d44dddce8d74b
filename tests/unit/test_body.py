"""Reading a request's body, no more of it than may be."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from tests.fakes.loop import virtual_time
from xandrouting.core.errors import BodyTooLarge, InvalidRequest
from xandrouting.http import body as module
from xandrouting.http.body import DISCARD_S, ClientLeft, read_body

LIMIT = 10
LEFT = {"type": "http.disconnect"}


class Client:
    """What a client sends; after its last message it waits for ever."""

    def __init__(self, *pieces: bytes | MutableMapping[str, Any], every_s: float = 0.0) -> None:
        self.messages: list[MutableMapping[str, Any]] = [
            {
                "type": "http.request",
                "body": piece,
                "more_body": number < len(pieces),
            }
            if isinstance(piece, bytes)
            else piece
            for number, piece in enumerate(pieces, 1)
        ]
        self.asked = 0
        self._every_s = every_s

    async def receive(self) -> MutableMapping[str, Any]:
        self.asked += 1
        if self._every_s:
            await asyncio.sleep(self._every_s)
        if not self.messages:
            await asyncio.Event().wait()
        return self.messages.pop(0)


async def read(client: Client, limit: int = LIMIT, **headers: str) -> bytes:
    pairs = {n.replace("_", "-").encode(): v.encode() for n, v in headers.items()}
    return await read_body(pairs, client.receive, limit)


@pytest.mark.parametrize(
    "pieces",
    [
        (b"",),
        (b"0123456789",),
        (b"01234", b"56789"),
        (b"", b"0123456789", b""),
        (b"0", b"1", b"2", b"3"),
        (b"0123456789", b""),
    ],
)
@virtual_time
async def test_the_whole_body_is_read(pieces: tuple[bytes, ...]) -> None:
    client = Client(*pieces)
    assert await read(client) == b"".join(pieces)
    assert client.asked == len(pieces)


@virtual_time
async def test_a_body_in_one_piece_is_not_copied() -> None:
    piece = b"0123456789"
    assert await read(Client(piece)) is piece


@virtual_time
async def test_a_message_may_leave_out_what_is_empty() -> None:
    assert await read(Client({"type": "http.request"})) == b""


@pytest.mark.parametrize(
    "pieces",
    [
        (b"0123456789x",),
        (b"0123456789", b"x"),
        (b"01234", b"56789x", b"more", b"and more"),
        (b"0123456789x", b"more"),
    ],
)
@virtual_time
async def test_a_body_over_the_limit_is_read_on_and_refused(pieces: tuple[bytes, ...]) -> None:
    client = Client(*pieces)
    with pytest.raises(BodyTooLarge, match="larger than 10 bytes") as caught:
        await read(client)
    assert caught.value.status == 413
    assert client.messages == []  # else the client would see a broken connection


@virtual_time
async def test_the_limit_is_what_comes_and_not_what_is_declared() -> None:
    assert await read(Client(b"small"), content_length="99") == b"small"
    with pytest.raises(BodyTooLarge):
        await read(Client(b"0123456789x"), content_length="1")
    with pytest.raises(BodyTooLarge):
        await read(Client(b"0123456789x"), content_length="what")


@pytest.mark.parametrize("expect", ["100-continue", "100-Continue"])
@virtual_time
async def test_who_waits_for_our_word_is_refused_at_once(expect: str) -> None:
    client = Client(b"x" * 11)
    with pytest.raises(BodyTooLarge):
        await read(client, content_length="11", expect=expect)
    assert client.asked == 0  # asking is what tells the client to send


@virtual_time
async def test_who_waits_for_our_word_with_a_fair_body_gets_it() -> None:
    assert await read(Client(b"x" * 10), content_length="10", expect="100-continue") == b"x" * 10


@pytest.mark.parametrize("coding", ["gzip", "zstd", "GZIP"])
@virtual_time
async def test_a_compressed_body_is_refused(coding: str) -> None:
    client = Client(b"\x1f\x8b")
    with pytest.raises(InvalidRequest, match="Compressed"):
        await read(client, content_encoding=coding)


@virtual_time
async def test_identity_is_not_compressed() -> None:
    assert await read(Client(b"x"), content_encoding="Identity") == b"x"


@pytest.mark.parametrize(
    "before",
    [(), (b"01", b"23"), (b"0123456789x", b"more")],
    ids=["at once", "half way", "while its body is thrown away"],
)
@virtual_time
async def test_a_client_that_leaves(before: tuple[bytes, ...]) -> None:
    client = Client(*before, LEFT)
    for message in client.messages[:-1]:
        message["more_body"] = True
    with pytest.raises(ClientLeft):
        await read(client)


@virtual_time
async def test_throwing_away_ends_in_time() -> None:
    slow = Client(*[b"x" * 11] * 1000, every_s=1.0)
    with pytest.raises(BodyTooLarge):
        await read(slow)
    assert asyncio.get_running_loop().time() == pytest.approx(1.0 + DISCARD_S)


@virtual_time
async def test_throwing_away_ends_at_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DISCARD_BYTES", 100)
    endless = Client(*[b"x" * 20] * 50)
    with pytest.raises(BodyTooLarge):
        await read(endless)
    assert endless.asked == 1 + 5
