"""The other calls on vLLM, and the client libraries of OpenAI and Anthropic."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import anthropic
import openai
import pytest

from tests.server import Server, error_of, ok
from tests.vllm.conftest import LOAD_S, SMOL

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(2 * LOAD_S)]

COLOUR: Any = [{"role": "user", "content": "Name a colour."}]


def ask(server: Server, path: str, **fields: Any) -> Any:
    return ok(server.post(path, {"model": "smol", **fields}))


# Calls.


def test_completions(server: Server) -> None:
    body = ask(server, "/v1/completions", prompt="Once upon a", max_tokens=4, temperature=0)
    assert (body["object"], body["model"]) == ("text_completion", SMOL)
    assert body["choices"][0]["text"]
    assert body["usage"]["completion_tokens"] == 4


def test_completions_as_a_stream(server: Server) -> None:
    body = {"model": "smol", "prompt": "Once upon a", "max_tokens": 4, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert {chunk["model"] for chunk in chunks} == {SMOL}
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks)


@pytest.mark.parametrize("text", ["Hello wörld", " 世界 🌍\n\ttabs"])
def test_tokens_there_and_back(server: Server, text: str) -> None:
    tokens = ask(server, "/tokenize", prompt=text)["tokens"]
    assert ask(server, "/detokenize", tokens=tokens)["prompt"] == text


def test_responses(server: Server) -> None:
    body = ask(server, "/v1/responses", input="Say hello.", max_output_tokens=8, temperature=0)
    assert (body["object"], body["model"]) == ("response", SMOL)
    assert body["output"][0]["content"][0]["text"]


def test_responses_as_a_stream(server: Server) -> None:
    body = {"model": "smol", "input": "Say hello.", "max_output_tokens": 4, "stream": True}
    with server.client.stream("POST", "/v1/responses", json=body) as response:
        kinds = [line for line in response.iter_lines() if line.startswith("event: ")]
    assert kinds[0] == "event: response.created"
    assert kinds[-1] in ("event: response.completed", "event: response.incomplete")


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {}),
        ("/v1/messages", {"max_tokens": 2}),
        ("/v1/responses", {}),
        ("/tokenize", {}),
        ("/detokenize", {"tokens": ["x"]}),
    ],
)
def test_what_is_missing_or_wrong_is_the_clients_fault(
    server: Server, path: str, fields: dict[str, Any]
) -> None:
    error_of(server.post(path, {"model": "smol", **fields}), 400, "engine_rejected")


@pytest.mark.parametrize(
    ("path", "fields"),
    [("/v1/embeddings", {"input": "a"}), ("/v1/rerank", {"query": "a", "documents": ["b"]})],
)
def test_a_chat_model_gives_no_vectors(server: Server, path: str, fields: dict[str, Any]) -> None:
    loads = server.stats()["loads"]
    error = error_of(server.post(path, {"model": "smol", **fields}), 400, "unsupported_by_engine")
    assert "vLLM" in error["message"]
    assert path in error["message"]
    assert server.stats()["loads"] == loads


# Client libraries.


@pytest.fixture
def gpt(server: Server) -> Iterator[openai.OpenAI]:
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=http
    ) as client:
        yield client


def test_openai_chat(gpt: openai.OpenAI) -> None:
    answer = gpt.chat.completions.create(
        model="smol",
        messages=COLOUR,
        max_tokens=8,
        temperature=0,
        extra_body={
            "backend": "vllm",
            "device": "cpu",
            "gpu_memory_utilization": 0.9,
            "max_model_len": 2048,
            "ttl": 0,
        },
    )
    assert answer.model == SMOL
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 8


def test_openai_stream(gpt: openai.OpenAI) -> None:
    chunks = list(
        gpt.chat.completions.create(
            model="smol",
            messages=COLOUR,
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert chunks[-1].usage is not None


def test_openai_responses(gpt: openai.OpenAI) -> None:
    answer = gpt.responses.create(
        model="smol", input="Say hello.", max_output_tokens=8, temperature=0
    )
    assert answer.output_text


def test_openai_models(gpt: openai.OpenAI) -> None:
    assert SMOL in [model.id for model in gpt.models.list()]
    for spelling in (SMOL, "smol"):
        assert gpt.models.retrieve(spelling).id == SMOL


def test_openai_errors(gpt: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        gpt.chat.completions.create(model="smol", messages=COLOUR, max_tokens=100_000)
    assert wrong.value.code == "engine_rejected"
    with pytest.raises(openai.BadRequestError) as none:
        gpt.embeddings.create(model="smol", input="a")
    assert none.value.code == "unsupported_by_engine"


@pytest.fixture
def claude(server: Server) -> Iterator[anthropic.Anthropic]:
    http = anthropic.DefaultHttpxClient(trust_env=False)
    with anthropic.Anthropic(
        base_url=server.url, api_key="none", max_retries=0, http_client=http
    ) as client:
        yield client


def test_anthropic_messages(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(
        model="smol", max_tokens=8, extra_body={"temperature": 0}, messages=COLOUR
    )
    assert answer.model == SMOL
    [block] = answer.content
    assert block.type == "text"
    assert block.text
    assert answer.usage.output_tokens <= 8


def test_anthropic_stream(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(
        model="smol", max_tokens=8, extra_body={"temperature": 0}, messages=COLOUR
    ) as stream:
        pieces = list(stream.text_stream)
        assert "".join(pieces) == stream.get_final_text()
    assert "".join(pieces)


def test_anthropic_counts_tokens(claude: anthropic.Anthropic) -> None:
    counts = [
        claude.messages.count_tokens(
            model="smol", messages=[{"role": "user", "content": "word " * words}]
        ).input_tokens
        for words in (1, 10, 20)
    ]
    assert all(more > less for less, more in pairwise(counts))
