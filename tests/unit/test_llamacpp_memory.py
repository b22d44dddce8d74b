"""What a llama.cpp engine takes. Where MiB are told, llama.cpp's log told the same ones."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xandrouting.core.model import Footprint, LoadOptions, Terms
from xandrouting.engines.base import ModelFacts, PerLayer, StateFacts
from xandrouting.engines.llamacpp_memory import CHECKPOINTS, LlamaCost, cost_of

MIB = 1 << 20
GIB = 1 << 30

# 4 layers, 2 KV heads of 128 values: 1 KiB of f16 cache for a token in each layer.
SMALL = ModelFacts(
    size_bytes=101 * MIB,
    layers=4,
    architecture="llama",
    embedding_length=1024,
    feed_forward=1024,
    vocab_size=1000,
    head_count=8,
    head_count_kv=2,
    tensor_bytes=100 * MIB,
    type_bytes=(("Q8_0", 100 * MIB),),
    block_bytes=(20 * MIB, 20 * MIB, 20 * MIB, 24 * MIB),
    embedding_bytes=8 * MIB,
    embedding_type="Q8_0",
    output_bytes=8 * MIB,
)
TIED = replace(SMALL, output_bytes=0, tensor_bytes=92 * MIB, type_bytes=(("Q8_0", 92 * MIB),))


def options(n_ctx: int = 4096, n_parallel: int = 1, **others: str | int | bool) -> LoadOptions:
    return replace(LoadOptions(n_ctx=n_ctx, n_parallel=n_parallel), **others)


def on_cpu(facts: ModelFacts, asked: LoadOptions | None = None) -> Terms:
    whole = cost_of(facts, on_cpu=True).footprint(asked or options())
    assert whole.device == Terms()
    return whole.host


def on_gpu(facts: ModelFacts, layers: int, asked: LoadOptions | None = None) -> Footprint:
    asked = replace(asked or options(), n_gpu_layers=layers)
    return cost_of(facts, on_cpu=False).footprint(asked)


def kv_mib(facts: ModelFacts, asked: LoadOptions | None = None) -> float:
    return on_cpu(facts, asked).kv_cache / MIB


# The cache.


def test_each_layer_keeps_its_heads_of_each_token() -> None:
    assert kv_mib(SMALL) == 16
    assert kv_mib(replace(SMALL, head_count_kv=(2, 0, 8, 1))) == 4 + 0 + 16 + 2
    assert kv_mib(replace(SMALL, head_count_kv=None)) == 64  # as many as there are heads
    assert kv_mib(replace(SMALL, head_count_kv=(2, 2))) == 8  # layers nobody names have none


def test_heads_are_as_long_as_the_header_says() -> None:
    assert kv_mib(replace(SMALL, key_length=256)) == 24
    assert kv_mib(replace(SMALL, key_length=64, value_length=32)) == 6
    assert kv_mib(replace(SMALL, embedding_length=2048)) == 32


@pytest.mark.parametrize(
    ("keys", "values", "mib"),
    [
        ("f16", "f16", 16),
        ("bf16", "bf16", 16),
        ("f32", "f16", 24),
        ("f16", "f32", 24),
        ("q8_0", "q8_0", 8.5),
        ("f16", "q8_0", 12.25),
        ("q4_0", "q4_0", 4.5),
        ("iq4_nl", "q4_0", 4.5),
        ("q4_1", "q4_1", 5),
        ("q5_0", "q5_0", 5.5),
        ("q5_1", "q5_1", 6),
    ],
)
def test_cache_types(keys: str, values: str, mib: float) -> None:
    assert kv_mib(SMALL, options(cache_type_k=keys, cache_type_v=values)) == mib


def test_every_slot_has_a_cache_of_its_own_padded_to_256_tokens() -> None:
    assert kv_mib(SMALL, options(n_ctx=1)) == 1
    assert kv_mib(SMALL, options(n_ctx=256)) == 1
    assert kv_mib(SMALL, options(n_ctx=257)) == 2
    assert kv_mib(SMALL, options(n_ctx=300, n_parallel=3)) == 6


def test_unset_options_are_4096_tokens_of_f16_in_one_slot() -> None:
    assert kv_mib(SMALL, LoadOptions()) == 16


# Windows. 4 MiB for 4,096 tokens in a layer.


def sliding(layers: int, architecture: str, window: int, pattern: PerLayer = None) -> ModelFacts:
    return replace(
        SMALL,
        layers=layers,
        block_bytes=(),
        architecture=architecture,
        sliding_window=window,
        sliding_pattern=pattern,
    )


@pytest.mark.parametrize(
    ("facts", "n_ctx", "n_parallel", "mib"),
    [
        # 2 layers of 4,096 cells and 11 of 512 + 512, for two.
        (sliding(13, "gemma3", 512), 4096, 2, 16 + 22),
        (sliding(13, "gemma3", 512), 16_384, 1, 32 + 11),
        (sliding(5, "gemma2", 1024), 4096, 2, 16 + 9),
        (sliding(13, "gemma3", 512, 3), 4096, 2, 32 + 18),
        (sliding(4, "gemma3", 600, (1, 1, 1, 0)), 4096, 2, 8 + 7.5),
        (replace(sliding(5, "gpt-oss", 128), key_length=64, value_length=64), 4096, 2, 8 + 2.25),
    ],
)
def test_sliding_layers_keep_a_window_and_a_batch(
    facts: ModelFacts, n_ctx: int, n_parallel: int, mib: float
) -> None:
    assert kv_mib(facts, options(n_ctx, n_parallel)) == mib


def test_a_window_larger_than_the_context_is_the_context() -> None:
    assert kv_mib(sliding(4, "gemma3", 8192)) == 16
    assert kv_mib(sliding(4, "gemma3", 200), options(n_ctx=256)) == 1


def test_a_batch_of_inputs_to_embed_is_longer() -> None:
    # 11 layers of 512 + 2,048 cells.
    assert kv_mib(sliding(13, "gemma3", 512), options(embeddings=True)) == 8 + 27.5
    # No batch is longer than all slots together.
    asked = options(n_ctx=1024, embeddings=True)
    assert kv_mib(sliding(4, "gemma3", 512), asked) == 4


@pytest.mark.parametrize(
    ("facts", "full"),
    [
        (sliding(8, "gemma3", 256), 1),
        (sliding(8, "gemma3", 256, 0), 0),
        (sliding(8, "gemma3", 256, 1), 8),
        (sliding(8, "cohere2", 256), 2),
        (sliding(5, "smallthinker", 256), 2),  # the first of each four, not the last
        (sliding(5, "afmoe", 256), 1),
        (sliding(4, "lfm2", 256), 0),
        (sliding(4, "phi3", 256), 4),  # llama.cpp does without its window
        (sliding(4, "of-tomorrow", 256), 4),
        (sliding(4, "of-tomorrow", 256, 2), 2),
        (sliding(4, "gemma3", 0), 4),
        (replace(sliding(8, "gemma3", 1), sliding_window=None), 8),
        (sliding(6, "gemma3", 256, (1, 0)), 5),  # what nobody names is full
    ],
)
def test_which_layers_see_the_whole_context(facts: ModelFacts, full: int) -> None:
    layers = facts.layers or 0
    window = min(1.0, ((facts.sliding_window or 0) + 512) / 4096)
    assert kv_mib(facts) == 4 * (full + (layers - full) * window)


def test_windows_that_llama_cpp_knows_though_the_header_is_silent() -> None:
    gemma2 = replace(sliding(2, "gemma2", 1), sliding_window=None)
    assert kv_mib(gemma2, options(n_ctx=16_384)) == 16 + (4096 + 512) / 1024
    llama4 = replace(gemma2, architecture="llama4", layers=4)
    assert kv_mib(llama4, options(n_ctx=16_384)) == 16 + 3 * (8192 + 512) / 1024


def test_sliding_layers_may_have_heads_of_their_own_and_the_last_may_share() -> None:
    gemma4 = replace(
        sliding(6, "gemma4", 512, (1, 1, 0, 1, 1, 0)),
        head_count_kv=(2, 2, 1, 2, 2, 1),
        key_length_swa=64,
        value_length_swa=64,
        uncached_layers=3,
    )
    assert kv_mib(gemma4, options(n_parallel=2)) == 2 + 4


# Other things that are kept.


def test_latents_hold_the_values_inside_the_keys() -> None:
    deepseek2 = replace(
        SMALL, head_count_kv=1, key_length=256 + 32, value_length=256, keys_only=True
    )
    assert kv_mib(deepseek2, options(n_parallel=2)) == 18
    assert kv_mib(deepseek2, options(cache_type_v="f32")) == 9


STATE = StateFacts(conv_kernel=4, inner_size=512, state_size=128, group_count=2)
STATE_MIB = (3 * (512 + 2 * 2 * 128) + 128 * 512) * 4 / MIB


@pytest.mark.parametrize(
    ("facts", "attending", "recurrent"),
    [
        (replace(SMALL, architecture="qwen35", layers=9), 2, 7),
        (replace(SMALL, architecture="qwen35", layers=9, recurrent_pattern=3), 3, 6),
        (replace(SMALL, architecture="qwen35", recurrent_pattern=(0, 1, 1, 0)), 2, 2),
        (replace(SMALL, architecture="jamba", head_count_kv=(0, 2, 0, 0)), 1, 3),
        (replace(SMALL, architecture="falcon-h1"), 4, 4),
        (replace(SMALL, architecture="mamba", head_count=0, head_count_kv=None), 0, 4),
    ],
)
def test_states_do_not_grow_with_the_context(
    facts: ModelFacts, attending: int, recurrent: int
) -> None:
    facts = replace(facts, block_bytes=(), state=STATE)
    for n_ctx, n_parallel in ((4096, 2), (8192, 1)):
        cache = attending * n_ctx * n_parallel / 1024
        asked = options(n_ctx, n_parallel)
        assert kv_mib(facts, asked) == cache + recurrent * STATE_MIB * n_parallel


def test_a_state_as_llama_cpp_tells_it() -> None:
    mamba = StateFacts(conv_kernel=4, inner_size=1024, state_size=16, group_count=0)
    facts = replace(SMALL, head_count=0, head_count_kv=None, state=mamba)
    assert kv_mib(facts, options(n_parallel=2)) == pytest.approx(0.59, abs=0.005)


def test_an_encoder_keeps_nothing() -> None:
    assert kv_mib(replace(SMALL, architecture="bert", pooling=True)) == 0


def test_what_is_put_aside_of_windows_and_states_is_in_main_memory() -> None:
    plain = on_cpu(SMALL).overhead
    for facts in (sliding(13, "gemma3", 512), replace(SMALL, state=STATE)):
        assert on_cpu(facts).overhead > plain
        assert on_gpu(facts, -1).host.overhead == on_cpu(facts).overhead
    # A window of 512 tokens in 11 layers, for each of two.
    gemma3 = on_cpu(sliding(13, "gemma3", 512), options(n_parallel=2))
    assert gemma3.overhead - plain == CHECKPOINTS * 2 * 11 * MIB // 2


# Weights.


def test_weights_are_the_tensors_and_not_the_header() -> None:
    assert on_cpu(SMALL).weights == 100 * MIB
    assert on_cpu(replace(SMALL, tensor_bytes=0)).weights == 101 * MIB


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "IQ4_NL", "MXFP4"])
def test_some_types_are_packed_anew_beside_the_file(kind: str) -> None:
    types = (("Q8_0", 60 * MIB), (kind, 40 * MIB))
    assert on_cpu(replace(SMALL, type_bytes=types)).weights == 140 * MIB


def test_a_table_that_is_only_looked_up_in_is_not_packed() -> None:
    types = (("Q4_0", 92 * MIB), ("F32", 8 * MIB))
    untied = replace(SMALL, type_bytes=types, embedding_type="Q4_0")
    assert on_cpu(untied).weights == 100 * MIB + 84 * MIB
    tied = replace(TIED, type_bytes=(("Q4_0", 92 * MIB),), embedding_type="Q4_0")
    assert on_cpu(tied).weights == 92 * MIB + 92 * MIB


def test_only_what_stays_in_main_memory_is_packed() -> None:
    facts = replace(SMALL, type_bytes=(("Q4_0", 92 * MIB), ("Q8_0", 8 * MIB)))
    packed = [on_gpu(facts, n).host.weights - on_gpu(SMALL, n).host.weights for n in range(6)]
    # 92 of the 92 MiB that could move, then without the last layer's 24, and so on.
    assert packed == [92 * MIB, 68 * MIB, 48 * MIB, 28 * MIB, 8 * MIB, 0]


def test_the_last_layers_move_first_and_the_output_last() -> None:
    weights = [on_gpu(SMALL, n).device.weights for n in range(6)]
    assert weights == [0, 24 * MIB, 44 * MIB, 64 * MIB, 84 * MIB, 92 * MIB]
    kept = [on_gpu(SMALL, n).device.kv_cache for n in range(6)]
    assert kept == [0, 4 * MIB, 8 * MIB, 12 * MIB, 16 * MIB, 16 * MIB]


@pytest.mark.parametrize("layers", range(6))
def test_main_memory_and_accelerator_make_the_whole(layers: int) -> None:
    split, whole = on_gpu(SMALL, layers), on_cpu(SMALL)
    assert split.host.weights + split.device.weights == whole.weights
    assert split.host.kv_cache + split.device.kv_cache == whole.kv_cache


def test_a_table_used_twice_is_in_both() -> None:
    most, all_of_it = on_gpu(TIED, 4), on_gpu(TIED, 5)
    assert all_of_it.device.weights == most.device.weights + 8 * MIB
    assert all_of_it.host.weights == most.host.weights == 8 * MIB


def test_minus_one_and_unset_and_too_many_are_all() -> None:
    assert cost_of(SMALL, on_cpu=False).layers == 5
    everything = on_gpu(SMALL, 5)
    assert on_gpu(SMALL, -1) == on_gpu(SMALL, 99) == everything
    assert cost_of(SMALL, on_cpu=False).footprint(options()) == everything


def test_without_layers_there_nothing_is_there() -> None:
    assert on_gpu(SMALL, 0) == Footprint(host=on_cpu(SMALL))
    assert cost_of(SMALL, on_cpu=True).layers == 0
    everything = options(n_gpu_layers=-1)
    assert on_cpu(SMALL, everything) == on_cpu(SMALL)


def test_the_projector_is_where_layers_are() -> None:
    seeing = replace(SMALL, mmproj_bytes=7 * MIB)
    assert on_cpu(seeing).weights == 107 * MIB
    split = on_gpu(seeing, 1)
    assert split.host.weights == on_gpu(SMALL, 1).host.weights
    assert split.device.weights == on_gpu(SMALL, 1).device.weights + 7 * MIB


# The rest.


def test_the_working_space_is_of_one_batch_and_its_mask() -> None:
    activations = 4 * (3 * 1024 + 4 * 1024)
    outputs = 4 * 1000
    assert on_cpu(SMALL).compute == 512 * (activations + 2 * 4096) + outputs
    assert on_cpu(SMALL, options(256)).compute == 256 * (activations + 2 * 256) + outputs
    many = on_cpu(SMALL, options(n_parallel=3)).compute
    assert many == 512 * (activations + 2 * 4096) + 3 * outputs
    # Two kinds of layers, two masks.
    windowed = sliding(4, "gemma3", 512)
    assert on_cpu(windowed).compute == 512 * (activations + 2 * (4096 + 1024)) + outputs


def test_wide_heads_need_room_too() -> None:
    wide = replace(SMALL, key_length=512, value_length=512)
    attention = 4 * (2 * 8 * 512 + 2 * 2 * 512 + 2 * 1024)
    assert on_cpu(wide).compute == 512 * (attention + 2 * 4096) + 4 * 1000


def test_vectors_come_with_the_logits_of_every_token() -> None:
    large = replace(SMALL, vocab_size=50_000)
    logits = 2048 * 50_000 * 4
    assert on_cpu(large, options(embeddings=True)).compute == 2 * logits + 2048 * 2 * 4096
    encoder = replace(large, architecture="bert")
    assert on_cpu(encoder, options(embeddings=True)).compute < logits


def test_work_is_done_where_layers_are() -> None:
    compute = on_cpu(SMALL).compute
    assert [on_gpu(SMALL, n).host.compute for n in (0, 1, 4)] == [compute] * 3
    assert on_gpu(SMALL, 5).host.compute == 4 * 1000  # what comes out
    assert [on_gpu(SMALL, n).device.compute for n in (1, 5)] == [compute - 4 * 1000] * 2


def test_a_vocabulary_takes_room() -> None:
    more = replace(SMALL, vocab_size=101_000)
    assert on_cpu(more).overhead - on_cpu(SMALL).overhead == 405 * 100_000


def test_a_larger_wish_is_never_smaller() -> None:
    def total(facts: ModelFacts, asked: LoadOptions) -> int:
        whole = cost_of(facts, on_cpu=False).footprint(asked)
        return whole.host_bytes + whole.device_bytes

    for facts in (SMALL, TIED, sliding(6, "gemma3", 512), replace(SMALL, state=STATE)):
        for layers in (0, 3, -1):
            by_ctx = [total(facts, options(n, 2, n_gpu_layers=layers)) for n in range(1, 9000, 100)]
            by_slots = [total(facts, options(2000, n, n_gpu_layers=layers)) for n in range(1, 20)]
            assert all(a <= b for a, b in [*pairwise(by_ctx), *pairwise(by_slots)])


# Headers that say little, or nonsense.


def test_a_file_without_a_header_weighs_what_it_is() -> None:
    unknown = ModelFacts(size_bytes=GIB)
    assert on_cpu(unknown).weights == GIB
    assert kv_mib(unknown) == 0
    everything = on_gpu(unknown, -1)
    assert (everything.host.weights, everything.device.weights) == (0, GIB)


def test_layers_without_names_are_alike() -> None:
    facts = ModelFacts(size_bytes=GIB, layers=8)
    assert on_gpu(facts, 2).device.weights == GIB // 4


def test_a_claim_of_layers_beyond_belief_costs_nothing() -> None:
    cost = cost_of(ModelFacts(size_bytes=1, layers=(1 << 32) - 1), on_cpu=False)
    assert cost.layers == 513


numbers = st.none() | st.integers(0, 8) | st.integers(0, (1 << 32) - 1)
per_layer = numbers | st.lists(st.integers(-(1 << 63), 1 << 63), max_size=9).map(tuple)
sizes = st.integers(0, 1 << 50)
kinds = st.sampled_from(["Q4_0", "F32", "Q8_0"])
odd = st.builds(
    ModelFacts,
    size_bytes=sizes,
    layers=numbers,
    architecture=st.none() | st.sampled_from(["gemma3", "qwen35", "smallthinker", "bert", ""]),
    embedding_length=numbers,
    feed_forward=numbers,
    vocab_size=numbers,
    head_count=per_layer,
    head_count_kv=per_layer,
    key_length=numbers,
    value_length_swa=numbers,
    keys_only=st.booleans(),
    sliding_window=numbers,
    sliding_pattern=per_layer,
    state=st.none() | st.builds(StateFacts, *[st.integers(0, (1 << 32) - 1)] * 4),
    recurrent_pattern=per_layer,
    uncached_layers=st.integers(0, 1 << 33),
    tensor_bytes=sizes,
    type_bytes=st.lists(st.tuples(kinds, sizes), max_size=3).map(tuple),
    block_bytes=st.lists(sizes, max_size=9).map(tuple),
    embedding_bytes=sizes,
    embedding_type=st.none() | kinds,
    output_bytes=sizes,
    mmproj_bytes=sizes,
)


@settings(max_examples=200, deadline=None, database=None)
@given(facts=odd, asked=st.builds(options, st.integers(1, 1 << 31), st.integers(1, 256)))
def test_no_header_is_too_odd(facts: ModelFacts, asked: LoadOptions) -> None:
    for cost in (cost_of(facts, on_cpu=True), cost_of(facts, on_cpu=False)):
        assert isinstance(hash(cost), int)
        for layers in {0, 1, cost.layers}:
            whole = cost.footprint(replace(asked, n_gpu_layers=layers))
            for terms in (whole.host, whole.device):
                assert min(terms.weights, terms.kv_cache, terms.compute, terms.overhead) >= 0


def test_equal_models_cost_the_same() -> None:
    assert isinstance(cost_of(SMALL, on_cpu=True), LlamaCost)
    assert cost_of(SMALL, on_cpu=False) == cost_of(replace(SMALL), on_cpu=False)
    assert cost_of(SMALL, on_cpu=False) != cost_of(SMALL, on_cpu=True)
