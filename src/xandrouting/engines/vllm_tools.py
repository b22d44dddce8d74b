"""How a model writes its tool calls, so that vLLM can read them."""

from __future__ import annotations

from typing import Final

from xandrouting.engines.base import ModelFacts

USUAL: Final = "hermes"  # `<tool_call>{…}</tool_call>`, as most open models were taught

# What the chat template itself shows, the surest first; names as in `--tool-call-parser`.
_BY_TEMPLATE: Final = (
    ("<function=", "qwen3_coder"),
    ("tool▁calls▁begin", "deepseek_v3"),
    ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("[TOOL_CALLS]", "mistral"),
    ("<tool_call>", USUAL),
    ("<|python_tag|>", "llama3_json"),
    ("Environment: ipython", "llama3_json"),
)
_BY_ARCHITECTURE: Final = (
    ("Llama4", "llama4_pythonic"),
    ("Granite", "granite"),
    ("GptOss", "openai"),
    ("Phi4", "phi4_mini_json"),
    ("InternLM2", "internlm"),
    ("Jamba", "jamba"),
    ("Glm4Moe", "glm45"),
    ("SeedOss", "seed_oss"),
    ("MiniMaxM2", "minimax_m2"),
    ("Mistral", "mistral"),
)


def tool_parser(facts: ModelFacts) -> str:
    """Return the name of vLLM's parser for this model's tool calls."""
    architecture = facts.architecture or ""
    for beginning, parser in _BY_ARCHITECTURE:
        if architecture.startswith(beginning):
            return parser
    for sign, parser in _BY_TEMPLATE:
        if sign in facts.chat_template:
            return parser
    return USUAL
