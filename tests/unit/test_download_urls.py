"""What a url asks for, and what is refused before anybody is asked."""

from __future__ import annotations

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from hypothesis import example, given
from hypothesis import strategies as st

from xandrouting.core.errors import InvalidRequest
from xandrouting.downloads.urls import Asked, check_revision, is_repo_id, parse

HUB = "https://huggingface.co"
LOOPBACK = "http://127.0.0.1:8090"
MIRROR = "https://mirror.example/hf"


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("org/name", Asked("org/name")),
        (" org/name\n", Asked("org/name")),
        ("org/name:Q4_K_M", Asked("org/name", quantization="Q4_K_M")),
        ("org/name:latest", Asked("org/name")),
        ("https://huggingface.co/org/name", Asked("org/name")),
        ("https://huggingface.co/org/name/", Asked("org/name")),
        ("https://huggingface.co//org//name", Asked("org/name")),
        ("https://HuggingFace.co:443/org/name?library=x#files", Asked("org/name")),
        ("https://hf.co/org/name:Q8_0", Asked("org/name", quantization="Q8_0")),
        ("https://www.huggingface.co/org/name", Asked("org/name")),
        ("hf.co/org/name:UD-Q4_K_XL", Asked("org/name", quantization="UD-Q4_K_XL")),
        ("huggingface.co/gpt2", Asked("gpt2")),
        ("https://huggingface.co/gpt2", Asked("gpt2")),
        ("https://huggingface.co/gpt2/tree/main", Asked("gpt2", "main")),
        ("https://huggingface.co/o/n/tree/main", Asked("o/n", "main")),
        ("https://huggingface.co/o/n/tree/v1/a/b", Asked("o/n", "v1", folder="a/b")),
        ("https://huggingface.co/o/n/tree", Asked("o/n")),
        ("https://huggingface.co/o/n/blob/main/a.gguf", Asked("o/n", "main", file="a.gguf")),
        ("https://huggingface.co/o/n/raw/main/b/a.json", Asked("o/n", "main", file="b/a.json")),
        (
            "https://huggingface.co/o/n/resolve/main/a%20b.gguf?download=true",
            Asked("o/n", "main", file="a b.gguf"),
        ),
        (
            "https://huggingface.co/o/n/resolve/refs%2Fpr%2F3/a.gguf",
            Asked("o/n", "refs/pr/3", file="a.gguf"),
        ),
        (
            "https://huggingface.co/o/n/blob/refs/pr/3/a.gguf",
            Asked("o/n", "refs/pr/3", file="a.gguf"),
        ),
    ],
)
@pytest.mark.parametrize("endpoint", [HUB, LOOPBACK, MIRROR])
def test_forms_that_are_understood(url: str, asked: Asked, endpoint: str) -> None:
    assert parse(url, endpoint) == asked


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("http://127.0.0.1:8090/org/name", LOOPBACK),
        ("127.0.0.1:8090/org/name", LOOPBACK),
        ("https://mirror.example/hf/org/name", MIRROR),
        ("mirror.example/hf/org/name", MIRROR),
    ],
)
def test_the_hub_that_bytes_come_from_is_understood_too(url: str, endpoint: str) -> None:
    assert parse(url, endpoint) == Asked("org/name")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("gpt2", "no repository"),
        ("a/b/c", "no repository"),
        ("https://evil.example/org/name", "evil.example is not the hub"),
        ("http://evil/?huggingface.co/a/b", "evil is not the hub"),
        ("https://evil.example/huggingface.co/a/b", "not the hub"),
        ("https://huggingface.co.evil.example/a/b", "not the hub"),
        ("https://huggingface.co@evil.example/a/b", "user name"),
        ("https://user:hunter2@huggingface.co/a/b", "user name"),
        ("//huggingface.co/a/b", "no repository"),
        ("http://huggingface.co/a/b", "https://"),
        ("https://huggingface.co:8443/a/b", "https://"),
        ("https://huggingface.co:port/a/b", "cannot be read"),
        ("https://[::1/a/b", "cannot be read"),
        ("http://127.0.0.1:8091/a/b", "not the hub"),
        ("https://127.0.0.1:8090/a/b", None),
        ("file:///etc/passwd", "https://"),
        ("file:/etc/passwd", "https://"),
        ("ftp://huggingface.co/a/b", "https://"),
        ("javascript:alert(1)", "no repository"),
        ("https://huggingface.co", "no repository"),
        ("https://huggingface.co/", "no repository"),
        ("https://huggingface.co/datasets/a/b", "datasets"),
        ("https://huggingface.co/spaces/a/b", "spaces"),
        ("datasets/a", "datasets"),
        ("https://huggingface.co/models?search=x", "page of the hub"),
        ("https://huggingface.co/api/models/a/b", "page of the hub"),
        ("https://huggingface.co/a/b/discussions/1", "not of its files"),
        ("https://huggingface.co/a/b/blob/main", "no file"),
        ("https://huggingface.co/a/../b", "path"),
        ("https://huggingface.co/%2e%2e/b", "path"),
        ("https://huggingface.co/a/b/blob/main/..%2F..%2Fx", None),
        ("https://huggingface.co/a%2Fb/c", "cannot be a repository"),
        ("https://huggingface.co/a/b%00", "path"),
        ("https://huggingface.co\\@evil.example/a/b", "backslash"),
        ("https://hugging\tface.co/a/b", "control character"),
        ("a b/c", "space"),
        ("a/" + "b" * 97, "cannot be a repository"),
        ("a/" + "b" * 5000, "2048"),
        ("a--b/c", "cannot be a repository"),
        ("a/b.git", "cannot be a repository"),
        ("a/b..c", "cannot be a repository"),
        ("-a/b", "cannot be a repository"),
        ("é/b", "cannot be a repository"),
        ("a/b:Q4;K", "quantization"),
        ("a/b:", "quantization"),
    ],
)
def test_what_is_no_repository_of_models_is_refused(url: str, why: str | None) -> None:
    if why is None:  # harmless as it is: nothing but a name in the hub's listing is compared
        parse_quietly(url)
        return
    with pytest.raises(InvalidRequest) as caught:
        parse(url, LOOPBACK)
    assert why in caught.value.message
    assert caught.value.param == "url"
    assert "hunter2" not in caught.value.message


