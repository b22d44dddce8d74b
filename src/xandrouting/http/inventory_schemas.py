"""What the lists tell of models on disk, and a deletion of what it took away."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class InventoryFile(BaseModel):
    """One file of a model."""

    path: str
    filename: str
    name: str
    size_bytes: int
    size_mb: float
    size_gb: float
    file_type: str
    type: str
    quantization: str | None


class InventoryItem(BaseModel):
    """One loadable thing on disk, or one that would be loadable without its `problem`."""

    name: str
    model_name: str
    path: str
    model_path: str
    type: str
    model_type: str
    size: int
    total_size_bytes: int
    size_gb: float
    total_size_gb: float
    sizeGB: str  # noqa: N815 - the older server's name
    file_count: int
    files: list[InventoryFile]
    quantization: str | None
    recommended_backend: str
    recommended_backends: list[str]
    recommendedBackend: list[str]  # noqa: N815 - the older server's name
    recommended_reason: str
    is_loaded: bool
    has_config: bool
    config_metadata: dict[str, Any]
    metadata: dict[str, Any]
    capabilities: list[str]
    read_only: bool = Field(description="It lies in a further root: it cannot be deleted here.")
    fits: bool | None = Field(
        description="Whether it can be loaded here with its default options; null: it is damaged."
    )
    problem: str | None


class InventoryList(BaseModel):
    """What lies under the models directory."""

    models: list[InventoryItem]
    total_models: int
    total_size_gb: float


class DeletedModel(BaseModel):
    """A model that was deleted.

    Its files take `freed_bytes` of the disk until `trash_until`; null: they are gone.
    """

    status: str = "deleted"
    model: str
    files: list[str]
    freed_bytes: int
    freed_gb: float
    trash_until: str | None
    message: str
