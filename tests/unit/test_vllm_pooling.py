"""Models that make vectors or scores: vLLM reads their texts in one piece."""

from __future__ import annotations

from dataclasses import replace

import pytest

from xandrouting.core.cover import fill
from xandrouting.core.model import Backend, EngineSpec, LoadOptions, ModelKey
from xandrouting.engines.base import ModelFacts
from xandrouting.engines.vllm import BATCHED_CPU, LONGEST_CPU, POOLING, Vllm, VllmSetup

ADAPTER = Vllm(VllmSetup("vllm", waiter=None, cache_folder="/data/vllm", drain_s=1.0))
BERT = ModelFacts(
    1 << 20,
    context_length=8192,
    layers=12,
    pooling=True,
    architecture="BertModel",
    embedding_length=768,
    feed_forward=3072,
    vocab_size=30_000,
    kv_values=1536,
    full_layers=12,
)


def argv(facts: ModelFacts, device: str = "cpu", **wants: int) -> tuple[str, ...]:
    """Return the command line of an engine that is asked for so."""
    settled = ADAPTER.settle(LoadOptions(**wants), facts, device)
    spec = EngineSpec(
        ModelKey("/models/m", Backend.VLLM, device),
        "/srv/models/m",
        cost=ADAPTER.cost(facts, device),
        flags=ADAPTER.flags(facts),
    )
    options = fill(settled, ADAPTER.defaults(facts, device))
    placement = () if device == "cpu" else (device,)
    return ADAPTER.plan(spec, options, placement=placement).argv


def test_a_batch_holds_the_longest_text() -> None:
    assert {POOLING, "--max-model-len=8192", "--max-num-batched-tokens=8192"} <= {*argv(BERT)}
    assert "--max-num-batched-tokens=4096" in argv(BERT, max_model_len=4096)
    assert f"--max-num-batched-tokens={BATCHED_CPU}" in argv(BERT, max_model_len=512)


def test_it_is_reckoned_with() -> None:
    cost = ADAPTER.cost(BERT, "cpu")
    compute = [
        cost.footprint(LoadOptions(max_model_len=length, n_parallel=1)).host.compute
        for length in (256, 512, 8192)
    ]
    assert compute[0] == compute[1]
    per_token = (4 * 768 + 3 * 3072) * 2
    assert compute[2] - compute[1] == (8192 - 512) * per_token


def test_a_long_one_is_not_taken_for_granted_on_a_card() -> None:
    long = replace(BERT, context_length=131_072)
    assert f"--max-model-len={LONGEST_CPU}" in argv(long, "cuda:0")
    assert "--max-num-batched-tokens=131072" in argv(long, "cuda:0", max_model_len=131_072)


@pytest.mark.parametrize(
    ("architecture", "says", "pools"),
    [
        ("BertModel", False, True),
        ("XLMRobertaForSequenceClassification", False, True),
        ("ModernBertForMaskedLM", False, True),
        ("Qwen3ForSequenceClassification", False, True),
        ("Qwen3ForCausalLM", True, True),  # its repository says how to pool
        ("Qwen3ForCausalLM", False, False),
        ("InternVLChatModel", False, False),
        (None, False, False),
    ],
)
def test_which_they_are(architecture: str | None, says: bool, pools: bool) -> None:
    facts = replace(BERT, architecture=architecture, pooling=says, chat_template="x")
    assert (POOLING in ADAPTER.flags(facts)) == pools
    assert ("--enable-auto-tool-choice" in ADAPTER.flags(facts)) == (not pools)