def parse_quietly(url: str) -> Asked | None:
    try:
        return parse(url, LOOPBACK)
    except InvalidRequest:
        return None


def is_taken_by_the_hub(text: str) -> bool:
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


@given(st.text(st.sampled_from("aA0-_./ é"), max_size=12) | st.text(max_size=8))
@example("a" * 96 + "/" + "b" * 96)
@example("a" * 97 + "/b")
@example("name\n")
def test_ids_are_those_the_hub_takes(text: str) -> None:
    assert is_repo_id(text) is is_taken_by_the_hub(text)


@given(st.text(max_size=40) | st.text(st.sampled_from("/:.@%?#\\huggingface.co2F"), max_size=60))
@example("https://huggingface.co/a/b/tree/%2F")
def test_whatever_is_asked_is_a_repository_or_refused(url: str) -> None:
    for text in (url, f"https://huggingface.co/{url}", f"{LOOPBACK}/{url}"):
        asked = parse_quietly(text)
        if asked is not None:
            assert is_repo_id(asked.repo_id)
            assert asked.file is None or asked.folder is None


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/1", "a" * 40])
def test_revisions(revision: str) -> None:
    assert check_revision(revision) == revision


@pytest.mark.parametrize("revision", ["", "a b", "../x", "/a", "a/", "a\n", "a" * 201])
def test_what_is_no_revision(revision: str) -> None:
    with pytest.raises(InvalidRequest):
        check_revision(revision)
