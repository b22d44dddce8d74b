"""Where an event ends, however the bytes of a stream are cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from xandrouting.proxy import sse
from xandrouting.proxy.sse import HOLD_BYTES, comment, split_error, split_events

ENDS = (b"\n\n", b"\r\n\r\n")


@pytest.mark.parametrize(
    ("data", "whole", "begun"),
    [
        (b"", b"", b""),
        (b"data: a\n\n", b"data: a\n\n", b""),
        (b"data: a\r\n\r\n", b"data: a\r\n\r\n", b""),
        (b"data: a\n\ndata: b\n\n", b"data: a\n\ndata: b\n\n", b""),
        (b"data: a\n\ndat", b"data: a\n\n", b"dat"),
        (b"data: a\r\n\r\ndat", b"data: a\r\n\r\n", b"dat"),
        (b"data: a\n\ndata: b\r\n\r\nc", b"data: a\n\ndata: b\r\n\r\n", b"c"),
        (b"data: a\r\n\r\ndata: b\n\nc", b"data: a\r\n\r\ndata: b\n\n", b"c"),
        (b"data: a\n", b"", b"data: a\n"),
        (b"data: a\r\n\r", b"", b"data: a\r\n\r"),
        (b"data: a\n\ndata: b\n", b"data: a\n\n", b"data: b\n"),
        (b"data: one\ndata: two\n\nid", b"data: one\ndata: two\n\n", b"id"),
        (b"dat", b"", b"dat"),
    ],
)
def test_events_are_split_after_the_last_whole_one(data: bytes, whole: bytes, begun: bytes) -> None:
    assert split_events(data) == (whole, begun)


@pytest.mark.parametrize(
    ("data", "before", "failure"),
    [
        (b"data: a\n\n", b"data: a\n\n", b""),
        (b'data: {"error":{"message":"x"}}\n\n', b"", b'data: {"error":{"message":"x"}}\n\n'),
        (b'data: a\n\ndata: {"error": "x"}\n\n', b"data: a\n\n", b'data: {"error": "x"}\n\n'),
        (b'data: { "error" : {"message":"x"}}\n\n', b"", b'data: { "error" : {"message":"x"}}\n\n'),
        (b'data: {"error":null,"choices":[]}\n\n', b'data: {"error":null,"choices":[]}\n\n', b""),
        (
            b'data: {"content":"data: {\\"error\\":"}\n',
            b'data: {"content":"data: {\\"error\\":"}\n',
            b"",
        ),
    ],
)
def test_an_error_is_split_off(data: bytes, before: bytes, failure: bytes) -> None:
    assert split_error(data) == (before, failure)


def relayed(pieces: list[bytes]) -> tuple[list[bytes], bytes]:
    """What a relay would write for these reads, and what it holds back at the end."""
    written, held = [], b""
    for piece in pieces:
        data, held = split_events(held + piece)
        if data:
            written.append(data)
    return written, held


events = st.lists(
    st.tuples(
        st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"").replace(b"\r", b"")),
        st.sampled_from(ENDS),
    ).map(lambda event: b"data: " + event[0] + event[1]),
    max_size=6,
).map(b"".join)
noise = st.lists(st.sampled_from([b"\n", b"\r", b"data: ", b"x", b":"]), max_size=20).map(b"".join)


@settings(max_examples=60, deadline=None)
@given(stream=events | noise, cuts=st.lists(st.integers(0, 120), max_size=8))
@example(b"data: a\r\n\r\n", [8, 9, 10])
@example(b"data: a\n\ndata: b\n\n", [8, 9, 17])
def test_nothing_is_lost_and_every_write_ends_with_an_event(stream: bytes, cuts: list[int]) -> None:
    at = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    written, held = relayed([stream[a:b] for a, b in pairwise(at)])
    assert b"".join(written) + held == stream
    assert all(piece.endswith(ENDS) for piece in written)
    assert not any(end in held for end in ENDS)


@settings(max_examples=20, deadline=None)
@given(stream=events, cuts=st.sets(st.integers(1, 120), max_size=8))
def test_a_stream_of_whole_events_holds_nothing_back(stream: bytes, cuts: set[int]) -> None:
    at = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    _, held = relayed([stream[a:b] for a, b in pairwise(at)])
    assert held == b""


def test_an_event_that_never_ends_is_not_held_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "HOLD_BYTES", 100)
    written, held = relayed([b"x" * 30] * 10)
    assert b"".join(written) + held == b"x" * 300
    assert [len(piece) for piece in written] == [120, 120]


def test_what_is_held_is_measured_from_the_last_whole_event() -> None:
    event = b"data: " + b"x" * HOLD_BYTES + b"\n\n"
    assert split_events(event + b"data: y") == (event, b"data: y")
    assert split_events(b"y" * HOLD_BYTES) == (b"", b"y" * HOLD_BYTES)
    assert split_events(b"y" * (HOLD_BYTES + 1)) == (b"y" * (HOLD_BYTES + 1), b"")


def test_a_comment_is_an_event_of_its_own() -> None:
    assert comment("loading 43%") == b": loading 43%\n\n"
    assert split_events(comment("x")) == (b": x\n\n", b"")
