"""Does a running engine do for a request, and if not, what would do for both?"""

from __future__ import annotations

from typing import TypeVar

from xandrouting.core.model import LoadOptions

_T = TypeVar("_T", int, float, str)


def covers(running: LoadOptions, wants: LoadOptions) -> bool:
    """Whether an engine started with `running` serves a request that asks for `wants`.

    Unset asks nothing. A larger context or more slots cover a smaller ask; layers and the
    cache's types must be equal, because fewer is as much a wish as more; the share of the card
    matters only at load. On how many cards it runs, its placement tells and not `running`.
    """
    return (
        _at_least(running.n_ctx, wants.n_ctx)
        and _at_least(running.max_model_len, wants.max_model_len)
        and _at_least(running.n_parallel, wants.n_parallel)
        and wants.n_gpu_layers in (None, running.n_gpu_layers)
        and wants.cache_type_k in (None, running.cache_type_k)
        and wants.cache_type_v in (None, running.cache_type_v)
        and (not wants.embeddings or running.embeddings is True)
    )


def union(held: LoadOptions, wants: LoadOptions) -> LoadOptions:
    """Return options that serve what `held` served and also `wants`.

    Where two wishes contradict each other (layers, cards, cache types, share of the card)
    `wants` wins.
    """
    return LoadOptions(
        n_ctx=_larger(held.n_ctx, wants.n_ctx),
        n_gpu_layers=_newer(held.n_gpu_layers, wants.n_gpu_layers),
        n_parallel=_larger(held.n_parallel, wants.n_parallel),
        gpu_memory_utilization=_newer(held.gpu_memory_utilization, wants.gpu_memory_utilization),
        max_model_len=_larger(held.max_model_len, wants.max_model_len),
        tensor_parallel_size=_newer(held.tensor_parallel_size, wants.tensor_parallel_size),
        embeddings=held.embeddings or wants.embeddings,
        cache_type_k=_newer(held.cache_type_k, wants.cache_type_k),
        cache_type_v=_newer(held.cache_type_v, wants.cache_type_v),
    )


def fill(wants: LoadOptions, defaults: LoadOptions) -> LoadOptions:
    """Return `wants` with `defaults` where nothing was asked."""
    return LoadOptions(
        n_ctx=_newer(defaults.n_ctx, wants.n_ctx),
        n_gpu_layers=_newer(defaults.n_gpu_layers, wants.n_gpu_layers),
        n_parallel=_newer(defaults.n_parallel, wants.n_parallel),
        gpu_memory_utilization=_newer(
            defaults.gpu_memory_utilization, wants.gpu_memory_utilization
        ),
        max_model_len=_newer(defaults.max_model_len, wants.max_model_len),
        tensor_parallel_size=_newer(defaults.tensor_parallel_size, wants.tensor_parallel_size),
        embeddings=wants.embeddings or defaults.embeddings,
        cache_type_k=_newer(defaults.cache_type_k, wants.cache_type_k),
        cache_type_v=_newer(defaults.cache_type_v, wants.cache_type_v),
    )


def _at_least(has: int | None, asked: int | None) -> bool:
    return asked is None or (has is not None and has >= asked)


def _larger(a: int | None, b: int | None) -> int | None:
    if a is None or b is None:
        return a if b is None else b
    return max(a, b)


def _newer(old: _T | None, new: _T | None) -> _T | None:
    return old if new is None else new
