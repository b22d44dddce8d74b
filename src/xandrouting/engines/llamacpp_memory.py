"""What a llama.cpp engine takes, from its model's header.

The KV cache is llama.cpp's own arithmetic. The rest was measured on x86-64 with the runner's
settings (xllamacpp 2026.10: batches of 512, flash attention where llama.cpp chooses it), as the
PSS of the process after a long prompt; what is not measured says so. The figures of a first
load replace all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from xandrouting.core.model import Footprint, LoadOptions, Terms
from xandrouting.engines.base import ModelFacts, PerLayer

CACHE_TYPE: Final = "f16"
PROMPT_BATCH: Final = 512  # tokens
EMBEDDING_BATCH: Final = 2048
DEFAULT_CTX: Final = 4096
CELLS: Final = 256  # a slot's context is padded to a multiple

MIB: Final = 1 << 20
# Bits of one value in the cache.
_CACHE_BITS: Final = {
    "f32": 32.0,
    "f16": 16.0,
    "bf16": 16.0,
    "q8_0": 8.5,
    "q5_1": 6.0,
    "q5_0": 5.5,
    "q4_1": 5.0,
    "q4_0": 4.5,
    "iq4_nl": 4.5,
}
# llama.cpp packs these anew for the processor: the packed copy is in memory beside the file.
_REPACKED: Final = frozenset(("Q4_0", "Q4_K", "IQ4_NL", "MXFP4"))
# Every so many layers one looks at the whole context, where the header does not say.
_SLIDING_PATTERNS: Final = {
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "gpt-oss": 2,
    "cohere2": 4,
    "exaone4": 4,
    "olmo2": 4,
}
_RUNTIME_BYTES: Final = 26 * MIB  # Python and the libraries
_TOKEN_BYTES: Final = 460  # of each token of the vocabulary, its merges and look-ups
# Not measured: no GPU was at hand. CUDA's context and kernels, of one engine on one card.
_CUDA_BYTES: Final = 450 * MIB


@dataclass(frozen=True, slots=True)
class LlamaCost:
    """What an engine takes, for any options.

    The tuples hold sums: item `n` is of the last `n` layers, so item `layers` is the whole.
    """

    layers: int
    on_cpu: bool
    file_bytes: int
    repacked_share: float  # of the file, how much is packed anew
    offload_bytes: tuple[int, ...]  # of the file, on an accelerator with so many layers there
    tied_bytes: int  # of the embeddings where they are the output too: then both have them
    full_k: tuple[int, ...]  # values of keys per token, in layers that see the whole context
    full_v: tuple[int, ...]
    sliding_k: tuple[int, ...]  # the same in layers that see a window
    sliding_v: tuple[int, ...]
    window: int
    embedding_length: int
    feed_forward: int
    vocab_size: int
    mmproj_bytes: int

    def footprint(self, options: LoadOptions) -> Footprint:
        """Estimate; unset options count as llama.cpp's defaults here."""
        offloaded = self._offloaded(options)
        weights = self.offload_bytes[offloaded]
        slots = options.n_parallel or 1
        n_ctx = options.n_ctx or DEFAULT_CTX
        kv_cache = self.kv_bytes(options)
        kv_on_device = self._kv_bytes(options, offloaded)
        compute = self._compute(n_ctx, slots, embeddings=bool(options.embeddings))
        outputs = slots * self.vocab_size * 4
        overhead = _RUNTIME_BYTES + self.vocab_size * _TOKEN_BYTES
        stays = self.file_bytes - weights
        if 0 < offloaded == self.layers:
            stays += self.tied_bytes
        repacked = int(stays * self.repacked_share)
        eyes = self.mmproj_bytes
        host = Terms(
            weights=stays + repacked + (0 if offloaded else eyes),
            kv_cache=kv_cache - kv_on_device,
            compute=outputs + (0 if 0 < offloaded == self.layers else compute),
            overhead=overhead,
        )
        if not offloaded:
            return Footprint(host=host)
        device = Terms(
            weights=weights + eyes,
            kv_cache=kv_on_device,
            compute=compute,
            overhead=_CUDA_BYTES,
        )
        return Footprint(host=host, device=device)

    def kv_bytes(self, options: LoadOptions) -> int:
        """Return the bytes of the whole KV cache, of all slots, wherever it lies."""
        return self._kv_bytes(options, len(self.full_k) - 1)

    def _offloaded(self, options: LoadOptions) -> int:
        asked = options.n_gpu_layers
        if self.on_cpu or asked == 0:
            return 0
        return self.layers if asked is None or asked < 0 else min(asked, self.layers)

    def _kv_bytes(self, options: LoadOptions, layers: int) -> int:
        """Return what the cache of the last `layers` layers takes, the output counted as one."""
        last = min(layers, len(self.full_k) - 1)
        cells = _padded(options.n_ctx or DEFAULT_CTX)
        seen = min(cells, _padded(self.window + PROMPT_BATCH))
        bits_k = _CACHE_BITS[options.cache_type_k or CACHE_TYPE]
        bits_v = _CACHE_BITS[options.cache_type_v or CACHE_TYPE]
        full = self.full_k[last] * bits_k + self.full_v[last] * bits_v
        sliding = self.sliding_k[last] * bits_k + self.sliding_v[last] * bits_v
        return int((cells * full + seen * sliding) / 8) * (options.n_parallel or 1)

    def _compute(self, n_ctx: int, slots: int, *, embeddings: bool) -> int:
        """Return what the working space of one batch takes."""
        most = EMBEDDING_BATCH if embeddings else PROMPT_BATCH
        batch = min(most, n_ctx * slots)
        activations = 4 * batch * (3 * self.feed_forward + 4 * self.embedding_length)
        mask = 2 * batch * _padded(n_ctx)
        return activations + mask


