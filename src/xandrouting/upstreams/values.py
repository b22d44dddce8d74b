"""What is known of other servers and their models."""

from __future__ import annotations

from dataclasses import dataclass

from xandrouting.core.model import Backend


@dataclass(frozen=True, slots=True)
class Address:
    """Where an upstream is. Not `expected`: nobody configured it, so its absence is no news."""

    url: str
    api_key: str = ""
    expected: bool = True


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """One model as its server names it. None: the server does not say."""

    id: str
    created: int | None = None  # wall time, in whole seconds as OpenAI has it
    context_length: int | None = None
    size_bytes: int | None = None
    quantization: str | None = None


@dataclass(frozen=True, slots=True)
class RunningModel:
    """One model that an Ollama holds in memory.

    `size_bytes` is what it takes in all, `device_bytes` the part of it on accelerators.
    `expires_at` is wall time by the Ollama's clock; None: it stays.
    """

    id: str
    size_bytes: int
    device_bytes: int
    expires_at: float | None
    context_length: int | None


@dataclass(frozen=True, slots=True)
class Listing:
    """What a server answered when it was asked for its models.

    `odd` says which entries of its lists could not be read, and why.
    """

    models: tuple[RemoteModel, ...] = ()
    running: tuple[RunningModel, ...] = ()
    version: str | None = None
    odd: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class UpstreamState:
    """One upstream as it was last seen.

    `since` is the wall time from which on it is available, or is not; None: it was not asked
    yet. `reason` says in words why it is not. `models` of one that is down are those it had.
    """

    name: str
    backend: Backend
    available: bool
    reason: str | None
    since: float | None
    listing: Listing = Listing()

    @property
    def version(self) -> str | None:
        """The server's version, where it tells."""
        return self.listing.version

    @property
    def models_count(self) -> int:
        """How many models it has, as far as it tells."""
        return len(self.listing.models)
