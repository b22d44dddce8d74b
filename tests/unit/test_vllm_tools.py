"""Which parser reads a model's tool calls."""

import pytest

from xandrouting.engines.base import ModelFacts
from xandrouting.engines.vllm_tools import tool_parser

HERMES = "return a json object within <tool_call></tool_call> XML tags"


@pytest.mark.parametrize(
    ("architecture", "template", "parser"),
    [
        ("Qwen2ForCausalLM", HERMES, "hermes"),
        ("Qwen3MoeForCausalLM", f"{HERMES}\n<function=example_function_name>", "qwen3_coder"),
        ("LlamaForCausalLM", "Environment: ipython\n<|python_tag|>", "llama3_json"),
        ("LlamaForCausalLM", "Environment: ipython", "llama3_json"),
        ("LlamaForCausalLM", "{{ messages }}", "hermes"),
        ("Llama4ForConditionalGeneration", "<|python_tag|>", "llama4_pythonic"),
        ("MistralForCausalLM", "", "mistral"),
        ("MixtralForCausalLM", "[AVAILABLE_TOOLS] … [TOOL_CALLS]", "mistral"),
        ("DeepseekV3ForCausalLM", "<\uff5ctool▁calls▁begin\uff5c>", "deepseek_v3"),
        ("DeepseekV3ForCausalLM", "<|tool_calls_section_begin|>", "kimi_k2"),
        ("GptOssForCausalLM", "<|channel|>", "openai"),
        ("GraniteMoeHybridForCausalLM", HERMES, "granite"),
        ("Phi4MMForCausalLM", "", "phi4_mini_json"),
        ("Glm4MoeForCausalLM", HERMES, "glm45"),
        (None, HERMES, "hermes"),
        (None, "", "hermes"),
    ],
)
def test_the_parser(architecture: str | None, template: str, parser: str) -> None:
    facts = ModelFacts(1, architecture=architecture, chat_template=template)
    assert tool_parser(facts) == parser
