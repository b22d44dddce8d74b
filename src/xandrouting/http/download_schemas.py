"""What the calls about downloads take and answer."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Raw, Struct
from pydantic import BaseModel, SerializerFunctionWrapHandler, model_serializer

_Pattern = Annotated[str, Meta(min_length=1, max_length=1000)]
_Patterns = Annotated[list[_Pattern], Meta(max_length=100)]


class RepoRequest(Struct, kw_only=True):
    """A repository of the hub, and what of it."""

    url: Annotated[
        str,
        Meta(
            title="Repository",
            description="org/name, org/name:QUANTIZATION, or the address of its page on the hub.",
            examples=["Qwen/Qwen2.5-Coder-7B-Instruct-GGUF:Q4_K_M"],
        ),
    ]
    quantization: Annotated[
        Annotated[str, Meta(min_length=1, max_length=1000)] | None,
        Meta(
            title="Quantization",
            description="Of a repository with GGUF files: which, or the name of a file.",
            examples=["Q4_K_M", "UD-Q4_K_XL"],
        ),
    ] = None
    include: Annotated[
        _Patterns | None,
        Meta(
            title="Include",
            description="Only files, or folders, that one of these patterns fits; all of them.",
        ),
    ] = None
    exclude: Annotated[
        _Patterns | None,
        Meta(title="Exclude", description="No file, or folder, that one of these patterns fits."),
    ] = None
    revision: Annotated[
        Annotated[str, Meta(max_length=200)] | None,
        Meta(title="Revision", description="A branch, a tag or a commit; unset: the newest."),
    ] = None


class DownloadRequest(RepoRequest, kw_only=True):
    """A download, and what shall follow it."""

    destination: Annotated[
        str | None,
        Meta(
            title="Destination",
            description="The folder it gets in the models directory; unset: the repository's name "
            "in lower case.",
        ),
    ] = None
    load: Annotated[
        bool | dict[str, Raw] | None,
        Meta(
            title="Load",
            description="Load the model once it is complete: true, or the options of the load.",
        ),
    ] = None


class DownloadFile(BaseModel):
    """One file of a download.

    `status`: `completed`, `downloading` or `pending`; where nothing moves, the download's.
    """

    path: str
    size: int
    downloaded_bytes: int
    status: str


class DownloadItem(BaseModel):
    """One download.

    `status`: `pending`, `downloading`, `verifying`, `completed`, `failed`, `cancelled` or
    `paused`. `progress` is from 0 to 1, and absent while nobody knows. `speed` is in bytes per
    second; it and `eta_seconds` are null while nothing moves. `model` is the loadable id of
    what was completed; null where it is no model, and `message` says why. `files` is left out
    in events.
    """

    job_id: str
    jobId: str  # noqa: N815 - for older clients, as are the other twins
    status: str
    url: str
    repo_id: str
    revision: str
    quantization: str | None
    destination: str
    model: str | None
    files: list[DownloadFile]
    file_count: int
    files_downloaded: int
    downloaded_bytes: int
    downloadedSize: int  # noqa: N815
    total_bytes: int
    totalSize: int  # noqa: N815
    total_gb: float
    progress: float | None = None
    speed: float | None
    eta_seconds: float | None
    message: str
    error: str | None
    error_code: str | None
    created_at: str
    started_at: str | None
    startedAt: str | None  # noqa: N815
    completed_at: str | None
    completedAt: str | None  # noqa: N815
    duration_seconds: float

    @model_serializer(mode="wrap")
    def _without_unknown(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        shown: dict[str, Any] = serialize(self)
        if shown["progress"] is None:
            del shown["progress"]
        return shown


class DownloadList(BaseModel):
    """Every download that is known, the newest first."""

    downloads: list[DownloadItem]
    total: int


class DownloadCancelled(BaseModel):
    """What became of a download."""

    status: str
    job_id: str
    message: str


class QuantizationItem(BaseModel):
    """One GGUF model of a repository; `name` is what `quantization` takes.

    `files` are all that is fetched, what gives it eyes included. `complete`: no part is missing
    on the hub. `fits`: whether its weights fit what engines may take here; null: not known.
    """

    name: str
    files: list[str]
    size_bytes: int
    size_gb: float
    complete: bool
    fits: bool | None


class RepoItem(BaseModel):
    """A repository that can be downloaded.

    `matched_files` and `size_bytes` are what a download with the same fields would fetch; where
    it would be refused they are 0, and `message` says why.
    """

    status: str = "accessible"
    repo_id: str
    repo_type: str = "model"
    revision: str
    gated: bool
    private: bool
    license: str | None
    total_files: int
    matched_files: int
    size_bytes: int
    size_gb: float
    fits: bool | None
    quantization: str | None
    sample_files: list[str]
    quantizations: list[QuantizationItem]
    message: str
