"""What vLLM is told, on the CPU and on cards, and what its answers mean."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.unit.scheduling import gib
from xandrouting.core.errors import EngineDied, InvalidRequest, UnsupportedByEngine
from xandrouting.core.model import (
    Backend,
    EngineSpec,
    LaunchPlan,
    Level,
    LoadOptions,
    ModelKey,
    Placement,
)
from xandrouting.engines.base import ModelFacts, visible_devices
from xandrouting.engines.vllm import GATE_FOLDER, Vllm, VllmSetup
from xandrouting.engines.vllm_memory import VllmCost

SETUP = VllmSetup("/opt/vllm/bin/vllm", None, cache_folder="/data/vllm", drain_s=9.5)
ON_CARDS = replace(SETUP, card_bytes=gib(24))
FACTS = ModelFacts(
    size_bytes=270_000_000,
    context_length=16_384,
    layers=30,
    architecture="LlamaForCausalLM",
    embedding_length=576,
    feed_forward=1536,
    vocab_size=49_152,
    head_count=8,
    kv_values=2 * 3 * 64,
    full_layers=30,
    type_bytes=(("BF16", 269_030_016),),
)
ADAPTER = Vllm(SETUP)


def spec(device: str = "cpu", adapter: Vllm = ADAPTER, facts: ModelFacts = FACTS) -> EngineSpec:
    return EngineSpec(
        ModelKey("/models/smol", adapter.backend, device),
        "/srv/models/smol",
        defaults=adapter.defaults(facts, device),
        cost=adapter.cost(facts, device),
        flags=adapter.flags(facts),
    )


def plan(
    *cards: str, setup: VllmSetup = SETUP, facts: ModelFacts = FACTS, **options: float
) -> LaunchPlan:
    """Return the plan of a model with 2,048 tokens for 4 requests, save for `options`."""
    adapter = Vllm(setup)
    wanted = spec("cuda" if cards else "cpu", adapter, facts)
    settled = replace(LoadOptions(max_model_len=2048, n_parallel=4), **options)
    return adapter.plan(wanted, settled, placement=cards)


def flags(launch: LaunchPlan) -> dict[str, str]:
    """Return the options of a command line by their names."""
    pairs = [flag.partition("=") for flag in launch.argv if flag.startswith("--")]
    return {name: value for name, _, value in pairs}


# The plan.


def test_on_the_processor() -> None:
    launch = plan()
    assert launch.argv == (
        "/opt/vllm/bin/vllm",
        "serve",
        "/srv/models/smol",
        "--host=127.0.0.1",
        "--port={port}",
        "--served-model-name=/models/smol",
        "--middleware=xandrouting_gate.Gate",
        "--disable-uvicorn-access-log",
        "--shutdown-timeout=10",
        "--max-num-seqs=4",
        "--max-num-batched-tokens=512",
        "--max-model-len=2048",
        # A block of 128 tokens takes 2,949,120 bytes: 16 for each of the four, and one of its own.
        f"--kv-cache-memory-bytes={(4 * 16 + 1) * 2_949_120}",
        "--enforce-eager",
    )
    assert launch.env == (
        ("VLLM_API_KEY", "{key}"),
        ("PYTHONPATH", str(GATE_FOLDER)),
        ("HF_HUB_OFFLINE", "1"),
        ("TRANSFORMERS_OFFLINE", "1"),
        ("VLLM_NO_USAGE_STATS", "1"),
        ("DO_NOT_TRACK", "1"),
        ("PYTHONUNBUFFERED", "1"),
        ("TMPDIR", "{scratch}"),
        ("VLLM_CACHE_ROOT", "/data/vllm"),
        ("TORCHINDUCTOR_CACHE_DIR", "/data/vllm/inductor"),
        ("TORCHDYNAMO_DISABLE", "1"),
        ("CUDA_VISIBLE_DEVICES", ""),
        ("VLLM_CPU_OMP_THREADS_BIND", "{cores}"),
        ("GOMP_SPINCOUNT", "1000"),
    )
    assert (launch.health_path, launch.ready_line, launch.order) == ("/health", None, "")
    assert (launch.stop_grace_s, launch.health_every_s) == (0.0, 0.5)
    assert (GATE_FOLDER / "xandrouting_gate.py").is_file()


@pytest.mark.parametrize(
    ("cards", "names", "visible"),
    [
        (["cuda:0"], (), "0"),
        (["cuda:1"], (), "1"),
        (["cuda:0", "cuda:1"], (), "0,1"),
        (["cuda:2", "cuda:3"], (), "2,3"),
        (["cuda:0", "cuda:1", "cuda:2", "cuda:3"], (), "0,1,2,3"),
        # The gateway itself was given cards: theirs are the names.
        (["cuda:0"], ("3", "1"), "3"),
        (["cuda:0", "cuda:1"], ("GPU-ab", "GPU-cd"), "GPU-ab,GPU-cd"),
    ],
)
def test_on_cards(cards: list[str], names: tuple[str, ...], visible: str) -> None:
    launch = plan(*cards, setup=replace(ON_CARDS, cards=names))
    env = dict(launch.env)
    assert env["CUDA_VISIBLE_DEVICES"] == visible
    assert "VLLM_CPU_OMP_THREADS_BIND" not in env
    told = flags(launch)
    assert told["--tensor-parallel-size"] == str(len(cards))
    assert "--enforce-eager" not in told
    assert visible_devices(tuple(cards), names) == visible


@pytest.mark.parametrize("cards", [1, 2, 4])
def test_the_card_is_shared_as_the_ledger_was_told(cards: int) -> None:
    placement = [f"cuda:{number}" for number in range(cards)]
    told = flags(plan(*placement, setup=ON_CARDS))
    cost = spec("cuda", Vllm(ON_CARDS)).cost
    footprint = cost.footprint(LoadOptions(max_model_len=2048, n_parallel=4), cards)
    # A block of 16 tokens takes 368,640 bytes: 128 for each of the four, and one of its own.
    assert footprint.device.kv_cache == (4 * 128 + 1) * 368_640
    assert told["--kv-cache-memory-bytes"] == str((4 * 128 + 1) * 368_640 // cards)
    share = float(told["--gpu-memory-utilization"])
    on_each = footprint.device_bytes / cards / gib(24)
    assert on_each <= share < on_each + 0.001


def test_more_than_a_card_has_is_not_asked_for() -> None:
    small = replace(ON_CARDS, card_bytes=gib(1))
    assert flags(plan("cuda:0", setup=small))["--gpu-memory-utilization"] == "1.0"


def test_of_cards_of_unknown_size_no_share_is_told() -> None:
    told = flags(plan("cuda:0"))
    assert "--gpu-memory-utilization" not in told
    assert told["--kv-cache-memory-bytes"] == str((4 * 128 + 1) * 368_640)


def test_a_share_that_is_asked_for_is_passed_on_and_fills_the_card() -> None:
    told = flags(plan("cuda:0", setup=ON_CARDS, gpu_memory_utilization=0.45))
    assert told["--gpu-memory-utilization"] == "0.45"
    assert "--kv-cache-memory-bytes" not in told


@pytest.mark.parametrize(
    ("cards", "fast_start", "eager"),
    [
        ((), None, True),
        ((), True, True),
        ((), False, False),
        (("cuda:0",), None, False),
        (("cuda:0",), True, True),
        (("cuda:0",), False, False),
    ],
)
def test_a_fast_start_compiles_nothing(
    cards: Placement, fast_start: bool | None, eager: bool
) -> None:
    setup = replace(ON_CARDS, fast_start=fast_start)
    assert ("--enforce-eager" in flags(plan(*cards, setup=setup))) is eager
    cost = Vllm(setup).cost(FACTS, "cuda" if cards else "cpu")
    assert isinstance(cost, VllmCost)
    assert cost.eager is eager


def test_sleep_is_switched_on_where_it_is_wanted_and_a_card_can() -> None:
    sleeps = replace(ON_CARDS, sleeps=True)
    launch = plan("cuda:0", setup=sleeps)
    assert "--enable-sleep-mode" in launch.argv
    assert ("VLLM_SERVER_DEV_MODE", "1") in launch.env
    for other in (plan(setup=sleeps), plan("cuda:0", setup=ON_CARDS)):
        assert "--enable-sleep-mode" not in other.argv
        assert "VLLM_SERVER_DEV_MODE" not in dict(other.env)
    assert Vllm.sleep.levels_on("cuda:1") == (Level.OFFLOADED, Level.DROPPED)
    assert Vllm.sleep.levels_on("cpu") == ()


def test_transformers_is_vllm_with_the_model_code_of_that_library() -> None:
    adapter = Vllm(SETUP, Backend.TRANSFORMERS)
    assert adapter.backend is Backend.TRANSFORMERS
    options = LoadOptions(max_model_len=2048, n_parallel=4)
    launch = adapter.plan(spec(adapter=adapter), options, placement=())
    assert [flag for flag in launch.argv if flag not in plan().argv] == [
        "--model-impl=transformers"
    ]


def test_a_context_nobody_knows_is_left_to_vllm() -> None:
    options = LoadOptions(n_parallel=1)
    launch = ADAPTER.plan(spec(), options, placement=())
    assert "--max-model-len" not in flags(launch)


def test_a_model_with_a_template_calls_tools() -> None:
    assert not any("tool" in flag for flag in plan().argv)
    talking = replace(FACTS, chat_template="{{ messages }}")
    assert plan(facts=talking).argv[-2:] == (
        "--enable-auto-tool-choice",
        "--tool-call-parser=hermes",
    )


# Options.


def test_what_is_asked_of_a_card_means_nothing_without_one() -> None:
    asked = LoadOptions(
        n_ctx=1,
        n_gpu_layers=3,
        n_parallel=2,
        gpu_memory_utilization=0.5,
        max_model_len=9_999,
        tensor_parallel_size=2,
        embeddings=True,
        cache_type_k="q8_0",
    )
    assert ADAPTER.settle(asked, FACTS, "cpu") == LoadOptions(n_parallel=2, max_model_len=9_999)
    for device in ("cuda", "cuda:1"):
        assert ADAPTER.settle(asked, FACTS, device) == LoadOptions(
            n_parallel=2,
            max_model_len=9_999,
            gpu_memory_utilization=0.5,
            tensor_parallel_size=2,
        )
    assert ADAPTER.settle(LoadOptions(), FACTS, "cuda") == LoadOptions()


@pytest.mark.parametrize(
    ("context", "device", "expected"),
    [
        (16_384, "cpu", LoadOptions(n_parallel=8, max_model_len=8192)),
        (2048, "cpu", LoadOptions(n_parallel=8, max_model_len=2048)),
        (None, "cpu", LoadOptions(n_parallel=8, max_model_len=8192)),
        (16_384, "cuda", LoadOptions(n_parallel=16, max_model_len=16_384)),
        (131_072, "cuda:1", LoadOptions(n_parallel=16, max_model_len=32_768)),
        (None, "cuda", LoadOptions(n_parallel=16, max_model_len=32_768)),
    ],
)
def test_defaults(context: int | None, device: str, expected: LoadOptions) -> None:
    assert ADAPTER.defaults(replace(FACTS, context_length=context), device) == expected


def test_the_cost_is_of_what_the_folder_says() -> None:
    cost = ADAPTER.cost(replace(FACTS, sliding_layers=2, sliding_window=512), "cpu")
    assert cost == VllmCost(
        weights_bytes=269_030_016,
        kv_values=384,
        full_layers=30,
        sliding_layers=2,
        sliding_window=512,
        hidden_size=576,
        intermediate_size=1536,
        vocab_size=49_152,
        context_length=16_384,
        on_cpu=True,
        eager=True,
        batched_tokens=512,
    )
    assert Vllm(ON_CARDS).cost(FACTS, "cuda").card_bytes == gib(24)  # type: ignore[attr-defined]
    untold = ADAPTER.cost(ModelFacts(size_bytes=1), "cpu")
    assert untold.footprint(LoadOptions()).host.weights == 0


@pytest.mark.parametrize(
    ("heads", "cards", "sizes"),
    [
        (32, 0, []),
        (32, 1, [1]),
        (32, 2, [1, 2]),
        (32, 3, [1, 2]),
        (32, 4, [1, 2, 4]),
        (32, 8, [1, 2, 4, 8]),
        (12, 8, [1, 2, 4]),
        (9, 8, [1]),  # SmolLM2-135M: its heads cannot be dealt out
        (None, 4, [1]),
        ((8, 16), 4, [1]),
    ],
)
def test_how_many_cards_a_model_may_share(
    heads: int | tuple[int, ...] | None, cards: int, sizes: list[int]
) -> None:
    assert ADAPTER.shares(replace(FACTS, head_count=heads), cards) == sizes


# Processes that wait for their model.

WAITS = replace(SETUP, waiter="/opt/vllm/bin/python")


def test_one_that_waits_is_told_what_another_is_started_with() -> None:
    for cards in ((), ("cuda:1",)):
        alone, waits = plan(*cards), plan(*cards, setup=WAITS)
        assert waits.argv == ("/opt/vllm/bin/python", str(GATE_FOLDER / "xandrouting_vllm.py"))
        assert (GATE_FOLDER / "xandrouting_vllm.py").is_file()
        told = json.loads(waits.order)
        assert tuple(told["argv"]) == alone.argv
        assert dict(waits.env) | told["env"] == dict(alone.env)
        assert waits.stop_grace_s == alone.stop_grace_s


def test_any_model_may_have_a_spare() -> None:
    spare = Vllm(WAITS).spare()
    assert spare is not None
    for launch in (plan(setup=WAITS), plan("cuda:0", setup=WAITS)):
        assert (launch.argv, launch.env) == (spare.argv, spare.env)


def test_where_none_is_wanted_nobody_waits_for_an_order() -> None:
    assert ADAPTER.spare() is None
    assert ADAPTER.slots is None
    assert ADAPTER.sleeper_bytes is None


# Answers.


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (404, {"detail": "Not Found"}, UnsupportedByEngine),
        (405, {"detail": "Method Not Allowed"}, UnsupportedByEngine),
        (501, {"message": "not supported"}, UnsupportedByEngine),
        (500, {"message": "EngineCore encountered an issue."}, EngineDied),
        (500, {"message": "EngineDeadError"}, EngineDied),
        (503, {"message": "The engine is dead"}, EngineDied),
        (500, {"message": "list index out of range"}, None),
        (400, {"message": "EngineCore is a word of the request"}, None),
        (500, {}, None),
        (500, {"message": None}, None),
    ],
)
def test_what_an_error_answer_means(
    status: int, error: dict[str, str], kind: type[Exception] | None
) -> None:
    found = ADAPTER.explain(status, error, "/v1/embeddings")
    assert type(found) is (kind or type(None))
    if isinstance(found, UnsupportedByEngine):
        assert "/v1/embeddings" in found.message
        assert next(iter(error.values())) in found.message


@pytest.mark.parametrize(("stretches", "refused"), [(False, True), (True, False)])
def test_a_context_beyond_the_model_s_own(stretches: bool, refused: bool) -> None:
    """vLLM would refuse it too, once the engine that runs was ended for it."""
    facts, asked = replace(FACTS, stretches=stretches), LoadOptions(max_model_len=16_385)
    if not refused:
        assert ADAPTER.settle(asked, facts, "cpu").max_model_len == 16_385
        return
    with pytest.raises(InvalidRequest, match="16385 is more than the model's own context of 16384"):
        ADAPTER.settle(asked, facts, "cpu")
