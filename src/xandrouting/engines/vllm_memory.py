"""What vLLM takes for a model, by arithmetic.

The rules are those of vLLM 0.32, read in its source. The size of the KV cache is exact: on a
CPU it starts with `kv_bytes` as its `--kv-cache-memory-bytes` and refuses with one byte less,
with full attention and with a sliding window. For the other constants each says whether it
was measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from xandrouting.core.model import Footprint, LoadOptions, Terms

_VALUE_BYTES: Final = 2  # activations, keys and values are 16 bit
_MIB: Final = 1 << 20

# Tokens in one block of the KV cache: CacheConfig.DEFAULT_BLOCK_SIZE and the CPU platform's own.
_GPU_BLOCK: Final = 16
_CPU_BLOCK: Final = 128

# The API server, the engine core and a worker with all their libraries. Measured on a CPU
# (PSS of the tree after a request of 1,500 tokens, eager): total less the other terms was
# 1.80 to 1.83 GB for a 135M model with 50 to 1,074 MB of KV cache, 1.67 GB for a 17M one.
# For an engine on a GPU not measured: CUDA's libraries are larger.
_PROCESSES_BYTES: Final = 1_800_000_000
# Each further card has a worker of its own. Not measured here: as one Python process with torch.
_WORKER_BYTES: Final = 900_000_000
# Compiling instead of `--enforce-eager` took 0.28 GB more at its peak on a CPU.
_COMPILER_BYTES: Final = 300_000_000
# Its three processes import it one after the other; 23 to 30 s from start to ready on two cores.
_START_S: Final = 25.0
_COMPILE_S: Final = 60.0  # once for a model and its options, then it is cached; not measured
# Neither is measured here.
_CUDA_CONTEXT_BYTES: Final = 512 * _MIB
_CUDA_GRAPHS_BYTES: Final = 512 * _MIB

# Not measured here: 16-bit buffers of a forward pass alive at once, in hidden and in
# intermediate sizes (input, output, residual, attention; gate, up, their product).
_HIDDEN_BUFFERS: Final = 4
_INTERMEDIATE_BUFFERS: Final = 3
# Not measured here: logits and their sorted copy, order, softmax and sum, as the sampler makes.
_BYTES_PER_LOGIT: Final = 24
_UNKNOWN_CACHE_BYTES: Final = 1 << 30
# What every sequence but one is given of the KV cache. They share it by the block, so a few
# long ones beside short ones fit too; when it runs out, vLLM lets one wait.
USUAL_TOKENS: Final = 2048


@dataclass(frozen=True, slots=True)
class VllmCost:
    """The memory of one model in vLLM on one card, or on the CPU.

    It holds for an engine that is started with `--kv-cache-memory-bytes` (`kv_bytes`),
    `--max-num-seqs` (the concurrency) and `--max-num-batched-tokens` (`batched_tokens`):
    left to itself, vLLM takes a share of the whole card, or of all RAM.
    """

    weights_bytes: int  # as they are run: see `run_bytes`
    kv_values: int  # what one layer keeps of one token: 2 * KV heads * head size
    full_layers: int  # layers that keep all tokens
    sliding_layers: int  # layers that keep those of their window
    sliding_window: int  # tokens; 0 where no layer slides
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    context_length: int  # the model's own, which `max_model_len` is where nobody asks
    on_cpu: bool = False
    eager: bool = False  # `--enforce-eager`: nothing is compiled, no CUDA graphs
    batched_tokens: int = 2048  # vLLM's own choice; 8192 on cards of 70 GiB and more
    reads_whole: bool = False  # a text is read in one piece: see `batch_tokens`
    card_bytes: int = 0  # of the smallest card, for `gpu_memory_utilization`; 0: not known

    @property
    def layers(self) -> int:
        """0: vLLM runs all layers in one place."""
        return 0

    def footprint(self, options: LoadOptions, cards: int = 1) -> Footprint:
        """Estimate; a share of the card that is asked for is taken, the KV cache fills it."""
        max_model_len = options.max_model_len
        if max_model_len is None:
            max_model_len = self.context_length
        concurrency = 1 if options.n_parallel is None else options.n_parallel
        processes = _PROCESSES_BYTES + (0 if self.eager else _COMPILER_BYTES)
        start_s = _START_S if self.eager else _START_S + _COMPILE_S
        engine = Terms(
            weights=self.weights_bytes,
            kv_cache=self.cache_bytes(max_model_len, concurrency),
            compute=self._compute_bytes(max_model_len, concurrency) * cards,
            overhead=processes if self.on_cpu else self._cuda_bytes() * cards,
        )
        if self.on_cpu:
            return Footprint(host=engine, start_s=start_s)
        if options.gpu_memory_utilization is not None:
            wanted = int(options.gpu_memory_utilization * self.card_bytes) * cards
            more = max(0, wanted - engine.total)
            engine = replace(engine, kv_cache=engine.kv_cache + more)
        workers = _WORKER_BYTES * (cards - 1)
        return Footprint(host=Terms(overhead=processes + workers), device=engine, start_s=start_s)

    def cache_bytes(self, max_model_len: int, concurrency: int) -> int:
        """Return a KV cache for one sequence of `max_model_len` tokens beside usual ones.

        Where the config does not say what a token takes, a guess: without any size vLLM would
        take a share of the whole device.
        """
        if not self.reads_whole and (self._group_layers() == 0 or self.kv_values == 0):
            return _UNKNOWN_CACHE_BYTES
        longest = self.kv_bytes(max_model_len, 1)
        usual = min(max_model_len, USUAL_TOKENS)
        one_more = self.kv_bytes(usual, 2) - self.kv_bytes(usual, 1)
        return longest + (concurrency - 1) * one_more

    def kv_bytes(self, max_model_len: int, concurrency: int) -> int:
        """Return the least KV cache that holds `concurrency` sequences of `max_model_len` tokens.

        vLLM deals it out in blocks of one size, and keeps one of them for itself. A block
        holds some tokens for a group of layers; where some layers slide, it makes groups of
        as many layers as there are of the rarer kind, the last one padded.
        """
        group = self._group_layers()
        if group == 0:
            return 0
        blocks = (
            -(-self.full_layers // group) * self._full_blocks(max_model_len)
            + -(-self.sliding_layers // group) * self._sliding_blocks(max_model_len)
        ) * concurrency
        return (blocks + 1) * group * self._block_tokens * self.kv_values * _VALUE_BYTES

    @property
    def _block_tokens(self) -> int:
        return _CPU_BLOCK if self.on_cpu else _GPU_BLOCK

    def _group_layers(self) -> int:
        few, many = sorted((self.full_layers, self.sliding_layers))
        # Numbers that are nearly the same are padded to the larger one.
        return many if many < few * 1.5 or few == 0 else few

    def _full_blocks(self, max_model_len: int) -> int:
        return -(-max_model_len // self._block_tokens)

    def _sliding_blocks(self, max_model_len: int) -> int:
        # A window may begin inside a block; tokens of batches under way are not dropped yet,
        # and on a GPU two batches are.
        under_way = self.batched_tokens * (1 if self.on_cpu else 2)
        tokens = min(self.sliding_window - 1 + under_way, max_model_len)
        return -(-tokens // self._block_tokens) + 1

    def _compute_bytes(self, max_model_len: int, concurrency: int) -> int:
        batched = batch_tokens(self.batched_tokens, max_model_len, whole=self.reads_whole)
        buffers = (
            _HIDDEN_BUFFERS * self.hidden_size + _INTERMEDIATE_BUFFERS * self.intermediate_size
        )
        logits = concurrency * self.vocab_size * _BYTES_PER_LOGIT
        return batched * buffers * _VALUE_BYTES + logits

    def _cuda_bytes(self) -> int:
        return _CUDA_CONTEXT_BYTES + (0 if self.eager else _CUDA_GRAPHS_BYTES)


def batch_tokens(usual: int, max_model_len: int, *, whole: bool) -> int:
    """Return how many tokens a batch must hold.

    A text that is seen in both directions cannot be read in pieces: vLLM refuses to start
    where the longest is longer than a batch.
    """
    return max(usual, max_model_len) if whole else usual


def run_bytes(type_bytes: Iterable[tuple[str, int]]) -> int:
    """Return what weights take once loaded, from the bytes of each stored dtype.

    vLLM runs 32- and 64-bit floats in 16 bits, and the rest as it is stored.
    """
    shrinks = {"F32": 2, "F64": 4}
    return sum(-(-stored // shrinks.get(dtype, 1)) for dtype, stored in type_bytes)
