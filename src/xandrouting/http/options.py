"""What each backend can be asked for, as JSON Schemas made of the types that check requests.

Types, ranges, titles and descriptions are those of `proxy/request.py`. Added here is which
options a backend takes, and what holds where a request leaves one out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from xandrouting.core.model import Backend
from xandrouting.engines.base import ModelFacts
from xandrouting.engines.llamacpp import LlamaCpp
from xandrouting.engines.vllm import LONGEST_CPU, LONGEST_GPU, SEQUENCES_CPU, SEQUENCES_GPU
from xandrouting.proxy.request import Inference

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Unset:
    """What holds where a request leaves an option out, and `note` says it in words.

    `default` is None where it is not the same for every model and load: `by` decides then, the
    `planner`, the `model`, the `engine` or the `upstream`. `otherwise` is what holds where the
    model leaves it open.
    """

    note: str
    default: float | bool | str | None = None
    by: str | None = None
    otherwise: float | None = None


_FEWER: Final = "Unset: fewer where the memory is short."
_STOP: Final = Unset("Unset: it ends where the model ends it.")
_STREAM: Final = Unset("", default=False)

_LLAMACPP_ANSWER: Final[Mapping[str, Unset]] = {
    "temperature": Unset("Unset: what the file says, else 0.8.", by="model", otherwise=0.8),
    "top_p": Unset("Unset: what the file says, else 0.95.", by="model", otherwise=0.95),
    "max_tokens": Unset("Unset: it ends where the model or the context ends it.", by="engine"),
    "presence_penalty": Unset("", default=0.0),
    "frequency_penalty": Unset("", default=0.0),
    "stop": _STOP,
    "stream": _STREAM,
}

_OF_GENERATION_CONFIG: Final = "Unset: what the model's generation_config says, else"
_VLLM_ANSWER: Final[Mapping[str, Unset]] = {
    "temperature": Unset(f"{_OF_GENERATION_CONFIG} 1.", by="model", otherwise=1.0),
    "top_p": Unset(f"{_OF_GENERATION_CONFIG} 1.", by="model", otherwise=1.0),
    "max_tokens": Unset(f"{_OF_GENERATION_CONFIG} what the context leaves.", by="model"),
    "presence_penalty": Unset(f"{_OF_GENERATION_CONFIG} 0.", by="model", otherwise=0.0),
    "frequency_penalty": Unset(f"{_OF_GENERATION_CONFIG} 0.", by="model", otherwise=0.0),
    "stop": _STOP,
    "stream": _STREAM,
}

_UPSTREAM: Final = Unset("Unset: what the other server takes.", by="upstream")
_UPSTREAM_ANSWER: Final[Mapping[str, Unset]] = {
    **dict.fromkeys(_LLAMACPP_ANSWER, _UPSTREAM),
    "stream": _STREAM,
}

_ANSWER: Final[Mapping[Backend, Mapping[str, Unset]]] = {
    Backend.LLAMACPP: _LLAMACPP_ANSWER,
    Backend.VLLM: _VLLM_ANSWER,
    Backend.TRANSFORMERS: _VLLM_ANSWER,
    Backend.OLLAMA: _UPSTREAM_ANSWER,
    Backend.UPSTREAM: _UPSTREAM_ANSWER,
}


def load_options(backend: Backend, devices: Sequence[str], default_ttl_s: float | None) -> Schema:
    """Return the schema of what `POST /v1/models/load` takes for `backend`.

    `devices` are those it can use here, as `cpu`, `cuda:0`, …; those of an upstream are not
    ours to choose.
    """
    if backend is Backend.UPSTREAM:
        return _object("Load options", {})
    if backend is Backend.OLLAMA:
        return _object("Load options", {"ttl": _UPSTREAM})
    on_gpu = any(device.startswith("cuda:") for device in devices)
    takes = _llamacpp_load if backend is Backend.LLAMACPP else _vllm_load
    device = Unset("Unset: a GPU where it can use one, else the CPU.", default="auto")
    last = {"ttl": Unset("The newest request's value counts.", default=_whole(default_ttl_s))}
    schema = _object("Load options", {"device": device, **takes(on_gpu=on_gpu), **last})
    schema["properties"]["device"] = _of_choices(schema["properties"]["device"], devices)
    return schema


def completion_options(backend: Backend) -> Schema:
    """Return the schema of what an inference request to `backend` may ask of the answer."""
    return _object("Completion options", _ANSWER[backend])


def device_choices(devices: Sequence[str]) -> list[str]:
    """Return what a request may say for `device` where these can be used."""
    cards = [device for device in devices if device.startswith("cuda:")]
    plain = [device for device in devices if device not in cards]
    return ["auto", *plain, *(["cuda", *cards] if cards else [])]


def _llamacpp_load(*, on_gpu: bool) -> Mapping[str, Unset]:
    has = LlamaCpp().defaults(ModelFacts(0), "cuda" if on_gpu else "cpu")
    return {
        "n_ctx": Unset("Never more than that.", default=has.n_ctx),
        "n_gpu_layers": Unset("Unset: as many as the memory holds.", by="planner"),
        "n_parallel": Unset(_FEWER, default=has.n_parallel),
        "cache_type_k": Unset("", default=has.cache_type_k),
        "cache_type_v": Unset("", default=has.cache_type_v),
    }


def _vllm_load(*, on_gpu: bool) -> Mapping[str, Unset]:
    longest = LONGEST_GPU if on_gpu else LONGEST_CPU
    sequences = SEQUENCES_GPU if on_gpu else SEQUENCES_CPU
    return {
        "gpu_memory_utilization": Unset("Unset: what the model needs of it.", by="planner"),
        "max_model_len": Unset("Unset: the model's own, if that is less.", default=longest),
        "n_parallel": Unset(_FEWER, default=sequences),
        "tensor_parallel_size": Unset("Unset: the fewest that hold it.", by="planner"),
    }


def _whole(seconds: float | None) -> float | None:
    """Return the seconds as an integer where they are one."""
    return int(seconds) if seconds is not None and seconds.is_integer() else seconds


def _properties() -> Mapping[str, Schema]:
    _, components = msgspec.json.schema_components([Inference])
    found: Mapping[str, Schema] = components[Inference.__name__]["properties"]
    return {name: _flat(schema) for name, schema in found.items()}


def _flat(schema: Schema) -> Schema:
    """Write "this or null" without a choice of two schemas, as makers of forms expect it."""
    kinds = schema.get("anyOf", [])
    if len(kinds) != 2 or kinds[1] != {"type": "null"}:
        return schema
    flat: Schema = {name: value for name, value in schema.items() if name != "anyOf"} | kinds[0]
    if "enum" in flat:
        flat["enum"] = [*flat["enum"], None]
    else:
        flat["type"] = [flat["type"], "null"]
    return flat


_PROPERTIES: Final = _properties()


def _object(title: str, unset: Mapping[str, Unset]) -> Schema:
    properties = {name: _property(name, unset[name]) for name in unset}
    return {"$schema": DIALECT, "title": title, "type": "object", "properties": properties}


def _property(name: str, unset: Unset) -> Schema:
    said = _PROPERTIES[name]
    schema = said | {
        "description": f"{said['description']} {unset.note}".rstrip(),
        "default": unset.default,
    }
    if unset.by is not None:
        schema["x-decided-by"] = unset.by
    if unset.otherwise is not None:
        schema["x-otherwise"] = unset.otherwise
    return schema


def _of_choices(device: Schema, devices: Sequence[str]) -> Schema:
    """Return the schema of `device` with the names of those that are there."""
    said = {name: value for name, value in device.items() if name not in ("type", "pattern")}
    return {**said, "enum": [*device_choices(devices), None]}
