"""The other calls that go to an engine, and the client libraries of OpenAI and Anthropic."""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from tests.engine.conftest import VECTORS
from tests.server import MODEL, Server, error_of, ok

SHORT = "smollm2-135m-instruct"


def ask(server: Server, path: str, **fields: Any) -> Any:
    return ok(server.post(path, {"model": SHORT, **fields}))


# Texts.


def test_completions(server: Server) -> None:
    body = ask(server, "/v1/completions", prompt="Once upon a", max_tokens=4, temperature=0)
    assert body["object"] == "text_completion"
    assert body["model"] == MODEL
    assert body["choices"][0]["text"]
    assert body["usage"]["completion_tokens"] == 4


def test_completions_as_a_stream(server: Server) -> None:
    body = {"model": SHORT, "prompt": "Once upon a", "max_tokens": 4, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks)


def test_responses(server: Server) -> None:
    body = ask(server, "/v1/responses", input="Say hello.", max_output_tokens=8, temperature=0)
    assert body["object"] == "response"
    assert body["model"] == MODEL
    assert body["output"][0]["content"][0]["text"]


def test_responses_as_a_stream(server: Server) -> None:
    body = {"model": SHORT, "input": "Say hello.", "max_output_tokens": 4, "stream": True}
    with server.client.stream("POST", "/v1/responses", json=body) as response:
        kinds = [line for line in response.iter_lines() if line.startswith("event: ")]
    assert kinds[0] == "event: response.created"
    assert kinds[-1] == "event: response.completed"


@pytest.mark.parametrize("text", ["Hello wörld", "", " 世界 🌍\n\ttabs"])
def test_tokens_there_and_back(server: Server, text: str) -> None:
    tokens = ask(server, "/tokenize", content=text)["tokens"]
    assert ask(server, "/detokenize", tokens=tokens)["content"] == text


def test_answer_of_the_tokenizer_is_the_engines_own(server: Server) -> None:
    server.load()
    engine = server.engine(MODEL)
    body = {"model": MODEL, "content": "Byte for byte, 世界"}
    direct = httpx2.post(
        f"{engine.url}/tokenize", json=body, headers=engine.headers, trust_env=False
    )
    assert server.post("/tokenize", body).content == direct.content


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {}),
        ("/v1/messages", {"max_tokens": 2}),
        ("/v1/responses", {}),
        ("/detokenize", {"tokens": [10_000_000]}),
        ("/detokenize", {"tokens": ["x"]}),
    ],
)
def test_what_is_missing_or_wrong_is_the_clients_fault(
    server: Server, path: str, fields: dict[str, Any]
) -> None:
    answer = server.post(path, {"model": SHORT, **fields})
    assert error_of(answer, 400, "engine_rejected")["type"] == "invalid_request_error"


def test_rerank_is_not_for_a_chat_model(server: Server) -> None:
    answer = server.post("/v1/rerank", {"model": SHORT, "query": "a", "documents": ["b", "c"]})
    error = error_of(answer, 400, "unsupported_by_engine")
    assert "llama.cpp" in error["message"]
    assert "/v1/rerank" in error["message"]


# Vectors.


@pytest.fixture
def embeds(server: Server) -> Iterator[str]:
    """A model nobody asked for vectors yet."""
    server.unload(VECTORS)
    yield VECTORS
    server.unload(VECTORS)


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def test_embeddings_are_vectors_of_their_texts(server: Server, embeds: str) -> None:
    texts = ["The cat sleeps.", "The cat sleeps.", "Interest rates rose by two percent."]
    body = ok(server.post("/v1/embeddings", {"model": embeds, "input": texts}))
    assert body["model"] == embeds
    assert [item["index"] for item in body["data"]] == [0, 1, 2]
    first, same, other = (item["embedding"] for item in body["data"])
    assert len(first) == 576
    assert cosine(first, same) == pytest.approx(1.0, abs=1e-4)
    assert cosine(first, other) < 0.95
    assert body["usage"]["prompt_tokens"] > 10

    coded = {"model": embeds, "input": texts[0], "encoding_format": "base64"}
    raw = base64.b64decode(ok(server.post("/v1/embeddings", coded))["data"][0]["embedding"])
    assert cosine(list(struct.unpack(f"<{len(raw) // 4}f", raw)), first) == pytest.approx(
        1.0, abs=1e-4
    )


