"""What the gateway reads of an inference request, and the body it sends on.

Only the routing fields are read and cut; every other value goes to the engine byte for
byte, so a new OpenAI parameter needs no change here.
"""

from __future__ import annotations

from typing import Annotated, Final, Generic, Literal, TypeVar, get_args

import msgspec
from msgspec import Meta, Raw, Struct

from xandrouting.core.errors import InvalidRequest

BackendName = Literal["auto", "llamacpp", "vllm", "transformers", "ollama"]
CacheType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]
# `$` alone would let a line break through, and the device is shown in a header.
DeviceName = Annotated[str, Meta(pattern=r"^(auto|cpu|cuda(:(0|[1-9][0-9]{0,2}))?)$(?!\n)")]
Tokens = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]


class Routing(Struct, kw_only=True):
    """The routing fields: read, then cut from the body. Unset or null: not asked for."""

    model: Annotated[str, Meta(min_length=1)]
    backend: BackendName | None = None
    device: DeviceName | None = None
    gpu_memory_utilization: Annotated[float, Meta(ge=0.1, le=1.0)] | None = None
    max_model_len: Tokens | None = None
    n_gpu_layers: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    n_ctx: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    n_parallel: Annotated[int, Meta(ge=1, le=1024)] | None = None
    cache_type_k: CacheType | None = None
    cache_type_v: CacheType | None = None
    ttl: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None


class Inference(Routing, kw_only=True):
    """Any inference request: routing, and OpenAI's parameters where their range is checked."""

    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    stop: str | list[str] | None = None


class Message(Struct):
    """One message of a conversation; the model's template decides what else it may hold."""

    role: str


class Chat(Inference, kw_only=True):
    """A chat request."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    tools: list[Raw] | None = None


class LoadRequest(Routing, kw_only=True):
    """A model to load, and with which options."""

    embeddings: bool | None = None
    wait: bool | None = None


class PlanRequest(Routing, kw_only=True):
    """A model that might be loaded, and with which options."""

    embeddings: bool | None = None


class PinRequest(Struct, kw_only=True):
    """A model that shall stay once it is loaded, or no longer."""

    model: Annotated[str, Meta(min_length=1)]
    pinned: bool = True


class UnloadRequest(Struct, kw_only=True):
    """Which engines of a model shall go; without backend and device, all of them."""

    model: Annotated[str, Meta(min_length=1)]
    backend: BackendName | None = None
    device: DeviceName | None = None
    force: bool | None = None


CUT: Final = frozenset(Routing.__struct_fields__) - {"model"}

# Instead of msgspec's words, which quote what was sent, or show a pattern.
_CHOICES: Final = {
    "backend": f"one of {', '.join(get_args(BackendName))}",
    "cache_type_k": f"one of {', '.join(get_args(CacheType))}",
    "cache_type_v": f"one of {', '.join(get_args(CacheType))}",
    "device": "auto, cpu, cuda or cuda:N",
}

_RAW_OBJECT: Final = msgspec.json.Decoder(dict[str, Raw])
_ENCODER: Final = msgspec.json.Encoder()


T = TypeVar("T", bound=Struct)


class BodyParser(Generic[T]):
    """Parses and checks the bodies of one kind of call."""

    def __init__(self, kind: type[T]) -> None:
        self._decoder = msgspec.json.Decoder(kind)

    def parse(self, body: bytes) -> T:
        """Check `body` and return what is read of it.

        Raises:
            InvalidRequest: it is broken, not an object, or a field is out of its range;
                `param` names the field.
        """
        try:
            return self._decoder.decode(body)
        except msgspec.ValidationError as error:
            raise _invalid(error) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise _broken() from None


def body_for(body: bytes, fields: Routing, model: str) -> bytes:
    """Return the body the engine gets: without routing fields, `model` as it knows itself.

    `fields` is what was parsed of `body`. The same bytes when nothing has to change.

    Raises:
        InvalidRequest: the name of a field that `fields` does not know is no text.
    """
    try:
        raw = _RAW_OBJECT.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise _broken() from None
    size = len(raw)
    for name in CUT:
        raw.pop(name, None)
    if len(raw) == size and fields.model == model:
        return body
    raw["model"] = Raw(_ENCODER.encode(model))
    return _ENCODER.encode(raw)


def _broken() -> InvalidRequest:
    return InvalidRequest("The request body is broken: it cannot be parsed.")


def _invalid(error: msgspec.ValidationError) -> InvalidRequest:
    """Put msgspec's "Expected `int` >= 1 - at `$.n_ctx`" into a client's words."""
    # The last one: what was sent is quoted before it.
    what, at, where = str(error).rpartition(" - at `$")
    path = where.rstrip("`").lstrip(".") if at else ""
    if not path:
        what = what or str(error)
        missing = what.removeprefix("Object missing required field ")
        if missing != what:
            return InvalidRequest(f"The field {missing} is required.", param=missing.strip("`"))
        return InvalidRequest(f"The request body is not an object with the right fields: {what}.")
    if path in _CHOICES:
        return InvalidRequest(f"{path}: expected {_CHOICES[path]}.", param=path)
    return InvalidRequest(f"{path}: {what[0].lower()}{what[1:]}.", param=path)
