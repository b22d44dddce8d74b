"""Any OpenAI-compatible server that somebody else runs, by its address."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from xandrouting.core.errors import GatewayError, UpstreamRefusesKey
from xandrouting.core.model import (
    Backend,
    Cost,
    EngineSpec,
    FixedCost,
    Footprint,
    LaunchPlan,
    LoadOptions,
    Placement,
    StartFailure,
)
from xandrouting.engines.base import ModelFacts, Phase

OLLAMA: Final = "ollama"
"""The name of the upstream that is one; it is known without being configured."""


def backend_of(name: str) -> Backend:
    """Return the backend that the upstream of this name is."""
    return Backend.OLLAMA if name == OLLAMA else Backend.UPSTREAM


def root_of(url: str) -> str:
    """Return the address below which `/v1/…` lies: people write it with and without `/v1`."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


class Upstream:
    """The adapter of other servers: nothing to load, nothing to choose."""

    slots: Final = None
    sleeper_bytes: Final = None
    spare_bytes: Final = 0
    sleep: Final = None

    def __init__(self, keys: Mapping[str, str], backend: Backend = Backend.UPSTREAM) -> None:
        self.backend: Final = backend
        self._keys = keys  # by the upstream's name; none: it asks for no key

    def spare(self) -> LaunchPlan | None:
        """Return None: there is nothing to start."""
        return None

    def settle(self, wants: LoadOptions, facts: ModelFacts, device: str) -> LoadOptions:  # noqa: ARG002
        """Return no options: load options mean nothing to a server that is not ours."""
        return LoadOptions()

    def defaults(self, facts: ModelFacts, device: str) -> LoadOptions:  # noqa: ARG002
        """Return no options."""
        return LoadOptions()

    def cost(self, facts: ModelFacts, device: str) -> Cost:  # noqa: ARG002
        """Return nothing: it runs elsewhere."""
        return FixedCost(Footprint(engines=0))

    def plan(
        self,
        spec: EngineSpec,
        options: LoadOptions,  # noqa: ARG002
        *,
        placement: Placement,  # noqa: ARG002
        slot_folder: str = "",  # noqa: ARG002
    ) -> LaunchPlan:
        """Return the address, and the key the operator set for it."""
        key = self._keys.get(spec.key.model, "")
        return LaunchPlan(base_url=root_of(spec.source), api_key=key, health_path="")

    def flags(self, facts: ModelFacts) -> tuple[str, ...]:  # noqa: ARG002
        """Return none: nothing is started."""
        return ()

    def phase(self, tail: Sequence[str]) -> Phase:  # noqa: ARG002
        """Return that it starts: all that is waited for is a connection."""
        return Phase.STARTING

    def classify(self, tail: Sequence[str], status: int | None) -> StartFailure:  # noqa: ARG002
        """Return that it is gone: nothing was started, so nothing more can be told."""
        return StartFailure.EXITED

    def progress(self, tail: Sequence[str]) -> float | None:  # noqa: ARG002
        """Return None: nothing is loaded here."""
        return None

    def reason(self, tail: Sequence[str]) -> str:  # noqa: ARG002
        """Return nothing: nothing was started."""
        return ""

    def shares(self, facts: ModelFacts, cards: int) -> Sequence[int]:  # noqa: ARG002
        """Return none: it is on no card of ours."""
        return ()

    def explain(self, status: int, error: Mapping[str, Any], path: str) -> GatewayError | None:  # noqa: ARG002
        """Return what a refused key means; else another server's status says what it means.

        The client's own key is another, and the refusal may quote the one that is ours.
        """
        if status != 401:
            return None
        return UpstreamRefusesKey(
            "The upstream refuses the key it was given, or wants one. The operator sets it in "
            "upstream_keys."
        )
