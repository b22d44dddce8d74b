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
_TOKENS: Final = {"x-unit": "tokens"}


class Routing(Struct, kw_only=True):
    """The routing fields: read, then cut from the body. Unset or null: not asked for.

    What is said of a field here is shown by /openapi.json and by /v1/providers.
    """

    model: Annotated[str, Meta(min_length=1)]
    backend: BackendName | None = None
    device: Annotated[
        DeviceName | None, Meta(title="Device", description="What the model runs on.")
    ] = None
    gpu_memory_utilization: Annotated[
        Annotated[float, Meta(ge=0.1, le=1.0)] | None,
        Meta(
            title="GPU memory utilization",
            description="The share of the card that the engine may take.",
            examples=[0.5, 0.7, 0.9],
        ),
    ] = None
    max_model_len: Annotated[
        Tokens | None,
        Meta(
            title="Maximum model length",
            description="The context: the tokens of a request and its answer together.",
            extra_json_schema=_TOKENS,
        ),
    ] = None
    tensor_parallel_size: Annotated[
        Annotated[int, Meta(ge=1, le=64)] | None,
        Meta(title="Tensor parallel size", description="How many cards share the model."),
    ] = None
    n_gpu_layers: Annotated[
        Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None,
        Meta(
            title="GPU layers",
            description="How many layers lie on the GPU: -1 is all, 0 none.",
            examples=[-1, 0, 35],
        ),
    ] = None
    n_ctx: Annotated[
        Annotated[int, Meta(ge=0, le=2**31 - 1)] | None,
        Meta(
            title="Context size",
            description="The context each request may use; 0: all the model was trained for.",
            examples=[2048, 4096, 8192],
            extra_json_schema=_TOKENS,
        ),
    ] = None
    n_parallel: Annotated[
        Annotated[int, Meta(ge=1, le=1024)] | None,
        Meta(title="Parallel requests", description="How many requests it answers at once."),
    ] = None
    cache_type_k: Annotated[
        CacheType | None,
        Meta(title="KV cache, keys", description="What the keys of the cache are stored as."),
    ] = None
    cache_type_v: Annotated[
        CacheType | None,
        Meta(title="KV cache, values", description="What the values of the cache are stored as."),
    ] = None
    ttl: Annotated[
        Annotated[int, Meta(ge=0, le=2**31 - 1)] | None,
        Meta(
            title="Time to live",
            description="How long the model stays loaded after its last request; 0: for ever.",
            examples=[300, 600, 3600],
            extra_json_schema={"x-unit": "s"},
        ),
    ] = None


class Inference(Routing, kw_only=True):
    """Any inference request: routing, and OpenAI's parameters where their range is checked."""

    stream: Annotated[
        bool | None, Meta(title="Stream", description="Send the answer as it is made.")
    ] = None
    temperature: Annotated[
        Annotated[float, Meta(ge=0.0, le=2.0)] | None,
        Meta(
            title="Temperature",
            description="How freely the next token is chosen; 0: always the likeliest.",
        ),
    ] = None
    top_p: Annotated[
        Annotated[float, Meta(ge=0.0, le=1.0)] | None,
        Meta(
            title="Top p",
            description="Choose among the likeliest tokens that make up this share together.",
        ),
    ] = None
    presence_penalty: Annotated[
        Penalty | None,
        Meta(
            title="Presence penalty",
            description="How much less likely a token is once it was used.",
        ),
    ] = None
    frequency_penalty: Annotated[
        Penalty | None,
        Meta(
            title="Frequency penalty",
            description="How much less likely a token is with each time it was used.",
        ),
    ] = None
    max_tokens: Annotated[
        Tokens | None,
        Meta(
            title="Maximum tokens",
            description="The answer ends after so many.",
            extra_json_schema=_TOKENS,
        ),
    ] = None
    max_completion_tokens: Tokens | None = None
    stop: Annotated[
        str | list[str] | None,
        Meta(
            title="Stop",
            description="The answer ends before any of these texts.",
            examples=[["END", "\n\n"]],
        ),
    ] = None


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
