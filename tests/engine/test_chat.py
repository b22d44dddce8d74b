"""Chat with a real model: every way to name it, every shape of message, the engine's bytes."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import httpx2
import pytest

from tests.server import (
    MODEL,
    STARTER,
    Server,
    chat_body,
    deltas,
    error_of,
    ok,
    starter,
    text_of,
)
from xandrouting.engines.llamacpp import KEY_VARIABLE, RUNNER, Order
from xandrouting.launch.ports import reserve_port

SPELLINGS = [
    MODEL,
    "/models/smollm2-135m-instruct",
    "/models/smollm2-135m-instruct/",
    STARTER,
    "smollm2-135m-instruct",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "SmolLM2-135M-Instruct.Q4_1",
    "SmolLM2-135M-Instruct",
    "smollm2-135m-instruct.q4_1",
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_names_the_same_engine(server: Server, spelling: str) -> None:
    server.load()
    loads = server.stats()["loads"]
    for named in ({}, {"backend": "llamacpp"}):
        answer = server.chat(model=spelling, max_tokens=1, **named)
        assert ok(answer)["model"] == MODEL
        assert answer.headers["x-xandrouting-load"] == "hit"
    with server.stream(model=spelling, max_tokens=1, backend="auto") as stream:
        *events, done = stream.rest()
    assert done == "[DONE]"
    assert {json.loads(event)["model"] for event in events} == {MODEL}
    assert server.stats()["loads"] == loads


def test_plain_answer_is_openais(server: Server) -> None:
    answer = server.chat("Name a colour.", max_tokens=8)
    body = ok(answer)
    assert answer.headers["content-type"].startswith("application/json")
    assert body["object"] == "chat.completion"
    [choice] = body["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert choice["finish_reason"] in ("stop", "length")
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_stream_is_openais(server: Server) -> None:
    with server.stream("Name a colour.", stream_options={"include_usage": True}) as stream:
        headers = stream.response.headers
        *events, done = stream.rest()
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"
    assert "content-length" not in headers
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert deltas(events)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk.get("usage")]


def test_stream_says_what_the_plain_answer_says(server: Server) -> None:
    same: dict[str, Any] = {"max_tokens": 16, "cache_prompt": False}
    plain = text_of(server.chat("What is the sea?", **same))
    with server.stream("What is the sea?", **same) as stream:
        assert deltas(stream.rest()) == plain


def test_answer_is_the_engines_own(server: Server) -> None:
    """What llama.cpp says beyond OpenAI's fields is there as well, in its order."""
    server.load()
    engine = server.engine(MODEL)
    body = chat_body("Name a city.", max_tokens=12, cache_prompt=False, timings_per_token=True)
    direct = ok(
        httpx2.post(
            f"{engine.url}/v1/chat/completions",
            json=body,
            headers=engine.headers,
            trust_env=False,
            timeout=60,
        )
    )
    through = ok(server.post("/v1/chat/completions", body))
    assert list(through) == list(direct)
    assert "timings" in through
    for fresh in ("id", "created", "timings"):
        del direct[fresh], through[fresh]
    assert through == direct


def test_headers_tell_of_the_request(server: Server) -> None:
    server.load()
    answer = server.post("/v1/chat/completions", chat_body(), headers={"x-request-id": "client-17"})
    assert answer.headers["x-request-id"] == "client-17"
    label, _, incarnation = answer.headers["x-xandrouting-engine"].partition("#")
    assert label == "llamacpp/cpu"
    assert int(incarnation) >= 1
    assert answer.headers["x-xandrouting-queue"] == "dur=0.000"
    other = server.chat()
    assert other.headers["x-request-id"] not in ("", server.chat().headers["x-request-id"])


def test_cold_request_says_what_the_load_took(server: Server, spare: str) -> None:
    cold = server.chat(model=spare, max_tokens=2)
    word, _, took = cold.headers["x-xandrouting-load"].partition(";dur=")
    assert word == "cold"
    [item] = [item for item in server.loaded() if item["path"] == spare]
    assert float(took) == pytest.approx(item["load_seconds"], abs=0.2)
    assert server.chat(model=spare, max_tokens=2).headers["x-xandrouting-load"] == "hit"


# Fields the gateway does not know go to the engine as they are.


def test_unknown_fields_reach_the_engine(server: Server) -> None:
    grammar = 'root ::= "forty-" ("two" | "three")'
    assert text_of(server.chat("Any number?", grammar=grammar)) in ("forty-two", "forty-three")


def test_routing_fields_may_be_null(server: Server) -> None:
    nothing = dict.fromkeys(("backend", "device", "n_ctx", "n_gpu_layers", "ttl", "stop", "stream"))
    assert ok(server.chat(**nothing))["model"] == MODEL


