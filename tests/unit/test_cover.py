"""Which options do for which wishes, and what would do for two of them."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xandrouting.core.cover import covers, fill, union
from xandrouting.core.model import LoadOptions

NOTHING = LoadOptions()

sizes = st.none() | st.integers(1, 1 << 20)
options = st.builds(
    LoadOptions,
    n_ctx=sizes,
    n_gpu_layers=st.none() | st.integers(-1, 200),
    n_parallel=sizes,
    gpu_memory_utilization=st.none() | st.floats(0.1, 1.0),
    max_model_len=sizes,
    tensor_parallel_size=st.none() | st.sampled_from([1, 2, 4]),
    embeddings=st.sampled_from([None, True]),
)


@pytest.mark.parametrize(
    ("running", "wants"),
    [
        (NOTHING, NOTHING),
        (LoadOptions(n_ctx=4096), NOTHING),
        (LoadOptions(n_ctx=4096), LoadOptions(n_ctx=4096)),
        (LoadOptions(n_ctx=4096), LoadOptions(n_ctx=2048)),
        (LoadOptions(max_model_len=4096), LoadOptions(max_model_len=2048)),
        (LoadOptions(n_parallel=4), LoadOptions(n_parallel=1)),
        (LoadOptions(n_gpu_layers=0), LoadOptions(n_gpu_layers=0)),
        (LoadOptions(n_gpu_layers=0), NOTHING),
        (LoadOptions(gpu_memory_utilization=0.5), LoadOptions(gpu_memory_utilization=0.9)),
        # The cards it runs on are its placement's.
        (NOTHING, LoadOptions(tensor_parallel_size=2)),
        (LoadOptions(embeddings=True), NOTHING),
        (LoadOptions(embeddings=True), LoadOptions(embeddings=True)),
    ],
)
def test_covers(running: LoadOptions, wants: LoadOptions) -> None:
    assert covers(running, wants)


@pytest.mark.parametrize(
    ("running", "wants"),
    [
        (NOTHING, LoadOptions(n_ctx=2048)),
        (LoadOptions(n_ctx=2048), LoadOptions(n_ctx=2049)),
        (LoadOptions(max_model_len=2048), LoadOptions(max_model_len=4096)),
        (LoadOptions(n_parallel=1), LoadOptions(n_parallel=2)),
        (NOTHING, LoadOptions(n_gpu_layers=0)),
        (LoadOptions(n_gpu_layers=20), LoadOptions(n_gpu_layers=0)),
        (LoadOptions(n_gpu_layers=-1), LoadOptions(n_gpu_layers=20)),
        (NOTHING, LoadOptions(embeddings=True)),
    ],
)
def test_does_not_cover(running: LoadOptions, wants: LoadOptions) -> None:
    assert not covers(running, wants)


def test_union_takes_the_larger_size_and_the_newer_wish() -> None:
    held = LoadOptions(
        n_ctx=4096, n_gpu_layers=0, n_parallel=2, gpu_memory_utilization=0.9, embeddings=True
    )
    wants = LoadOptions(n_ctx=2048, n_gpu_layers=20, n_parallel=4, max_model_len=1024)
    two, four = LoadOptions(tensor_parallel_size=2), LoadOptions(tensor_parallel_size=4)
    assert union(two, wants).tensor_parallel_size == 2
    assert union(four, two) == two
    assert union(held, wants) == LoadOptions(
        n_ctx=4096,
        n_gpu_layers=20,
        n_parallel=4,
        gpu_memory_utilization=0.9,
        max_model_len=1024,
        embeddings=True,
    )


def test_fill_keeps_what_was_asked_even_where_it_is_less() -> None:
    defaults = LoadOptions(n_ctx=4096, n_gpu_layers=-1, n_parallel=4, embeddings=True)
    wants = LoadOptions(n_ctx=2048, n_gpu_layers=0)
    assert fill(LoadOptions(tensor_parallel_size=2), defaults).tensor_parallel_size == 2
    assert fill(wants, defaults) == LoadOptions(
        n_ctx=2048, n_gpu_layers=0, n_parallel=4, embeddings=True
    )


@given(options)
def test_nothing_changes_nothing(some: LoadOptions) -> None:
    assert union(some, NOTHING) == union(NOTHING, some) == union(some, some) == some
    assert fill(some, NOTHING) == fill(NOTHING, some) == some
    assert covers(some, NOTHING)
    assert covers(some, some)


@given(options, options, options)
def test_the_newer_wish_is_always_covered(
    held: LoadOptions, wants: LoadOptions, defaults: LoadOptions
) -> None:
    assert covers(fill(union(held, wants), defaults), wants)


@given(options, options, options)
def test_the_older_wish_is_covered_but_for_contradicting_layers(
    held: LoadOptions, wants: LoadOptions, defaults: LoadOptions
) -> None:
    contradiction = None not in (held.n_gpu_layers, wants.n_gpu_layers) and (
        held.n_gpu_layers != wants.n_gpu_layers
    )
    assert covers(fill(union(held, wants), defaults), held) is not contradiction


@given(options, options, options)
def test_the_order_of_three_wishes_settles_contradictions_only(
    a: LoadOptions, b: LoadOptions, c: LoadOptions
) -> None:
    assert union(union(a, b), c) == union(a, union(b, c))


@given(options, options)
def test_unset_stays_unset_only_where_nobody_asked(a: LoadOptions, b: LoadOptions) -> None:
    for option in fields(LoadOptions):
        asked = {getattr(a, option.name), getattr(b, option.name)} - {None}
        for both in (union(a, b), fill(a, b)):
            value = getattr(both, option.name)
            assert value in asked if asked else value is None
