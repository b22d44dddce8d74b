"""What a llama.cpp engine takes, from its model's header.

The KV cache is llama.cpp's own arithmetic: its log said the same bytes for every kind of layer
below. The other constants were measured as the PSS of the process after a long prompt, with
the runner's settings (xllamacpp 2026.10 on x86-64; batches of 512; flash attention, which
llama.cpp chose for every model tried). What was not measured says so. The figures of a first
load replace all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, NamedTuple

from xandrouting.core.model import Footprint, LoadOptions, Terms
from xandrouting.engines.base import ModelFacts, PerLayer, StateFacts

CACHE_TYPE: Final = "f16"
DEFAULT_CTX: Final = 4096
PROMPT_BATCH: Final = 512  # tokens
EMBEDDING_BATCH: Final = 2048
CHECKPOINTS: Final = 4  # of each slot; llama.cpp's 32 would take more than the cache itself

_CELLS: Final = 256  # a slot's context is padded to a multiple

_MIB: Final = 1 << 20
_MAX_LAYERS: Final = 512  # llama.cpp's own; a header may claim any number
_FLOAT: Final = 4  # activations, logits and states are 32 bit
# Bytes of 32 values in the cache.
_CACHE_BYTES: Final = {
    "f32": 128,
    "f16": 64,
    "bf16": 64,
    "q8_0": 34,
    "q5_1": 24,
    "q5_0": 22,
    "q4_1": 20,
    "q4_0": 18,
    "iq4_nl": 18,
}
# llama.cpp packs these anew for an x86-64 processor, and the file's pages stay beside the copy.
_REPACKED: Final = frozenset({"Q4_0", "Q4_K", "IQ4_NL", "MXFP4"})
# One layer in so many sees the whole context, the last of them; 0: none does. llama.cpp's own
# numbers, for headers that give a window and no pattern. An architecture that is not here
# counts as if no layer slid.
_PERIODS: Final = {
    "afmoe": 4,
    "cohere2": 4,
    "cohere2moe": 4,
    "exaone-moe": 4,
    "exaone4": 4,
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "gpt-oss": 2,
    "laguna": 4,
    "lfm2": 0,
    "llama4": 4,
    "mellum": 4,
    "muse-glimmer": 4,
    "olmo2": 4,
    "plamo3": 8,
    "smallthinker": 4,
}
_FULL_FIRST: Final = frozenset({"cohere2moe", "laguna", "smallthinker"})  # not the last of them
_WINDOWS: Final = {"gemma2": 4096, "llama4": 8192}  # where the header says none
_INTERVALS: Final = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4}  # one layer in so many attends
# They keep nothing of a request and give no logits.
_ENCODERS: Final = frozenset(
    {
        "bert",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
    }
)
# Python and the libraries: 14 of them file pages.
_RUNTIME_BYTES: Final = 29 * _MIB
# A token with its merges and look-ups: 405 to 410 with vocabularies of 49,000 to 250,000.
_TOKEN_BYTES: Final = 405
# Not measured: no GPU was at hand. CUDA's context and kernels, of one engine on one card.
_CUDA_BYTES: Final = 450 * _MIB


class Kept(NamedTuple):
    """What some layers keep, in values: of each token of a request, and of each request."""

    full_k: int = 0  # of keys, in layers that see the whole context
    full_v: int = 0
    sliding_k: int = 0  # in layers that see a window
    sliding_v: int = 0
    state: int = 0  # of each request, however long


@dataclass(frozen=True, slots=True)
class LlamaCost:
    """What an engine takes, for any options.

    Item `n` of a tuple is for the last `n` layers on an accelerator. Item `layers` is for all
    of them and the output, which llama.cpp counts as one more and moves last. On the
    processor there is only item 0.
    """

    layers: int
    host_weights: tuple[int, ...]
    device_weights: tuple[int, ...]
    kept: tuple[Kept, ...]  # there
    kept_in_all: Kept
    window: int  # tokens
    width: int  # values of one token in the working space
    vocab_size: int
    logits: int  # of each token whose logits are asked for
    mmproj_bytes: int

    def footprint(self, options: LoadOptions, cards: int = 1) -> Footprint:  # noqa: ARG002
        """Estimate; unset options count as the adapter's defaults."""
        n_ctx = options.n_ctx or DEFAULT_CTX
        slots = options.n_parallel or 1
        batch = min(EMBEDDING_BATCH if options.embeddings else PROMPT_BATCH, n_ctx * slots)
        asked = options.n_gpu_layers
        there = self.layers if asked is None or asked < 0 else min(asked, self.layers)
        cells = _padded(n_ctx)
        seen = min(cells, _padded(self.window + batch)) if self.window else 0
        all_kept = _kv_bytes(self.kept_in_all, options, cells, seen, slots)
        kept_there = _kv_bytes(self.kept[there], options, cells, seen, slots)
        # Whoever asks for vectors gets logits of every token along with them.
        outputs = _FLOAT * self.logits * (batch if options.embeddings else slots)
        # Logits come last, where the activations of the layers were. A mask for each kind of layer.
        compute = max(_FLOAT * batch * self.width, outputs) + 2 * batch * (cells + seen)
        host = Terms(
            weights=self.host_weights[there] + (0 if there else self.mmproj_bytes),
            kv_cache=all_kept - kept_there,
            compute=outputs + (0 if 0 < there == self.layers else compute),
            overhead=_RUNTIME_BYTES
            + _TOKEN_BYTES * self.vocab_size
            + self._checkpoint_bytes(options, cells, slots),
        )
        if not there:
            return Footprint(host=host)
        device = Terms(
            weights=self.device_weights[there] + self.mmproj_bytes,
            kv_cache=kept_there,
            compute=compute,
            overhead=_CUDA_BYTES,
        )
        return Footprint(host=host, device=device)

    def _checkpoint_bytes(self, options: LoadOptions, cells: int, slots: int) -> int:
        """Return what is put aside in main memory to go back to.

        Windows and states forget, so a conversation that is changed or cut short would have to
        be read from its beginning.
        """
        forgetful = self.kept_in_all._replace(full_k=0, full_v=0)
        return CHECKPOINTS * _kv_bytes(forgetful, options, 0, min(cells, self.window), slots)


