"""Names that stay inside a folder, and those that do not."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from xandrouting.core.errors import InvalidDestination, UnsafeRepository
from xandrouting.downloads.jobs import RemoteFile
from xandrouting.downloads.names import check_destination, check_listing


@pytest.mark.parametrize("name", ["a", "qwen2.5-coder-7b", "Ünï", "a b", "x" * 255, "models"])
def test_destinations(name: str) -> None:
    assert check_destination(name) == name


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "empty"),
        ("/etc", "absolute"),
        ("..", "dot"),
        (".", "dot"),
        ("a/../..", "several folders"),
        ("../a", "several folders"),
        ("a/b", "several folders"),
        ("a/", "several folders"),
        (".hidden", "dot"),
        (".incoming", "dot"),
        ("a\\b", "backslash"),
        ("a\nb", "printed"),
        ("a\x00b", "printed"),
        ("a\u202eb", "printed"),
        ("\ud800", "printed"),
        (" a", "space"),
        ("x" * 256, "255 bytes"),
        ("ü" * 128, "255 bytes"),
        ("x" * 5000, "255 bytes"),
    ],
)
def test_what_is_no_destination(name: str, why: str) -> None:
    with pytest.raises(InvalidDestination) as caught:
        check_destination(name)
    assert why in caught.value.message
    assert caught.value.param == "destination"
    assert len(caught.value.message) < 300


@given(st.text(max_size=20) | st.text(st.sampled_from("./\\a \n"), max_size=8))
@example("..")
def test_a_destination_is_one_visible_folder(name: str) -> None:
    try:
        check_destination(name)
    except InvalidDestination:
        return
    assert PurePosixPath("/root", name).parent == PurePosixPath("/root")
    assert PurePosixPath(name).name == name
    assert not name.startswith(".")


def files(*paths: str) -> list[RemoteFile]:
    return [RemoteFile(path, 1) for path in paths]


def test_listings() -> None:
    check_listing("o/n", files("a.gguf", "b/a.gguf", "b/c/d", ".gitattributes", "é", "...", "a b"))
    check_listing("o/n", [])


@pytest.mark.parametrize(
    "paths",
    [
        ("../evil",),
        ("a/../../evil",),
        ("..",),
        ("/etc/passwd",),
        ("a//b",),
        ("a/",),
        ("./a",),
        ("",),
        ("a\\..\\b",),
        ("a\nb",),
        ("a\x00",),
        ("\ud800",),
        (".xandrouting.json",),
        (".XandRouting.JSON",),
        ("sub/.xandrouting.json",),
        ("x" * 256,),
        ("/".join("x" * 100 for _ in range(11)),),
        ("a", "a"),
        ("a", "a/b"),
    ],
)
def test_listings_that_are_refused(paths: tuple[str, ...]) -> None:
    with pytest.raises(UnsafeRepository, match="o/n lists a file"):
        check_listing("o/n", files("good.gguf", *paths))


@given(st.lists(st.text(st.sampled_from("./a\\"), max_size=8), max_size=3))
def test_listings_stay_inside(paths: list[str]) -> None:
    try:
        check_listing("o/n", files(*paths))
    except UnsafeRepository:
        return
    for path in paths:
        parts = PurePosixPath(path).parts
        assert parts
        assert ".." not in parts
        assert not path.startswith("/")
