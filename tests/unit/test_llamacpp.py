"""What llama.cpp is told, and what its words mean."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.scheduling import QWEN
from xandrouting.core.cover import fill
from xandrouting.core.errors import EngineRejected, GatewayError, UnsupportedByEngine
from xandrouting.core.model import EngineSpec, LaunchPlan, LoadOptions, Placement, StartFailure
from xandrouting.engines.base import ModelFacts, Phase, SlotState
from xandrouting.engines.llamacpp import (
    KEY_VARIABLE,
    READY_LINE,
    REST_ORDER,
    WAITING_LINE,
    LlamaCpp,
    Order,
)

ADAPTER = LlamaCpp()
SLOTS = ADAPTER.slots
FACTS = ModelFacts(size_bytes=100, context_length=32_768, layers=24)
SMALL = replace(FACTS, context_length=2048)
UNTOLD = ModelFacts(size_bytes=100)
OPTIONS = LoadOptions(n_ctx=4096, n_gpu_layers=0, n_parallel=2)


def defaults(**options: int) -> LoadOptions:
    caches = {"cache_type_k": "f16", "cache_type_v": "f16"}
    return LoadOptions(n_ctx=4096, embeddings=False, **options, **caches)


def on(device: str, spec: EngineSpec = QWEN) -> EngineSpec:
    return replace(spec, key=replace(spec.key, device=device))


def plan(spec: EngineSpec = QWEN, options: LoadOptions = OPTIONS) -> LaunchPlan:
    placement = () if spec.key.device == "cpu" else (spec.key.device,)
    return ADAPTER.plan(spec, options, placement=placement)


def order(spec: EngineSpec = QWEN, options: LoadOptions = OPTIONS) -> Order:
    return Order.parse(plan(spec, options).order.encode())


# Options.


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cpu", defaults(n_gpu_layers=0, n_parallel=2)),
        ("cuda", defaults(n_gpu_layers=-1, n_parallel=4)),
        ("cuda:1", defaults(n_gpu_layers=-1, n_parallel=4)),
    ],
)
def test_defaults(device: str, expected: LoadOptions) -> None:
    assert ADAPTER.defaults(FACTS, device) == expected


def test_the_default_context_is_no_larger_than_the_model_s() -> None:
    assert ADAPTER.defaults(SMALL, "cpu").n_ctx == 2048
    assert ADAPTER.defaults(UNTOLD, "cpu").n_ctx == 4096


def test_a_model_made_for_vectors_gives_them_by_default() -> None:
    assert ADAPTER.defaults(replace(FACTS, pooling=True), "cpu").embeddings is True


@pytest.mark.parametrize(("facts", "n_ctx"), [(FACTS, 32_768), (SMALL, 2048), (UNTOLD, 4096)])
def test_context_0_is_the_model_s_own(facts: ModelFacts, n_ctx: int) -> None:
    assert ADAPTER.settle(LoadOptions(n_ctx=0), facts, "cpu").n_ctx == n_ctx


def test_more_than_can_be_used_is_cut() -> None:
    wants = LoadOptions(n_ctx=9000, n_parallel=1000)
    assert ADAPTER.settle(wants, SMALL, "cpu") == LoadOptions(n_ctx=2048, n_parallel=256)
    assert ADAPTER.settle(wants, FACTS, "cpu").n_ctx == 9000
    assert ADAPTER.settle(wants, UNTOLD, "cpu").n_ctx == 9000


@pytest.mark.parametrize("asked", [-1, 0, 7])
def test_layers_on_a_machine_without_a_card_are_none(asked: int) -> None:
    wants = LoadOptions(n_gpu_layers=asked)
    assert ADAPTER.settle(wants, FACTS, "cpu").n_gpu_layers == 0
    assert ADAPTER.settle(wants, FACTS, "cuda").n_gpu_layers == asked


def test_what_nobody_asked_stays_unasked() -> None:
    assert ADAPTER.settle(LoadOptions(), FACTS, "cpu") == LoadOptions()


def test_cache_types_are_kept() -> None:
    wants = LoadOptions(cache_type_k="q8_0", cache_type_v="bf16")
    assert ADAPTER.settle(wants, FACTS, "cpu") == wants


@pytest.mark.parametrize(("device", "layers"), [("cpu", 0), ("cuda", 25), ("cuda:1", 25)])
def test_the_cost_is_of_the_device(device: str, layers: int) -> None:
    cost = ADAPTER.cost(FACTS, device)
    assert cost.layers == layers  # the output counts as one
    whole = cost.footprint(fill(LoadOptions(), ADAPTER.defaults(FACTS, device)))
    assert (whole.device.weights > 0) == (device != "cpu")


def test_vllm_s_options_mean_nothing_here() -> None:
    wants = LoadOptions(n_ctx=1, max_model_len=9, gpu_memory_utilization=0.5, embeddings=True)
    assert ADAPTER.settle(wants, FACTS, "cuda") == LoadOptions(n_ctx=1, embeddings=True)


# The plan.


def test_the_runner_is_this_python_s() -> None:
    launch = plan()
    assert launch.argv == (sys.executable, "-m", "xandrouting.engines.llamacpp_server")
    assert (launch.ready_line, launch.health_path) == (READY_LINE, "/health")
    assert (launch.waiting_line, launch.rest_order) == (WAITING_LINE, REST_ORDER)
    told = order()
    assert (told.model, told.alias, told.port) == (QWEN.source, QWEN.key.model, "{port}")


def test_an_order_is_one_line_and_is_read_as_it_was_written() -> None:
    odd = replace(QWEN, source="/models/two\nlines \u00fc '\".gguf", mmproj="/models/\udcff.gguf")
    line = plan(odd).order
    assert line.isascii()
    assert "\n" not in line
    told = Order.parse(line.encode())
    assert (told.model, told.mmproj) == (odd.source, odd.mmproj)
    assert told.line() == line


def test_the_context_is_for_each_request() -> None:
    # llama.cpp divides what it is given by the slots.
    told = order(options=LoadOptions(n_ctx=1000, n_parallel=3, n_gpu_layers=5))
    assert (told.n_ctx_total, told.n_parallel, told.n_gpu_layers) == (3000, 3, 5)


def test_a_context_of_one_token_is_more_than_llama_cpp_takes() -> None:
    assert order(options=LoadOptions(n_ctx=1, n_parallel=1)).n_ctx_total == 2


@pytest.mark.parametrize("layers", [-1, 0, 7])
def test_all_layers_and_none_are_told(layers: int) -> None:
    assert order(options=replace(OPTIONS, n_gpu_layers=layers)).n_gpu_layers == layers


def test_the_key_is_the_launcher_s_and_in_the_environment_alone() -> None:
    launch = plan()
    assert dict(launch.env)[KEY_VARIABLE] == "{key}"
    assert "{key}" not in " ".join((*launch.argv, launch.order))
    assert launch.api_key == ""


def test_any_model_s_engine_may_have_been_a_spare() -> None:
    spare = ADAPTER.spare()
    assert spare is not None
    for spec in (QWEN, on("cuda:0"), replace(QWEN, source="/models/other.gguf")):
        launch = plan(spec, replace(OPTIONS, n_gpu_layers=-1, embeddings=True))
        assert (launch.argv, launch.env) == (spare.argv, spare.env)
        assert launch.order != spare.order != ""


@pytest.mark.parametrize(
    ("placement", "visible"),
    [((), ""), (("cuda:0",), "0"), (("cuda:3",), "3"), (("cuda:0", "cuda:1"), "0,1")],
)
def test_the_engine_sees_the_cards_it_was_given(placement: Placement, visible: str) -> None:
    options = replace(OPTIONS, n_gpu_layers=-1)
    launch = ADAPTER.plan(on("cuda"), options, placement=placement)
    told = Order.parse(launch.order.encode())
    assert told.env == {"CUDA_VISIBLE_DEVICES": visible}
    assert told.warmup is bool(placement)
    env = dict(launch.env)
    assert env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert env["OMP_WAIT_POLICY"] == "passive"


def test_an_engine_without_layers_on_a_card_does_not_see_it() -> None:
    # It would take memory there for nothing.
    launch = ADAPTER.plan(on("cuda"), OPTIONS, placement=("cuda:0",))
    told = Order.parse(launch.order.encode())
    assert (told.env, told.warmup) == ({"CUDA_VISIBLE_DEVICES": ""}, False)


def test_cache_types_are_told() -> None:
    assert (order().cache_type_k, order().cache_type_v) == ("f16", "f16")
    told = order(options=replace(OPTIONS, cache_type_k="q8_0", cache_type_v="q4_0"))
    assert (told.cache_type_k, told.cache_type_v) == ("q8_0", "q4_0")


def test_vectors_are_pooled_as_the_model_says_or_by_their_mean() -> None:
    made_for_it = replace(QWEN, defaults=LoadOptions(embeddings=True))
    wanted = replace(OPTIONS, embeddings=True)
    assert order().embeddings is None
    assert order(QWEN, wanted).embeddings == "mean"
    assert order(made_for_it, wanted).embeddings == "model"


def test_a_projector_is_told() -> None:
    assert order().mmproj is None
    assert order(replace(QWEN, mmproj="/models/eyes.gguf")).mmproj == "/models/eyes.gguf"


def test_where_conversations_may_be_saved_is_told() -> None:
    assert order().slot_folder == ""
    launch = ADAPTER.plan(QWEN, OPTIONS, placement=(), slot_folder="/data/parked/")
    assert Order.parse(launch.order.encode()).slot_folder == "/data/parked/"


# The slots.


def test_slots_are_read_by_all_that_they_hold() -> None:
    answer = b"""[{"id": 0, "is_processing": false}, {"id": 1, "is_processing": true,
        "n_prompt_tokens": 70}]"""
    assert SLOTS.states(answer) == [
        SlotState(0, tokens=0, busy=False),
        SlotState(1, tokens=70, busy=True),
    ]


def test_a_slot_is_saved_and_restored_by_file_name() -> None:
    assert SLOTS.save(3, "a.slot") == (b"/slots/3?action=save", b'{"filename": "a.slot"}')
    assert SLOTS.restore(0, "a.slot") == (b"/slots/0?action=restore", b'{"filename": "a.slot"}')
    assert SLOTS.saved_bytes(b'{"n_written": 9, "n_saved": 2}') == 9
    assert SLOTS.restored_tokens(b'{"n_restored": 2, "n_read": 9}') == 2


# Why a start failed: lines that xllamacpp 2026.10 printed.

AFTERWARDS = (
    "0.00.006.443 E llama_model_load_from_file_impl: failed to load model",
    "0.00.006.468 E cmn  common_init_: failed to load model 'm.gguf'",
    "0.00.006.481 E srv    load_model: failed to load model, 'm.gguf'",
    "0.00.007.685 E srv          init: exiting due to model loading error",
    "load failed: Failed to init server, please check the input params.",
)
LOADER = (
    "llama_model_load: error loading model: llama_model_loader: failed to load model from m.gguf"
)
KNOWN = {
    "missing": (
        StartFailure.BAD_FILE,
        (
            (
                "0.00 E gguf_init_from_file: failed to open GGUF file 'm.gguf' (No such file or "
                "directory)"
            ),
            f"0.00 E {LOADER}",
        ),
    ),
    "a header cut short": (
        StartFailure.BAD_FILE,
        ("0.00 E gguf_init_from_reader: failed to read key-value pairs", f"0.00 E {LOADER}"),
    ),
    "data cut short": (
        StartFailure.BAD_FILE,
        (
            (
                "0.00 E llama_model_load: error loading model: tensor 'token_embd.weight' data is "
                "not within the file bounds, model is corrupted or incomplete"
            ),
        ),
    ),
    "another format": (
        StartFailure.BAD_FILE,
        (
            "0.00 E gguf_init_from_reader: invalid magic characters: '}X??', expected 'GGUF'",
            f"0.00 E {LOADER}",
        ),
    ),
    "an architecture of tomorrow": (
        StartFailure.UNKNOWN_ARCHITECTURE,
        ("0.00 E llama_model_load: error loading model: unknown model architecture: 'nonsense'",),
    ),
    "too much context": (
        StartFailure.OUT_OF_MEMORY,
        (
            "0.00 W llama_context: n_ctx_seq (2000128) > n_ctx_train (8192)",
            "0.33 E ggml_aligned_malloc: insufficient memory (attempted to allocate 43948.12 MB)",
            "0.33 E ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 1",
            (
                "0.33 E ggml_backend_buft_alloc_buffer_n_default: failed to allocate CPU buffer of "
                "size 46082949120"
            ),
            (
                "0.35 E llama_init_from_model: failed to initialize the context: failed to "
                "allocate buffer for kv cache"
            ),
        ),
    ),
    "a card that is full": (
        StartFailure.OUT_OF_MEMORY,
        ("0.33 E ggml_backend_cuda_buffer_type_alloc_buffer: cudaMalloc failed: out of memory",),
    ),
    "a port that is taken": (
        StartFailure.PORT_IN_USE,
        (
            "0.00 E srv start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 18182",
            "0.00 E srv init: exiting due to HTTP server error",
        ),
    ),
    "no xllamacpp": (
        StartFailure.MISSING_LIBRARY,
        ("Traceback (most recent call last):", "ModuleNotFoundError: No module named 'xllamacpp'"),
    ),
    "no libgomp": (
        StartFailure.MISSING_LIBRARY,
        ("ImportError: libgomp.so.1: cannot open shared object file: No such file or directory",),
    ),
}


@pytest.mark.parametrize("case", KNOWN)
def test_the_engine_s_words_are_understood(case: str) -> None:
    failure, lines = KNOWN[case]
    chatter = [f"0.00.001 I llama: line {number}" for number in range(50)]
    assert ADAPTER.classify([*chatter, *lines, *AFTERWARDS], 1) is failure
    assert ADAPTER.classify(lines, -9) is failure  # words say more than a signal


@pytest.mark.parametrize(
    "line",
    [
        "0.00 E gguf_init_from_reader: failed to read magic",
        (
            "0.00 E llama_model_load: error loading model: error loading model hyperparameters: "
            "key not found in model: llama.attention.layer_norm_rms_epsilon"
        ),
    ],
    ids=["empty", "without its figures"],
)
def test_these_words_are_understood_too(line: str) -> None:
    assert ADAPTER.classify([line, *AFTERWARDS], 1) is StartFailure.BAD_FILE


@pytest.mark.parametrize(
    ("status", "failure"),
    [
        (-9, StartFailure.KILLED),
        (-15, StartFailure.KILLED),
        (-6, StartFailure.EXITED),  # its own doing
        (1, StartFailure.EXITED),
        (0, StartFailure.EXITED),
        (None, StartFailure.EXITED),
    ],
)
def test_without_words_the_status_tells(status: int | None, failure: StartFailure) -> None:
    assert ADAPTER.classify([], status) is failure
    assert ADAPTER.classify(["loading tensors", "ready soon"], status) is failure


WAITED = ("", WAITING_LINE, "")


def test_words_of_an_earlier_model_say_nothing_of_this_one() -> None:
    earlier = ("0.1 I srv load_model: loading model", "0.2 I threadpool init", *AFTERWARDS)
    failed = ("0.3 E gguf_init_from_reader: failed to read magic",)
    assert ADAPTER.classify([*failed, *WAITED, "loading model"], 1) is StartFailure.EXITED
    assert ADAPTER.classify([*WAITED, *earlier, *WAITED, *failed], 1) is StartFailure.BAD_FILE
    assert ADAPTER.phase([*WAITED, *earlier]) is Phase.WARMING
    assert ADAPTER.phase([*WAITED, *earlier, *WAITED]) is Phase.STARTING
    assert ADAPTER.phase([*WAITED, *earlier, *WAITED, earlier[0]]) is Phase.READING


# What an error answer means.


def explained(status: int, **error: Any) -> GatewayError | None:
    return ADAPTER.explain(status, error, "/v1/rerank")


@pytest.mark.parametrize("status", [404, 501])
def test_what_is_not_served_is_said_so(status: int) -> None:
    error = explained(status, message="This server does not support reranking.", code=status)
    assert isinstance(error, UnsupportedByEngine)
    assert "/v1/rerank" in error.message
    assert "does not support reranking" in error.message


@pytest.mark.parametrize(
    "message",
    [
        "Failed to parse messages: missing role",
        "image input is not supported - hint: you may need to provide the mmproj",
        "Invalid grammar",
        "Logprobs is not supported by this server",
    ],
)
def test_the_request_s_fault_is_no_server_error(message: str) -> None:
    error = explained(500, message=message, code=500)
    assert isinstance(error, EngineRejected)
    assert (error.status, error.message) == (400, message)
    assert error.error["message"] == message
    assert error.error["code"] is None


@pytest.mark.parametrize(
    ("status", "message"),
    [(500, "slot is broken"), (500, ""), (503, "Loading model"), (400, "Invalid x"), (401, "key")],
)
def test_other_answers_mean_what_their_status_says(status: int, message: str) -> None:
    assert explained(status, message=message) is None
    assert ADAPTER.explain(status, {}, "/v1/rerank") is None
