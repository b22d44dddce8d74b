"""Chat with a real model in vLLM: OpenAI's answers, the parameters of the guide, tools, schemas.

Answers are near ties, so no test knows a text: runs are compared with each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.server import Server, deltas, error_of, ok, text_of
from tests.vllm.conftest import LOAD_S, SMOL, chat

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(2 * LOAD_S)]

Say = Callable[..., str]

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "pet": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "pet"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tell the weather in a town",
        "strict": True,  # else only that it is called is certain, as the OpenAI API has it
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "enum": ["Rome", "Paris"]}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture
def say(server: Server) -> Say:
    def ask(text: str = "Tell me a story about a fox.", **fields: Any) -> str:
        return text_of(chat(server, text, **{"max_tokens": 16, **fields}))

    return ask


# Answers.


@pytest.mark.parametrize("spelling", [SMOL, "smol", "/models/smol/"])
def test_plain_answer_is_openais(server: Server, spelling: str) -> None:
    answer = chat(server, "Name a colour.", model=spelling, backend="auto")
    body = ok(answer)
    assert (body["object"], body["model"]) == ("chat.completion", SMOL)
    [choice] = body["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert choice["finish_reason"] in ("stop", "length")
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert answer.headers["x-xandrouting-engine"] == "vllm/cpu#1;auto=safetensors"
    assert answer.headers["x-xandrouting-load"] == "hit"


def test_who_names_the_backend_is_told_of_no_choice(server: Server) -> None:
    answer = chat(server, model="smol", backend="vllm", device="cpu", max_tokens=1)
    assert ok(answer)["model"] == SMOL
    assert answer.headers["x-xandrouting-engine"] == "vllm/cpu#1"
    assert answer.headers["x-xandrouting-load"] == "hit"


def test_stream_is_openais(server: Server) -> None:
    usage = {"stream_options": {"include_usage": True}}
    with server.stream("Name a colour.", model=SMOL, **usage) as stream:
        headers = stream.response.headers
        *events, done = stream.rest()
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"
    assert headers["x-xandrouting-engine"] == "vllm/cpu#1"
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert {(chunk["object"], chunk["model"]) for chunk in chunks} == {
        ("chat.completion.chunk", SMOL)
    }
    assert deltas(events)
    [told] = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    assert told["completion_tokens"] <= 8


def test_stream_says_what_the_plain_answer_says(server: Server) -> None:
    plain = text_of(chat(server, "What is the sea?", max_tokens=16))
    with server.stream("What is the sea?", model=SMOL, max_tokens=16) as stream:
        assert deltas(stream.rest()) == plain


def test_stream_comes_in_pieces(server: Server) -> None:
    with server.stream("Tell me a story.", model=SMOL, max_tokens=12) as stream:
        assert len(stream.rest()) >= 12


def test_fields_the_gateway_does_not_know_reach_the_engine(server: Server) -> None:
    answer = chat(server, "Hi", max_tokens=2, ignore_eos=True, return_token_ids=True)
    assert len(ok(answer)["choices"][0]["token_ids"]) == 2


@pytest.mark.parametrize(
    "turns",
    [
        [("system", "Be brief."), ("user", "Hi")],
        [("user", "Hi"), ("assistant", ""), ("user", "Are you there?")],
        [("user", "My name is Bo."), ("user", "What is my name?")],
        [("user", "Grüße, 世界 🌍 \u2028 \\ \" ' </s>")],
    ],
    ids=["system", "empty-assistant", "two-users", "unicode"],
)
def test_conversations_of_every_shape(server: Server, turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    answer = ok(chat(server, messages=messages, max_tokens=2))
    assert answer["choices"][0]["message"]["role"] == "assistant"


# Parameters.


def test_temperature_zero_repeats_itself(say: Say) -> None:
    assert say(temperature=0) == say(temperature=0)


def test_seed_reproduces_and_another_differs(say: Say) -> None:
    hot: dict[str, Any] = {"temperature": 1.5}
    texts = [say(seed=seed, **hot) for seed in (1, 2, 3)]
    assert len(set(texts)) > 1
    assert say(seed=2, **hot) == texts[1]


def test_tiny_top_p_is_greedy(say: Say) -> None:
    assert say(temperature=1.5, top_p=1e-6, seed=5) == say(temperature=0)
    wide = {say(temperature=1.5, top_p=1.0, seed=seed, max_tokens=8) for seed in (5, 6, 7)}
    assert len(wide) > 1


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_penalty_breaks_a_repetition(say: Say, penalty: str) -> None:
    text = "Repeat the word apple many times: apple apple apple apple apple apple apple"
    same: dict[str, Any] = {"temperature": 0, "max_tokens": 32}
    free = say(text, **same)
    held = say(text, **{penalty: 2.0}, **same)
    assert held != free
    assert repetitions(held) <= repetitions(free)
    assert say(text, **{penalty: 0.0}, **same) == free


def repetitions(text: str) -> int:
    """How often a word follows that was there before."""
    words = text.lower().split()
    return len(words) - len(set(words))


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_tokens_are_limited(server: Server, name: str) -> None:
    answer = chat(server, "Tell me a long story.", **{"max_tokens": None, name: 3})
    body = ok(answer)
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("listed", [True, False], ids=["list", "string"])
def test_stop_ends_before_the_word(server: Server, listed: bool) -> None:
    fox = "Tell me a story about a fox."
    whole = text_of(chat(server, fox, max_tokens=16))
    word = whole.split()[4]
    stop = ["@@never@@", word] if listed else word
    answer = chat(server, fox, stop=stop, max_tokens=16)
    assert text_of(answer) == whole[: whole.index(word)]
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    with server.stream(fox, model=SMOL, stop=stop, max_tokens=16) as stream:
        *events, done = stream.rest()
    assert deltas(events) == whole[: whole.index(word)]
    assert done == "[DONE]"


def test_several_answers_to_one_question(server: Server) -> None:
    choices = ok(chat(server, "A number?", n=3, temperature=1.5, seed=4))["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in choices}) > 1


def test_logprobs_are_told(server: Server) -> None:
    body = ok(chat(server, logprobs=True, top_logprobs=3, max_tokens=4))
    tokens = body["choices"][0]["logprobs"]["content"]
    assert 1 <= len(tokens) <= 4
    for token in tokens:
        assert token["logprob"] <= 0
        best = [other["logprob"] for other in token["top_logprobs"]]
        assert len(best) == 3
        assert best == sorted(best, reverse=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.1),
        ("top_p", -0.1),
        ("presence_penalty", 2.5),
        ("max_tokens", 0),
        ("messages", []),
    ],
)
def test_parameter_out_of_its_range(server: Server, field: str, value: object) -> None:
    error = error_of(chat(server, **{field: value}), 400, "invalid_request")
    assert error["param"] == field


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 0},
        {"logit_bias": "x"},
        {"tools": [{"type": "function"}]},
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "nosuch"}}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 7}}},
        {"max_tokens": 100_000},
    ],
    ids=["n", "logit-bias", "tools", "tool-choice", "no-schema", "bad-schema", "max-tokens"],
)
def test_what_vllm_refuses_is_the_clients_fault(server: Server, fields: dict[str, Any]) -> None:
    error_of(chat(server, **fields), 400, "engine_rejected")


# What the grammar enforces.


def test_tools_may_be_used(server: Server) -> None:
    """This model has no template for tools: that they are offered does no harm."""
    body = ok(chat(server, "Weather in Rome?", tools=[WEATHER], tool_choice="auto"))
    message = body["choices"][0]["message"]
    assert message["content"] or message["tool_calls"]


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_tool_is_called_with_arguments_of_its_schema(server: Server, choice: object) -> None:
    asked: dict[str, Any] = {"tools": [WEATHER], "tool_choice": choice, "max_tokens": 120}
    [choice] = ok(chat(server, "Weather in Rome?", **asked))["choices"]
    check_call(choice["message"]["tool_calls"])


def test_tool_is_called_in_a_stream(server: Server) -> None:
    asked: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 120}
    with server.stream("Weather in Rome?", model=SMOL, **asked) as stream:
        *events, done = stream.rest()
    assert done == "[DONE]"
    pieces = [
        piece
        for event in events
        for choice in json.loads(event)["choices"]
        for piece in choice["delta"].get("tool_calls") or []
    ]
    calls: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        call = calls.setdefault(piece["index"], {"function": {"name": "", "arguments": ""}})
        for name, text in piece["function"].items():
            call["function"][name] += text or ""
    check_call(list(calls.values()))


def check_call(calls: list[dict[str, Any]]) -> None:
    assert calls
    for call in calls:
        assert call["function"]["name"] == "get_weather"
        arguments = json.loads(call["function"]["arguments"])
        assert arguments.keys() == {"town"}
        assert arguments["town"] in ("Rome", "Paris")


def test_tool_results_are_taken(server: Server) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"town": "Rome"}'},
    }
    messages = [
        {"role": "user", "content": "Weather in Rome?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny, 25 degrees."},
    ]
    assert ok(chat(server, messages=messages, tools=[WEATHER]))["choices"]


def test_schema_is_kept(server: Server) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    text = text_of(chat(server, "A person.", response_format=wanted, max_tokens=100))
    answer = json.loads(text)
    assert answer.keys() == {"name", "age", "pet"}
    assert len(answer["name"]) <= 12
    assert 0 <= answer["age"] <= 99
    assert answer["pet"] in ("cat", "dog")


# The context.


def test_prompt_longer_than_the_context_is_the_clients_fault(server: Server) -> None:
    long = "word " * 9000
    error = error_of(chat(server, long), 400, "engine_rejected")
    assert "maximum context length is 8192 tokens" in error["message"]
    with server.stream(long, model=SMOL) as stream:
        stream.response.read()
        error_of(stream.response, 400, "engine_rejected")  # before the headers of a stream as well
    assert ok(chat(server))
