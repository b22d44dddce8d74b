"""Every parameter of the guide does what it says, seen on real llama.cpp.

Answers are near ties, so no test knows a text: runs are compared with each other, each
without the engine's cache of earlier prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.engine.conftest import SPARE
from tests.server import Server, deltas, error_of, ok, results, text_of, together

Say = Callable[..., str]


@pytest.fixture
def say(server: Server) -> Say:
    def ask(text: str = "Tell me a story about a fox.", **fields: Any) -> str:
        fields = {"max_tokens": 24, "cache_prompt": False} | fields
        return text_of(server.chat(text, **fields))

    return ask


# Sampling.


def test_temperature_zero_repeats_itself(say: Say) -> None:
    assert say(temperature=0) == say(temperature=0)


def test_seed_reproduces_and_another_differs(say: Say) -> None:
    hot: dict[str, Any] = {"temperature": 1.5, "max_tokens": 16}
    texts = [say(seed=seed, **hot) for seed in (1, 2, 3)]
    assert len(set(texts)) > 1
    assert say(seed=2, **hot) == texts[1]


def test_temperature_widens_the_choice(say: Say) -> None:
    few: dict[str, Any] = {"max_tokens": 8}
    cold = {say(seed=seed, temperature=0, **few) for seed in range(3)}
    hot = {say(seed=seed, temperature=2.0, **few) for seed in range(3)}
    assert len(cold) == 1
    assert len(hot) > 1


def test_tiny_top_p_is_greedy(say: Say) -> None:
    greedy = say(temperature=0)
    assert say(temperature=1.5, top_p=1e-6, seed=5, min_p=0) == greedy
    wide = {say(temperature=1.5, top_p=1.0, seed=seed, max_tokens=8) for seed in (5, 6, 7)}
    assert len(wide) > 1


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_penalty_breaks_a_repetition(say: Say, penalty: str) -> None:
    text = "Repeat the word apple many times: apple apple apple apple apple apple apple"
    same: dict[str, Any] = {"temperature": 0, "max_tokens": 32}
    free = say(text, **same)
    held = say(text, **{penalty: 2.0}, **same)
    assert held != free
    assert repetitions(held) < repetitions(free)
    assert say(text, **{penalty: 0.0}, **same) == free


def repetitions(text: str) -> int:
    """How often a word follows that was there before."""
    words = text.lower().split()
    return len(words) - len(set(words))


# Ends.


def test_max_tokens_limits(server: Server) -> None:
    for limit in (1, 5):
        body = ok(server.chat("Tell me a long story.", max_tokens=limit))
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == limit


def test_max_completion_tokens_limits(server: Server) -> None:
    body = ok(server.chat("Tell me a long story.", max_tokens=None, max_completion_tokens=3))
    assert body["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("listed", [True, False], ids=["list", "string"])
def test_stop_ends_before_the_word(server: Server, listed: bool) -> None:
    same: dict[str, Any] = {"max_tokens": 24, "cache_prompt": False}
    whole = text_of(server.chat("Tell me a story about a fox.", **same))
    word = whole.split()[4]
    stop = ["@@never@@", word] if listed else word
    answer = server.chat("Tell me a story about a fox.", stop=stop, **same)
    assert text_of(answer) == whole[: whole.index(word)]
    assert answer.json()["choices"][0]["finish_reason"] == "stop"


def test_stop_ends_a_stream_before_the_word(server: Server) -> None:
    same: dict[str, Any] = {"max_tokens": 24, "cache_prompt": False}
    whole = text_of(server.chat("Tell me a story about a fox.", **same))
    word = whole.split()[4]
    with server.stream("Tell me a story about a fox.", stop=word, **same) as stream:
        *events, done = stream.rest()
    assert deltas(events) == whole[: whole.index(word)]
    assert done == "[DONE]"


def test_stream_comes_in_pieces(server: Server) -> None:
    with server.stream("Tell me a story.", max_tokens=12) as stream:
        first = stream.first()
        rest = stream.rest()
    assert first.startswith("{")
    assert len(rest) >= 12


# Load options.


def test_context_limits_the_prompt(server: Server, spare: str) -> None:
    server.load(spare, n_ctx=512)
    answer = server.chat("word " * 600, model=spare)
    error = error_of(answer, 400, "engine_rejected")
    assert "exceeds the available context size (512 tokens)" in error["message"]
    assert error["type"] == "exceed_context_size_error"
    assert error["n_ctx"] == 512
    assert error["n_prompt_tokens"] > 600
    with server.stream("word " * 600, model=spare) as stream:
        assert stream.response.status_code == 400  # before the headers of a stream as well
        stream.response.read()
    assert ok(server.chat("word " * 300, model=spare))


def test_each_request_may_use_the_whole_context(server: Server, spare: str) -> None:
    """llama.cpp divides its context among the slots; n_ctx is what each request gets."""
    assert server.load(spare, n_ctx=256, n_parallel=2)["n_parallel"] == 2
    with together(2) as pool:
        asks = [
            pool.submit(server.chat, word * 210, model=spare, max_tokens=1)
            for word in ("word ", "tree ")
        ]
        prompts = [ok(answer)["usage"]["prompt_tokens"] for answer in results(asks)]
    assert min(prompts) > 210


def test_zero_layers_on_the_card_stays_zero(server: Server, spare: str) -> None:
    assert server.load(spare, n_gpu_layers=0)["n_gpu_layers"] == 0
    assert server.chat(model=spare, n_gpu_layers=0).headers["x-xandrouting-load"] == "hit"


def test_zero_context_is_the_models_own(server: Server, spare: str) -> None:
    own = ok(server.get(f"/v1/models{spare}"))["context_length"]
    assert server.load(spare, n_ctx=0, n_parallel=1)["n_ctx"] == own == 8192


def test_smaller_context_is_covered(server: Server, spare: str) -> None:
    server.load(spare, n_ctx=2048)
    for asked in ({"n_ctx": 512}, {"n_ctx": 2048}, {}):
        answer = server.chat(model=spare, max_tokens=1, **asked)
        assert ok(answer)
        assert answer.headers["x-xandrouting-load"] == "hit"


def test_two_clients_with_other_contexts_reload_once(server: Server, spare: str) -> None:
    """The union serves both: they do not make the engine come and go."""
    before = server.stats()["loads"]
    how = []
    for asked in [{"n_ctx": 512, "n_parallel": 1}, {"n_ctx": 1024}] * 3:
        answer = server.chat(model=spare, max_tokens=1, **asked)
        assert ok(answer)
        how.append(answer.headers["x-xandrouting-load"].partition(";")[0])
    assert how == ["cold", "cold", "hit", "hit", "hit", "hit"]
    assert server.stats()["loads"] == before + 2
    [item] = [item for item in server.loaded() if item["path"] == SPARE]
    assert (item["n_ctx"], item["n_parallel"]) == (1024, 1)


def test_reload_for_other_options_lets_the_stream_end(server: Server, spare: str) -> None:
    server.load(spare, n_ctx=512)
    with server.stream("Tell me a long story.", model=spare, max_tokens=48) as stream:
        stream.first()
        with together(1) as pool:
            larger = pool.submit(server.chat, "Hi", model=spare, n_ctx=1024, max_tokens=1)
            *_, done = stream.rest()
            assert ok(larger.result(30))
    assert done == "[DONE]"
    [item] = [item for item in server.loaded() if item["path"] == SPARE]
    assert item["n_ctx"] == 1024
