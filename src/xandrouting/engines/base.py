"""What an engine's adapter tells: what to run, what it takes, what its words mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from xandrouting.core.errors import GatewayError
from xandrouting.core.model import (
    Backend,
    Cost,
    EngineSpec,
    LaunchPlan,
    LoadOptions,
    Placement,
    StartFailure,
)

PerLayer = int | tuple[int, ...] | None
"""The same for every layer, or one number for each."""


@dataclass(frozen=True, slots=True)
class StateFacts:
    """The shape of layers that keep a state of fixed size instead of keys and values."""

    conv_kernel: int
    inner_size: int
    state_size: int
    group_count: int


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What an adapter may know of a model before it is loaded. None: the file does not say."""

    size_bytes: int
    context_length: int | None = None
    layers: int | None = None
    pooling: bool = False  # the file says how to pool: a model made for embeddings or ranking
    architecture: str | None = None
    embedding_length: int | None = None
    feed_forward: int | None = None  # of what works on one token: the chosen experts together
    vocab_size: int | None = None
    head_count: PerLayer = None
    head_count_kv: PerLayer = None
    key_length: int | None = None
    value_length: int | None = None
    key_length_swa: int | None = None  # in layers that see a window
    value_length_swa: int | None = None
    keys_only: bool = False  # values are kept inside the keys (MLA)
    sliding_window: int | None = None
    sliding_pattern: PerLayer = None  # one layer in so many is full; a tuple: 1 slides
    state: StateFacts | None = None  # some or all layers keep one
    recurrent_pattern: PerLayer = None  # one layer in so many has none; a tuple: 1 has one
    uncached_layers: int = 0  # the last ones, which keep nothing of their own
    tensor_bytes: int = 0  # the file without its header; 0: unknown
    type_bytes: tuple[tuple[str, int], ...] = ()  # of the tensors, by their type
    block_bytes: tuple[int, ...] = ()  # of each layer's tensors
    embedding_bytes: int = 0  # of the table that turns tokens into vectors
    embedding_type: str | None = None  # of the same
    output_bytes: int = 0  # of the one that turns vectors into tokens; 0: the same table
    mmproj_bytes: int = 0  # of the projector that gives it eyes


class Phase(StrEnum):
    """What a loading engine is at."""

    STARTING = "starting"  # its process begins
    READING = "loading_weights"
    WARMING = "warming_up"  # the model is in memory; a first run, then it listens


class EngineAdapter(Protocol):
    """One engine: from a spec to a plan. It starts nothing and opens nothing."""

    @property
    def backend(self) -> Backend:
        """The backend it serves."""

    def settle(self, wants: LoadOptions, facts: ModelFacts, device: str) -> LoadOptions:
        """Return `wants` in the engine's own terms: "the model's own" as a number, and so on."""

    def defaults(self, facts: ModelFacts, device: str) -> LoadOptions:
        """Return what an engine is started with where nobody asked."""

    def cost(self, facts: ModelFacts, device: str) -> Cost:
        """Return what an engine of this model takes, for any options."""

    def plan(
        self, spec: EngineSpec, options: LoadOptions, *, api_key: str, placement: Placement
    ) -> LaunchPlan:
        """Return what to run for `spec` with `options`, all of them settled, and where."""

    def phase(self, tail: Sequence[str]) -> Phase:
        """Tell from its last lines what a loading engine is at."""

    def classify(self, tail: Sequence[str], status: int | None) -> StartFailure:
        """Tell from its last lines and exit status why a start failed."""

    def explain(self, status: int, error: Mapping[str, Any], path: str) -> GatewayError | None:
        """Return what an error answer of the engine means; None: what its status says."""
