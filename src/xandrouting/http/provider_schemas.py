"""What `GET /v1/providers` answers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class ProviderDevice(BaseModel):
    """One device a provider can use here; its `id` is what a request says for `device`."""

    id: str
    name: str
    capacity_bytes: int
    capacity_gb: float


class ProviderItem(BaseModel):
    """Who can serve a model, and what can be asked of it.

    `kind`: `engine` (its processes run here) or `upstream` (somebody else's server, whose models
    are `id/MODEL`). `reason` says why it is not available, `command` what would install it,
    `since` when it was found down. `default`: `auto` takes it for its formats.
    """

    id: str
    name: str
    backend: str
    description: str
    kind: Literal["engine", "upstream"]
    available: bool
    reason: str | None
    command: str | None
    since: str | None
    version: str | None
    devices: list[ProviderDevice]
    formats: list[str]
    default: bool
    load_options: dict[str, Any] = Field(
        description="A JSON Schema of what a load may ask for. A `default` of null: who "
        "`x-decided-by` names decides, and where that is a model that says nothing it is "
        "`x-otherwise`."
    )
    completion_options: dict[str, Any] = Field(
        description="A JSON Schema of what an inference request may ask of the answer."
    )


class ProviderList(BaseModel):
    """Every provider, those that are not available too."""

    providers: list[ProviderItem]
