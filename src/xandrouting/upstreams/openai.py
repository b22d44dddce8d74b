"""What an OpenAI-compatible server says of its models: one bounded GET, checked strictly."""

from __future__ import annotations

from typing import Annotated, Final, TypeVar

import msgspec
from msgspec import Meta, Struct

from xandrouting.net.client import Client
from xandrouting.upstreams.values import Listing, RemoteModel

MAX_BYTES: Final = 4 << 20
MAX_MODELS: Final = 10_000

Name = Annotated[str, Meta(min_length=1, max_length=512)]
Size = Annotated[int, Meta(ge=0, le=2**53)]

T = TypeVar("T")


class Unusable(Exception):
    """It answered, and not as it should; the text says how, for people."""


class _Model(Struct):
    id: Name
    created: object = None
    max_model_len: object = None  # vLLM's


_List = Annotated[list[_Model], Meta(max_length=MAX_MODELS)]


class _Models(Struct):
    data: _List | None  # Ollama writes an empty one so


_DECODER: Final = msgspec.json.Decoder(_Models | _List)  # some servers answer with the bare list


async def look(client: Client) -> Listing:
    """Ask for the models; one that has no list of them has none that is known.

    Raises:
        Unusable: it answers something else.
        UpstreamError: it does not answer, or breaks off.
    """
    body = await get(client, b"/v1/models")
    if body is None:
        return Listing()
    answer = decoded(_DECODER, body)
    models = {m.id: m for m in (answer if isinstance(answer, list) else answer.data or ())}
    return Listing(
        tuple(
            RemoteModel(m.id, _whole(m.created), _whole(m.max_model_len)) for m in models.values()
        )
    )


def _whole(said: object) -> int | None:
    """Return a number that a server may tell in its own way; None: it does not tell it."""
    return int(said) if isinstance(said, int | float) and 0 < said < 2**53 else None


async def get(client: Client, path: bytes) -> bytes | None:
    """Return what a GET answers with 200; None: there is no such address.

    Raises:
        Unusable: another answer, or one that is too large.
        UpstreamError: no answer.
    """
    status, body = await client.get(path, limit=MAX_BYTES + 1)
    shown = path.decode()
    if status in (404, 405, 501):
        return None
    if 300 <= status < 400:
        raise Unusable("it redirects to another address, which is not followed")
    if status in (401, 403):
        raise Unusable(f"it refuses the key, or the want of one, with status {status}")
    if status != 200:
        raise Unusable(f"it answers {shown} with status {status}")
    if len(body) > MAX_BYTES:
        raise Unusable(f"its answer to {shown} is larger than {MAX_BYTES >> 20} MiB")
    return body


def decoded(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """Return what a body holds.

    Raises:
        Unusable: it is something else.
    """
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Unusable("what it lists are no models: is it another kind of server?") from None
