"""What a folder of safetensors tells: the weights by their headers, the shape by config.json.

Nothing of it is believed before it is checked. The index's `total_size` is not even read:
the shards' headers tell the same, and they are what an engine reads.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, TypeVar

import msgspec

from xandrouting.inventory.safetensors_part import (
    InvalidSafetensors,
    Part,
    UnreadableSafetensors,
    decode,
    naming,
    read_all,
    read_index,
    read_part,
)

__all__ = ["InvalidSafetensors", "SafetensorsModel", "UnreadableSafetensors", "read_folder"]

_MAX_CONFIG_BYTES: Final = 4 << 20
_MAX_CONFIG_ITEMS: Final = 200_000
_MAX_PARTS: Final = 10_000
_MAX_LAYERS: Final = 4096
_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
_CONFIG: Final = "config.json"
# Where a model that sees or hears keeps the shape of its language half; the first may hold the
# second.
_NESTED: Final = ("thinker_config", "text_config", "llm_config", "language_config")
# The least of them holds, as for vLLM.
_CONTEXT_LENGTHS: Final = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
# Layers that keep a state of fixed size and no keys and values.
_STATE_LAYERS: Final = frozenset({"linear_attention", "mamba", "conv", "recurrent"})


@dataclass(frozen=True, slots=True)
class SafetensorsModel:
    """What a folder tells. None: its config does not say.

    The shape is that of the language half where there are several. `parameters` counts
    stored values: of weights packed into larger ones (GPTQ, AWQ), fewer than there are.
    """

    shards: tuple[str, ...]  # file names, in their order
    weight_bytes: int
    type_bytes: tuple[tuple[str, int], ...]  # bytes per stored dtype, the largest first
    parameters: int
    file_size: int  # all shards together
    architectures: tuple[str, ...]
    dtype: str | None  # what the config says the weights are, `bfloat16`
    quantization_method: str | None  # `awq`, `gptq`, `fp8`, …
    num_hidden_layers: int | None
    hidden_size: int | None
    intermediate_size: int | None  # where layers differ, the largest
    num_attention_heads: int | None
    num_key_value_heads: int | None  # where layers differ, the largest
    head_dim: int | None
    kv_latent_dim: int | None  # what a layer keeps of one token where it is compressed (MLA)
    max_position_embeddings: int | None
    stretches: bool  # it says how to go beyond that, so what it can take is the engine's to say
    vocab_size: int | None
    sliding_window: int | None  # tokens; None: no layer slides
    layer_types: tuple[str, ...]  # one per layer, or none
    sliding_pattern: int | None  # without layer_types: every n-th layer keeps all tokens
    first_sliding_layer: int  # without both: the layers before it keep all tokens

    @property
    def quantization(self) -> str:
        """How the weights are quantized, else the type that most of them are stored as."""
        return (self.quantization_method or self.type_bytes[0][0]).upper()

    @property
    def kv_values(self) -> int | None:
        """How many values one layer keeps of one token; too many where the config is silent."""
        if self.kv_latent_dim is not None:
            return self.kv_latent_dim
        heads, head_dim = self.num_attention_heads, self.head_dim
        if head_dim is None and heads is not None and self.hidden_size is not None:
            head_dim = self.hidden_size // heads
        kv_heads = self.num_key_value_heads if self.num_key_value_heads is not None else heads
        if head_dim is not None and kv_heads is not None:
            return 2 * kv_heads * head_dim
        # Gemma 3 leaves its heads to the code that reads the config.
        return None if self.hidden_size is None else 2 * self.hidden_size

    @property
    def attention_layers(self) -> tuple[int, int]:
        """How many layers keep all tokens, and how many those of their sliding window only."""
        if self.layer_types:
            keeping = sum(kind not in _STATE_LAYERS for kind in self.layer_types)
            sliding = self.layer_types.count("sliding_attention")
            return (keeping, 0) if self.sliding_window is None else (keeping - sliding, sliding)
        layers = self.num_hidden_layers or 0
        if self.sliding_window is None:
            full = layers
        elif self.sliding_pattern is not None:
            full = layers // self.sliding_pattern
        else:
            full = min(self.first_sliding_layer, layers)
        return full, layers - full


def read_folder(path: str | os.PathLike[str]) -> SafetensorsModel:
    """Read the headers and the config of the folder at `path`, and check that it is whole.

    It blocks: under a millisecond for each part of a usual model, under a second for the
    largest header there can be.

    Raises:
        UnreadableSafetensors: the system refuses; the same folder may do later.
        InvalidSafetensors: a part is missing, cut short or damaged, or there are no weights.
    """
    folder = Path(path)
    files = _files(folder)
    if _CONFIG not in files:
        raise InvalidSafetensors("config.json is missing")
    with naming(_CONFIG):
        config = _read_config(folder / _CONFIG)
    names = _part_names(folder, files)
    parts: list[Part] = []
    for no, name in enumerate(names, 1):
        with naming(f"part {no} of {len(names)}" if len(names) > 1 else ""):
            parts.append(read_part(folder / name))
    if not any(part.parameters for part in parts):
        raise InvalidSafetensors("no weights: its files hold no tensors")
    with naming(_CONFIG):
        return _model(config, names, parts)


def _files(folder: Path) -> frozenset[str]:
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries)
    except OSError as error:
        raise UnreadableSafetensors(f"unreadable: {error.strerror}") from error


def _part_names(folder: Path, files: frozenset[str]) -> tuple[str, ...]:
    if _INDEX in files:
        with naming(_INDEX):
            names = tuple(read_index(folder / _INDEX))
    else:
        names = (_SINGLE,) if _SINGLE in files else ()
    if not names:
        raise InvalidSafetensors("no weights: neither model.safetensors nor an index of parts")
    if len(names) > _MAX_PARTS:
        raise InvalidSafetensors("index damaged: an impossible number of parts")
    # A name with a folder in it is not among them either.
    missing = [str(no) for no, name in enumerate(names, 1) if name not in files]
    if missing:
        more = ", …" if len(missing) > 3 else ""
        numbers = ", ".join(missing[:3]) + more
        raise InvalidSafetensors(f"{len(missing)} of {len(names)} parts missing: {numbers}")
    return names


_OBJECT_JSON: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_T = TypeVar("_T")
_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
_COUNT_JSON: Final = msgspec.json.Decoder(_Count | None)
_COUNTS_JSON: Final = msgspec.json.Decoder(_Count | list[_Count | None] | None)
_SIGNED_JSON: Final = msgspec.json.Decoder(int | bool | None)
_PATTERN_JSON: Final = msgspec.json.Decoder(_Count | str | None)
_FLAG_JSON: Final = msgspec.json.Decoder(bool | None)
_TEXT_JSON: Final = msgspec.json.Decoder(str | None)


class _Quantization(msgspec.Struct):
    quant_method: str | None = None


_QUANTIZATION_JSON: Final = msgspec.json.Decoder(_Quantization | None)
_TEXTS_JSON: Final = msgspec.json.Decoder(
    Annotated[list[str], msgspec.Meta(max_length=_MAX_LAYERS)] | None
)


def _read_config(path: Path) -> Mapping[str, msgspec.Raw]:
    text = read_all(path, _MAX_CONFIG_BYTES)
    if text.count(b",") + text.count(b":") > _MAX_CONFIG_ITEMS:
        # Before it is decoded, which can take fifty times the memory.
        raise InvalidSafetensors("damaged: an impossible number of entries")
    config = decode(_OBJECT_JSON, text)
    for name in _NESTED:
        if name in config and bytes(config[name]).startswith(b"{"):
            nested = decode(_OBJECT_JSON, config[name])
            nested.pop("architectures", None)  # the half's own; the engine goes by the whole's
            config |= {key: raw for key, raw in nested.items() if bytes(raw) != b"null"}
    return config


def _model(
    config: Mapping[str, msgspec.Raw], names: tuple[str, ...], parts: Sequence[Part]
) -> SafetensorsModel:
    def value(decoder: msgspec.json.Decoder[_T | None], *names: str) -> _T | None:
        """Return the first of `names` that the config says."""
        for name in names:
            if name in config:
                with naming(name):
                    found = decode(decoder, config[name])
                if found is not None:
                    return found
        return None

    def count(*names: str) -> int | None:
        return value(_COUNT_JSON, *names) or None  # some say 0 where they mean nothing

    def largest(*names: str) -> int | None:
        found = value(_COUNTS_JSON, *names)
        if isinstance(found, list):
            found = max((one or 0 for one in found), default=0)
        return found or None

    type_bytes: Counter[str] = Counter()
    for part in parts:
        type_bytes.update(part.type_bytes)
    layers = count("num_hidden_layers", "n_layer", "num_layers")
    quantized = value(_QUANTIZATION_JSON, "quantization_config")
    rank, rope = count("kv_lora_rank"), count("qk_rope_head_dim")
    return SafetensorsModel(
        shards=names,
        weight_bytes=type_bytes.total(),
        type_bytes=tuple(type_bytes.most_common()),
        parameters=sum(part.parameters for part in parts),
        file_size=sum(part.file_size for part in parts),
        architectures=tuple(value(_TEXTS_JSON, "architectures") or ()),
        dtype=value(_TEXT_JSON, "dtype", "torch_dtype"),
        quantization_method=None if quantized is None else quantized.quant_method,
        num_hidden_layers=layers,
        hidden_size=count("hidden_size", "n_embd", "d_model"),
        intermediate_size=largest("intermediate_size", "n_inner", "ffn_hidden_size"),
        num_attention_heads=count("num_attention_heads", "n_head"),
        num_key_value_heads=largest(
            "num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"
        ),
        head_dim=count("head_dim"),
        kv_latent_dim=None if rank is None else rank + (rope or 0),
        max_position_embeddings=min(filter(None, map(count, _CONTEXT_LENGTHS)), default=None),
        stretches=_stretches(config),
        vocab_size=count("vocab_size", "padded_vocab_size"),
        sliding_window=_window(
            value(_SIGNED_JSON, "sliding_window"), used=value(_FLAG_JSON, "use_sliding_window")
        ),
        layer_types=tuple(value(_TEXTS_JSON, "layer_types") or ())[:layers],
        sliding_pattern=_pattern(
            value(_PATTERN_JSON, "sliding_window_pattern", "_sliding_window_pattern"),
            model_type=value(_TEXT_JSON, "model_type"),
        ),
        first_sliding_layer=count("max_window_layers") or 0,
    )


def _stretches(config: Mapping[str, msgspec.Raw]) -> bool:
    """Whether it says that a context beyond its own may do."""
    said = {name: bytes(raw) for name, raw in config.items() if bytes(raw) != b"null"}
    # Newer configs always have the second, for the rotation without any scaling too.
    scaled = "rope_scaling" in said or b'"factor"' in said.get("rope_parameters", b"")
    return scaled or "model_max_length" in said


def _window(tokens: int | None, *, used: bool | None) -> int | None:
    """Return the window; Qwen configs hold one that is not used."""
    if tokens is None or isinstance(tokens, bool) or used is False:
        return None
    return tokens if 0 < tokens < 1 << 32 else None


def _pattern(pattern: int | str | None, *, model_type: str | None) -> int | None:
    if isinstance(pattern, str):
        return 1  # `LLLG` and the like: as if no layer slid, which is never too few bytes
    if pattern is None and model_type in ("gemma2", "gemma2_text"):
        return 2
    return pattern or None