def test_tools_reach_the_engine(server: Server) -> None:
    """This model has no template for tools, so what shows is what llama.cpp makes of them."""
    function = {
        "name": "get_weather",
        "description": "Tell the weather in a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    }
    tool = {"type": "function", "function": function}
    assert text_of(server.chat("Weather in Rome?", tools=[tool], tool_choice="auto"))
    broken = server.chat("Weather in Rome?", tools=[{"type": "function"}])
    error = error_of(broken, 400, "engine_rejected")
    assert "Missing tool function" in error["message"]
    assert error["type"] == "invalid_request_error"


def test_tool_results_are_taken(server: Server) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"town": "Rome"}'},
    }
    messages = [
        {"role": "user", "content": "Weather in Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny, 25 degrees."},
    ]
    assert ok(server.chat(messages=messages))["choices"]


def test_schema_is_kept(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
            "pet": {"enum": ["cat", "dog"]},
        },
        "required": ["name", "age", "pet"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    answer = json.loads(text_of(server.chat("A person.", response_format=wanted, max_tokens=80)))
    assert set(answer) == {"name", "age", "pet"}
    assert isinstance(answer["name"], str)
    assert 0 <= answer["age"] <= 99
    assert answer["pet"] in ("cat", "dog")


def test_logprobs_are_told(server: Server) -> None:
    body = ok(server.chat(logprobs=True, top_logprobs=3, max_tokens=4))
    tokens = body["choices"][0]["logprobs"]["content"]
    assert 1 <= len(tokens) <= 4
    for token in tokens:
        assert token["logprob"] <= 0
        best = [other["logprob"] for other in token["top_logprobs"]]
        assert len(best) == 3
        assert best == sorted(best, reverse=True)


# Shapes of messages.


def test_content_parts_are_the_same_text(server: Server) -> None:
    parts = [{"type": "text", "text": "Name a "}, {"type": "text", "text": "colour."}]
    same: dict[str, Any] = {"max_tokens": 1}
    plain = ok(server.chat("Say hello to me.", **same))["usage"]["prompt_tokens"]
    one = [{"role": "user", "content": [{"type": "text", "text": "Say hello to me."}]}]
    assert ok(server.chat(messages=one, **same))["usage"]["prompt_tokens"] == plain
    assert text_of(server.chat(messages=[{"role": "user", "content": parts}]))


@pytest.mark.parametrize(
    "turns",
    [
        [("system", "Be brief."), ("user", "Hi")],
        [("user", "Hi"), ("assistant", ""), ("user", "Are you there?")],
        [("user", "My name is Bo."), ("user", "What is my name?")],
        [("user", "Hi"), ("assistant", "Hello!")],
        [("user", "")],
        [("user", "Grüße, 世界 🌍 \u2028 \\ \" ' </s>")],
    ],
    ids=["system", "empty-assistant", "two-users", "assistant-last", "empty-user", "unicode"],
)
def test_conversations_of_every_shape(server: Server, turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    assert ok(server.chat(messages=messages))["choices"][0]["message"]["role"] == "assistant"


def test_models_own_template_is_used(server: Server) -> None:
    """The prompt is as long as the template of the model's file makes it."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    prompt = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    request = {"model": MODEL, "content": prompt, "parse_special": True}
    tokens = ok(server.post("/tokenize", request))["tokens"]
    assert ok(server.chat(messages=messages))["usage"]["prompt_tokens"] == len(tokens)


def test_image_for_a_model_without_eyes_is_the_clients_fault(server: Server) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    answer = server.chat(messages=[{"role": "user", "content": [image]}])
    error_of(answer, 400, "engine_rejected")


def test_ready_line_is_written_whole_and_as_a_line_of_its_own() -> None:
    """llama.cpp's threads write their lines in pieces to the same pipe: none may come between."""
    order = Order(str(starter()), MODEL, 256, 1, 0, port=str(reserve_port()))
    env = os.environ | {KEY_VARIABLE: "key"}
    with subprocess.Popen(
        RUNNER,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as engine:
        assert engine.stdin is not None
        assert engine.stdout is not None
        waiting = os.read(engine.stdout.fileno(), 4096)
        engine.stdin.write(order.line().encode() + b"\n")
        engine.stdin.flush()
        ready = os.read(engine.stdout.fileno(), 4096)
        engine.terminate()
        assert engine.stdout.read() == b""
    assert waiting == b"\nxandrouting-engine waiting\n"
    assert ready.startswith(b"\nxandrouting-engine ready http://127.0.0.1:")
    assert ready.endswith(b"\n")