def _kv_bytes(kept: Kept, options: LoadOptions, cells: int, seen: int, slots: int) -> int:
    """Return the bytes of caches with so many cells, and so many where a layer slides."""
    keys = cells * kept.full_k + seen * kept.sliding_k
    values = cells * kept.full_v + seen * kept.sliding_v
    cache = (
        keys * _CACHE_BYTES[options.cache_type_k or CACHE_TYPE]
        + values * _CACHE_BYTES[options.cache_type_v or CACHE_TYPE]
    )
    return slots * (cache // 32 + _FLOAT * kept.state)


def cost_of(facts: ModelFacts, *, on_cpu: bool) -> LlamaCost:
    """Return the cost of a model; what its header does not say counts as nothing."""
    count = min(max(facts.layers or 0, len(facts.block_bytes), 1), _MAX_LAYERS)
    slides = _slides(facts, count)
    kept = _kept(facts, count, slides)
    sums = [*accumulate(reversed(kept), _add, initial=Kept())]
    host, device = _weights(facts, count, on_cpu=on_cpu)
    vocab_size = facts.vocab_size or 0
    return LlamaCost(
        layers=0 if on_cpu else count + 1,
        host_weights=host,
        device_weights=device,
        kept=(Kept(),) if on_cpu else (*sums, sums[-1]),
        kept_in_all=sums[-1],
        window=_window(facts) if any(slides) else 0,
        width=_width(facts),
        vocab_size=vocab_size,
        logits=0 if facts.architecture in _ENCODERS else vocab_size,
        mmproj_bytes=facts.mmproj_bytes,
    )


def _weights(
    facts: ModelFacts, count: int, *, on_cpu: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return what is in main memory and what on the accelerator, by the layers that are there.

    Without an output of its own a model takes its table of tokens for it. That table stays in
    main memory to be looked up in, so all layers on an accelerator put a copy of it there.
    """
    size = facts.tensor_bytes or facts.size_bytes
    blocks = _blocks(facts, count, size)
    tied = facts.output_bytes == 0
    output = facts.embedding_bytes if tied else facts.output_bytes
    movable = sum(blocks) + output
    repacked = sum(taken for kind, taken in facts.type_bytes if kind in _REPACKED)
    if not tied and facts.embedding_type in _REPACKED:
        repacked -= facts.embedding_bytes  # nothing is multiplied with it
    moved = [*accumulate(reversed(blocks), initial=0), movable]
    gone = [*moved[:-1], movable - output if tied else movable]
    host = tuple(
        max(0, size - left) + max(0, repacked) * (movable - away) // max(1, movable)
        for left, away in zip(gone, moved, strict=True)
    )
    return (host[:1], (0,)) if on_cpu else (host, tuple(moved))


def _blocks(facts: ModelFacts, count: int, size: int) -> list[int]:
    """Return the bytes of each layer; where no names tell them apart, as if all were alike."""
    blocks = list(facts.block_bytes[:count])
    if not any(blocks):
        rest = size - facts.embedding_bytes - facts.output_bytes
        return [max(0, rest) // count] * count
    return blocks + [0] * (count - len(blocks))


def _kept(facts: ModelFacts, count: int, slides: Sequence[bool]) -> list[Kept]:
    """Return what each layer keeps."""
    if facts.architecture in _ENCODERS:
        return [Kept()] * count
    heads = _heads(facts, count)
    recurs = _recurs(facts, heads)
    if not all(recurs):  # where every layer has a state, it attends too or has no heads
        heads = [0 if state else n for n, state in zip(heads, recurs, strict=True)]
    state = 0 if facts.state is None else _state_values(facts.state)
    lengths = _head_lengths(facts)
    lengths_swa = _head_lengths(facts, swa=True)
    kept = []
    for layer, (n, slide, recur) in enumerate(zip(heads, slides, recurs, strict=True)):
        if layer >= count - facts.uncached_layers:
            kept.append(Kept())
            continue
        k, v = lengths_swa if slide else lengths
        keys, values = n * k, 0 if facts.keys_only else n * v
        own = state if recur else 0
        kept.append(Kept(0, 0, keys, values, own) if slide else Kept(keys, values, 0, 0, own))
    return kept


def _heads(facts: ModelFacts, count: int) -> list[int]:
    number = facts.head_count if facts.head_count_kv is None else facts.head_count_kv
    return _per_layer(number, count)


def _head_lengths(facts: ModelFacts, *, swa: bool = False) -> tuple[int, int]:
    """Return how many values a key and a value of one head have."""
    heads = _widest(facts.head_count)
    length = (facts.embedding_length or 0) // heads if heads else 0
    k = length if facts.key_length is None else facts.key_length
    v = length if facts.value_length is None else facts.value_length
    if swa:
        k = k if facts.key_length_swa is None else facts.key_length_swa
        v = v if facts.value_length_swa is None else facts.value_length_swa
    return k, v


def _slides(facts: ModelFacts, count: int) -> list[bool]:
    """Tell of each layer whether it sees a window only; where nothing tells, none does."""
    pattern = facts.sliding_pattern
    if pattern is None:
        pattern = _PERIODS.get(facts.architecture or "")
    if not _window(facts) or pattern is None:
        return [False] * count
    if isinstance(pattern, tuple):
        return [slide != 0 for slide in _per_layer(pattern, count)]
    if pattern == 0:
        return [True] * count
    full = 0 if facts.architecture in _FULL_FIRST else pattern - 1
    return [layer % pattern != full for layer in range(count)]


def _window(facts: ModelFacts) -> int:
    if facts.sliding_window is not None:
        return facts.sliding_window
    return _WINDOWS.get(facts.architecture or "", 0)


def _recurs(facts: ModelFacts, heads: Sequence[int]) -> list[bool]:
    """Tell of each layer whether it keeps a state."""
    count = len(heads)
    if facts.state is None:
        return [False] * count
    pattern = facts.recurrent_pattern or _INTERVALS.get(facts.architecture or "")
    if isinstance(pattern, tuple):
        return [recur != 0 for recur in _per_layer(pattern, count)]
    if pattern:
        return [(layer + 1) % pattern != 0 for layer in range(count)]
    return [n == 0 for n in heads] if any(heads) and 0 in heads else [True] * count


def _state_values(state: StateFacts) -> int:
    convolved = state.inner_size + 2 * state.group_count * state.state_size
    return max(0, state.conv_kernel - 1) * convolved + state.state_size * state.inner_size


def _width(facts: ModelFacts) -> int:
    """Return how many values of one token the working space holds at once.

    Fitted to what a long prompt touched, for shapes with wide and narrow layers and heads:
    within a tenth.
    """
    embedding = facts.embedding_length or 0
    inner = 0 if facts.state is None else facts.state.inner_size
    k, v = _head_lengths(facts)
    attention = _widest(facts.head_count) * 2 * k + _widest(facts.head_count_kv) * (k + v)
    feed_forward = 3 * max(facts.feed_forward or 0, 2 * inner)
    return max(feed_forward + 4 * embedding, attention + 2 * embedding)


def _per_layer(number: PerLayer, count: int) -> list[int]:
    if isinstance(number, tuple):
        return [max(0, n) for n in number[:count]] + [0] * (count - len(number))
    return [number or 0] * count


def _widest(number: PerLayer) -> int:
    return max((0, *number)) if isinstance(number, tuple) else number or 0


def _add(a: Kept, b: Kept) -> Kept:
    return Kept(*map(sum, zip(a, b, strict=True)))


def _padded(tokens: int) -> int:
    return -(-tokens // _CELLS) * _CELLS
