"""What an engine's adapter tells: what to run, what it takes, what its words mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from xandrouting.core.errors import GatewayError
from xandrouting.core.model import (
    Backend,
    EngineSpec,
    LaunchPlan,
    LoadOptions,
    StartFailure,
)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What an adapter may know of a model before it is loaded. None: the file does not say."""

    size_bytes: int
    context_length: int | None = None
    layers: int | None = None
    pooling: bool = False  # the file says how to pool: a model made for embeddings or ranking


class EngineAdapter(Protocol):
    """One engine: from a spec to a plan. It starts nothing and opens nothing."""

    @property
    def backend(self) -> Backend:
        """The backend it serves."""

    def settle(self, wants: LoadOptions, facts: ModelFacts, device: str) -> LoadOptions:
        """Return `wants` in the engine's own terms: "the model's own" as a number, and so on."""

    def defaults(self, facts: ModelFacts, device: str) -> LoadOptions:
        """Return what an engine is started with where nobody asked."""

    def plan(self, spec: EngineSpec, options: LoadOptions, *, api_key: str) -> LaunchPlan:
        """Return what to run for `spec` with `options`, all of them settled."""

    def classify(self, tail: Sequence[str], status: int | None) -> StartFailure:
        """Tell from its last lines and exit status why a start failed."""

    def explain(self, status: int, error: Mapping[str, Any], path: str) -> GatewayError | None:
        """Return what an error answer of the engine means; None: what its status says."""
