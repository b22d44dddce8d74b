"""Ollama's own calls: what it has, what it runs, and to load and unload a model.

Built to docs/api.md and docs/openapi.yaml of ollama/ollama; requests for inference go to its
OpenAI-compatible side and are not this file's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from xandrouting.core.errors import EngineError, EngineRejected, GatewayError, ModelNotFound
from xandrouting.net.client import Client
from xandrouting.upstreams.openai import (
    MAX_BYTES,
    MAX_MODELS,
    Name,
    Size,
    T,
    Unusable,
    decoded,
    get,
)
from xandrouting.upstreams.values import Listing, RemoteModel, RunningModel

NAME_CHARACTERS: Final = 100  # of a model's name in a log line
FOR_EVER_S: Final = 10 * 365 * 86_400.0  # a negative keep_alive is told as a date in 300 years

_JSON: Final = b"content-type: application/json\r\n"


class _Details(Struct):
    quantization_level: str | None = None


Moment = Annotated[datetime, Meta(tz=True)]


class _Tag(Struct):
    name: Name
    size: Size | None = None
    modified_at: Moment | None = None
    details: _Details | None = None


class _Process(Struct):
    name: Name
    size: Size
    size_vram: Size
    expires_at: Moment
    context_length: Size | None = None  # since 0.11


class _Listed(Struct):
    models: Annotated[list[msgspec.Raw], Meta(max_length=MAX_MODELS)] | None  # Go's empty one


class _Named(Struct):
    name: object = None


class _Version(Struct):
    version: Annotated[str, Meta(max_length=100)]


class _Said(Struct):
    error: str | None = None


_LISTED: Final = msgspec.json.Decoder(_Listed)
_NAMED: Final = msgspec.json.Decoder(_Named)
_TAG: Final = msgspec.json.Decoder(_Tag)
_PROCESS: Final = msgspec.json.Decoder(_Process)
_VERSION: Final = msgspec.json.Decoder(_Version)
_SAID: Final = msgspec.json.Decoder(_Said)


def canonical(model: str) -> str:
    """Return a model's name with its tag, as Ollama lists it: without one `latest` is meant."""
    _, slash, last = model.rpartition("/")
    return model if ":" in (last if slash else model) else f"{model}:latest"


def is_same(listed: str, asked: str) -> bool:
    """Whether a request by one name means the model that is listed under the other."""
    return listed.casefold() == canonical(asked).casefold()


async def look(client: Client) -> Listing:
    """Ask for models, running ones and the version.

    Raises:
        Unusable: it answers as no Ollama does.
        UpstreamError: it does not answer, or breaks off.
    """
    body = await get(client, b"/api/tags")
    if body is None:
        raise Unusable("it has no /api/tags: is it another kind of server?")
    tags, odd_tags = _entries(_TAG, body)
    told = await version(client)
    processes, odd_processes = await _processes(client)
    return Listing(
        tuple(_model(tag) for tag in tags),
        tuple(_running(process) for process in processes),
        told,
        odd=(
            *(f"/api/tags {entry}" for entry in odd_tags),
            *(f"/api/ps {entry}" for entry in odd_processes),
        ),
    )


async def version(client: Client) -> str | None:
    """Ask for its version; one older than the call does not tell.

    Raises:
        Unusable: it answers as no Ollama does.
        UpstreamError: it does not answer, or breaks off.
    """
    body = await get(client, b"/api/version")
    return None if body is None else decoded(_VERSION, body).version


async def running(client: Client) -> tuple[RunningModel, ...]:
    """Ask which models it holds in memory; one older than the call tells of none.

    Raises:
        Unusable: it answers as no Ollama does.
        UpstreamError: it does not answer, or breaks off.
    """
    processes, _ = await _processes(client)
    return tuple(_running(process) for process in processes)


async def _processes(client: Client) -> tuple[list[_Process], list[str]]:
    body = await get(client, b"/api/ps")
    return ([], []) if body is None else _entries(_PROCESS, body)


def _entries(decoder: msgspec.json.Decoder[T], body: bytes) -> tuple[list[T], list[str]]:
    """Return what a body lists, and of entries that cannot be read which and why.

    Raises:
        Unusable: it is no list at all.
    """
    entries, odd = [], []
    for raw in decoded(_LISTED, body).models or ():
        try:
            entries.append(decoder.decode(raw))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            odd.append(f"{_name_of(raw)}: {error}")
    return entries, odd


def _name_of(raw: msgspec.Raw) -> str:
    try:
        return repr(_NAMED.decode(raw).name)[:NAME_CHARACTERS]
    except (msgspec.DecodeError, UnicodeDecodeError):
        return "one without a name"


async def set_keep_alive(client: Client, model: str, keep_alive_s: float | None) -> None:
    """Have a model loaded and kept for so long; 0: unloaded, below 0: kept for ever.

    None is Ollama's own default. Returns when it is done; cancelling cuts the request.

    Raises:
        GatewayError: it refuses; the error says what it said.
        UpstreamError: it does not answer, or breaks off.
    """
    asked: dict[str, object] = {"model": model, "stream": False}
    if keep_alive_s is not None:
        asked["keep_alive"] = keep_alive_s
    error = await _post(client, b"/api/generate", asked, model)
    if isinstance(error, EngineRejected) and keep_alive_s != 0:  # one that makes embeddings alone
        error = await _post(client, b"/api/embed", asked | {"input": ""}, model) and error
    if error is not None:
        raise error


async def _post(
    client: Client, path: bytes, asked: Mapping[str, object], model: str
) -> GatewayError | None:
    """Make a call that has nothing to say; return the error of one that is refused."""
    response = await client.request(b"POST", path, msgspec.json.encode(asked), _JSON)
    try:
        body = await response.read(MAX_BYTES)
    finally:
        response.close()
    return _refusal(response.status, body, model)


def _refusal(status: int, body: bytes, model: str) -> GatewayError | None:
    if status == 200:
        return None
    try:
        said = decoded(_SAID, body).error
    except Unusable:
        said = None
    words = said or f"status {status}"
    if status == 404:
        return ModelNotFound(f"The upstream ollama has no model '{model}': {words}", param="model")
    if 400 <= status < 500:
        return EngineRejected(f"The upstream ollama refused '{model}': {words}", status=status)
    return EngineError(f"The upstream ollama could not serve '{model}': {words}")


def _model(tag: _Tag) -> RemoteModel:
    created = None if tag.modified_at is None else int(tag.modified_at.timestamp())
    quantization = None if tag.details is None else tag.details.quantization_level
    return RemoteModel(
        tag.name,
        created if created is not None and created > 0 else None,
        size_bytes=tag.size,
        quantization=quantization or None,
    )


def _running(process: _Process) -> RunningModel:
    expires_at = max(0.0, process.expires_at.timestamp())  # Go's zero is the year 1
    return RunningModel(
        process.name,
        process.size,
        min(process.size_vram, process.size),
        None if expires_at - time.time() > FOR_EVER_S else expires_at,
        process.context_length,
    )