def test_chat_goes_on_beside_embeddings(server: Server, embeds: str) -> None:
    """The first call for vectors loads the engine anew, and then it does for both."""
    before = server.stats()["loads"]
    how = []
    for _ in range(2):
        chat = server.chat(model=embeds, max_tokens=2)
        assert ok(chat)["choices"][0]["message"]["content"]
        vectors = server.post("/v1/embeddings", {"model": embeds, "input": "Hi"})
        assert ok(vectors)["data"]
        how += [r.headers["x-xandrouting-load"].partition(";")[0] for r in (chat, vectors)]
    assert how == ["cold", "cold", "hit", "hit"]
    assert server.stats()["loads"] == before + 2


def test_text_too_long_to_embed_is_the_clients_fault(server: Server, embeds: str) -> None:
    answer = server.post("/v1/embeddings", {"model": embeds, "input": "word " * 5000})
    error_of(answer, 400, "engine_rejected")


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
        model=SHORT,
        messages=[{"role": "user", "content": "Name a colour."}],
        max_tokens=8,
        temperature=0,
        extra_body={"backend": "llamacpp", "device": "cpu", "n_ctx": 2048, "ttl": 0},
    )
    assert answer.model == MODEL
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 8


def test_openai_stream(gpt: openai.OpenAI) -> None:
    stream = gpt.chat.completions.create(
        model=SHORT,
        messages=[{"role": "user", "content": "Name a colour."}],
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert chunks[-1].usage is not None


def test_openai_embeddings(gpt: openai.OpenAI, embeds: str) -> None:
    answer = gpt.embeddings.create(model=embeds, input=["one", "two"])
    assert [len(item.embedding) for item in answer.data] == [576, 576]


def test_openai_responses(gpt: openai.OpenAI) -> None:
    answer = gpt.responses.create(
        model=SHORT, input="Say hello.", max_output_tokens=8, temperature=0
    )
    assert answer.output_text


def test_openai_models(gpt: openai.OpenAI) -> None:
    ids = [model.id for model in gpt.models.list()]
    assert MODEL in ids
    assert ids == sorted(ids)
    for spelling in (MODEL, SHORT):
        assert gpt.models.retrieve(spelling).id == MODEL


def test_openai_errors(gpt: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        gpt.models.retrieve("nosuch")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        gpt.chat.completions.create(model=SHORT, messages=[])
    assert (wrong.value.code, wrong.value.param) == ("invalid_request", "messages")
    with pytest.raises(openai.NotFoundError):
        gpt.chat.completions.create(
            model="nosuch", messages=[{"role": "user", "content": "Hi"}], stream=True
        )


@pytest.fixture
def claude(server: Server) -> Iterator[anthropic.Anthropic]:
    http = anthropic.DefaultHttpxClient(trust_env=False)
    with anthropic.Anthropic(
        base_url=server.url, api_key="none", max_retries=0, http_client=http
    ) as client:
        yield client


def test_anthropic_messages(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(
        model=SHORT,
        max_tokens=8,
        extra_body={"temperature": 0},
        messages=[{"role": "user", "content": "Name a colour."}],
    )
    assert answer.model == MODEL
    [block] = answer.content
    assert block.type == "text"
    assert block.text
    assert answer.usage.output_tokens <= 8


def test_anthropic_stream(claude: anthropic.Anthropic) -> None:
    # Not by chance: when its first token is only a part of a character, as an emoji's are,
    # llama.cpp forgets the event `message_start`.
    with claude.messages.stream(
        model=SHORT,
        max_tokens=8,
        extra_body={"temperature": 0},
        messages=[{"role": "user", "content": "Name a colour."}],
    ) as stream:
        pieces = list(stream.text_stream)
        assert "".join(pieces) == stream.get_final_text()
    assert "".join(pieces)


def test_anthropic_counts_tokens(claude: anthropic.Anthropic) -> None:
    counts = [
        claude.messages.count_tokens(
            model=SHORT, messages=[{"role": "user", "content": "word " * words}]
        ).input_tokens
        for words in (1, 10, 20)
    ]
    assert all(more > less for less, more in pairwise(counts))


def test_anthropic_errors(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(
            model="nosuch", max_tokens=8, messages=[{"role": "user", "content": "Hi"}]
        )