def cost_of(facts: ModelFacts, *, on_cpu: bool) -> LlamaCost:
    """Return the cost of a model; what its header does not say counts as nothing."""
    blocks = facts.block_bytes
    count = max(facts.layers or 0, len(blocks))
    blocks = (*blocks, *[0] * (count - len(blocks)))
    tensors = sum(taken for _, taken in facts.type_bytes)
    file_bytes = max(facts.size_bytes, tensors)
    repacked = sum(taken for kind, taken in facts.type_bytes if kind in _REPACKED)
    keys, values = _kv_values(facts, count)
    slides = _slides(facts, count)
    output = facts.output_bytes if facts.output_bytes > facts.embedding_bytes // 2 else 0
    return LlamaCost(
        layers=0 if on_cpu else count + 1,
        on_cpu=on_cpu,
        file_bytes=file_bytes,
        repacked_share=repacked / file_bytes if file_bytes else 0.0,
        # llama.cpp counts what comes after the last layer as one more, and moves it last.
        offload_bytes=(*_last(blocks), sum(blocks) + (output or facts.embedding_bytes)),
        tied_bytes=0 if output else facts.embedding_bytes,
        full_k=_last([0 if slide else k for k, slide in zip(keys, slides, strict=True)]),
        full_v=_last([0 if slide else v for v, slide in zip(values, slides, strict=True)]),
        sliding_k=_last([k if slide else 0 for k, slide in zip(keys, slides, strict=True)]),
        sliding_v=_last([v if slide else 0 for v, slide in zip(values, slides, strict=True)]),
        window=facts.sliding_window or 0,
        embedding_length=facts.embedding_length or 0,
        feed_forward=facts.feed_forward or 0,
        vocab_size=facts.vocab_size or 0,
        mmproj_bytes=facts.mmproj_bytes,
    )


def _last(layers: Sequence[int]) -> tuple[int, ...]:
    """Return the sums of the last 0, 1, 2, … layers."""
    return (0, *accumulate(reversed(layers)))


def _padded(tokens: int) -> int:
    return -(-tokens // CELLS) * CELLS


def _kv_values(facts: ModelFacts, count: int) -> tuple[list[int], list[int]]:
    """Return how many values of keys and of values one token has in each layer."""
    if facts.latent_length is not None:
        return [facts.latent_length] * count, [0] * count
    heads = list(_per_layer(facts.head_count, count))
    kv_heads = list(_per_layer(facts.head_count_kv, count))
    if facts.head_count_kv is None:
        kv_heads = heads
    widest = max(heads, default=0)
    length = (facts.embedding_length or 0) // widest if widest else 0
    keys = length if facts.key_length is None else facts.key_length
    values = length if facts.value_length is None else facts.value_length
    return [n * keys for n in kv_heads], [n * values for n in kv_heads]


def _per_layer(number: PerLayer, count: int) -> Iterator[int]:
    if isinstance(number, tuple):
        yield from (*number, *[0] * count)[:count]
    else:
        yield from [number or 0] * count


def _slides(facts: ModelFacts, count: int) -> list[bool]:
    """Tell of each layer whether it sees a window only; where nothing tells, none does."""
    pattern = facts.sliding_pattern or _SLIDING_PATTERNS.get(facts.architecture or "")
    if not facts.sliding_window or not pattern:
        return [False] * count
    if isinstance(pattern, tuple):
        return [bool(slide) for slide in _per_layer(pattern, count)]
    return [layer % pattern != pattern - 1 for layer in range(count)]
