"""Model names in paths."""

from __future__ import annotations

import pytest

from tests.unit.test_names import NAMES, QWEN_4, SMOL, model
from xandrouting.http.model_path import MAX_PARTS, climbs, named, split
from xandrouting.routing.names import ModelNames


def parted(path: str, names: ModelNames = NAMES) -> tuple[str, str, str] | None:
    found = split(names, path.encode())
    return None if found is None else (found.file.relative, found.name, found.rest.decode())


@pytest.mark.parametrize(
    ("path", "found"),
    [
        (f"/models/{SMOL}/v1/models", (SMOL, f"/models/{SMOL}", "/v1/models")),
        (f"models/{SMOL}/v1/models", (SMOL, f"/models/{SMOL}", "/v1/models")),
        (f"{SMOL}/health", (SMOL, SMOL, "/health")),
        (f"models%2F{SMOL.replace('/', '%2f')}/health", (SMOL, f"/models/{SMOL}", "/health")),
        ("smollm2/slots/0", (SMOL, "smollm2", "/slots/0")),
        ("Qwen2.5-7B-Q4_K_M/a%2Fb//c/", (QWEN_4, "Qwen2.5-7B-Q4_K_M", "/a%2Fb//c/")),
        (f"{SMOL}/", (SMOL, SMOL, "/")),
        (SMOL, (SMOL, SMOL, "")),
        (f"{SMOL}/{SMOL}", (SMOL, SMOL, f"/{SMOL}")),
        ("nosuch/health", None),
        ("qwen/nosuch", None),  # a folder of two
        ("models/nosuch/health", None),
        ("models", None),
        ("", None),
        ("/", None),
        ("//", None),
        ("leak.gguf/health", None),
        (f"{'x/' * MAX_PARTS}{SMOL}", None),
    ],
)
def test_a_path_begins_with_a_model(path: str, found: tuple[str, str, str] | None) -> None:
    assert parted(path) == found


@pytest.mark.parametrize("path", ["models/nosuch/x", "/models/nosuch", "models", "nosuch/x"])
def test_the_only_model_does_not_stand_for_every_name(path: str) -> None:
    assert parted(path, ModelNames([model("only.gguf")])) is None


def test_the_longest_name_wins() -> None:
    names = ModelNames([model("a/a.gguf"), model("a/v1/v1.gguf"), model("b/v1.gguf")])
    assert parted("a/v1/v1.gguf/health", names) == ("a/v1/v1.gguf", "a/v1/v1.gguf", "/health")
    assert parted("a/v1/health", names) == ("a/v1/v1.gguf", "a/v1", "/health")


@pytest.mark.parametrize(
    "path",
    [
        *("..", "a/..", "../a", "a/../b", "a/./b", "a/."),
        *("a/%2e%2e/b", "a/%2E./b", "a/.%2e", "a%2f..%2fb", "a%2F%2e%2e", "a/%2e/b"),
        *("a\\..\\b", "a%5c..%5cb", "a/..%5cb"),
        *("a/%252e%252e/b", "a%252f..", "a/%25252525252e/b"),
    ],
)
def test_what_climbs(path: str) -> None:
    assert climbs(path.encode())


@pytest.mark.parametrize(
    "path", ["", "/", "a/b.c", "a/..b/c", "a/b../c", "a/...", "a%20b/100%25", "%e9/%", "a//b"]
)
def test_what_does_not(path: str) -> None:
    assert not climbs(path.encode())


def test_a_leading_slash_is_lost_in_a_path() -> None:
    assert named("models/a/b.gguf") == "/models/a/b.gguf"
    assert named("/models/a/b.gguf") == "/models/a/b.gguf"
    assert named("qwen") == "qwen"
    assert named("models") == "models"
