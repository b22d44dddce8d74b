"""The gateway's errors, each with its HTTP face on the class.

Raise one where the fact is known; only `http/errors.py` turns it into a response.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any, ClassVar, Self


class GatewayError(Exception):
    """A failure with one agreed HTTP face.

    `message` is shown to the client, so it names the model and the remedy and never a
    local path, an argv or a token; those go to the log through `detail`.
    `retry_after_s` is set only where waiting helps. `details` is shown to the client too:
    numbers and choices a program can read.
    """

    status: ClassVar[int] = 500
    error_type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        details: Mapping[str, Any] | None = None,
        detail: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.details = details
        self.detail = detail
        self.retry_after_s = retry_after_s

    def again(self, *, retry_after_s: float | None = None) -> Self:
        """Return a fresh instance to raise elsewhere: a raised error keeps its traceback."""
        fresh = copy(self)  # leaves the traceback behind, and keeps what a subclass added
        if retry_after_s is not None:
            fresh.retry_after_s = retry_after_s
        return fresh


class InvalidRequest(GatewayError):
    """The request itself is wrong; asking again will not help."""

    status, error_type, code = 400, "invalid_request_error", "invalid_request"


class InvalidModelPath(GatewayError):
    """The model's name points outside the models directory, or cannot be a path at all."""

    status, error_type, code = 400, "invalid_request_error", "invalid_model_path"


class AmbiguousModel(GatewayError):
    """The name fits several models; `details["choices"]` lists them."""

    status, error_type, code = 400, "invalid_request_error", "ambiguous_model"


class InvalidModelFile(GatewayError):
    """The file exists but no engine could load it: empty, cut short, or another format."""

    status, error_type, code = 400, "invalid_request_error", "invalid_model_file"


class BackendUnavailable(GatewayError):
    """The backend is known but is not installed here, or cannot serve this kind of model."""

    status, error_type, code = 400, "invalid_request_error", "backend_unavailable"


class DeviceUnavailable(GatewayError):
    """No such device on this machine, and falling back is switched off."""

    status, error_type, code = 400, "invalid_request_error", "device_unavailable"


class UnsupportedByEngine(GatewayError):
    """The engine does not serve this call for this model."""

    status, error_type, code = 400, "invalid_request_error", "unsupported_by_engine"


class EngineNotInstalled(GatewayError):
    """The engine that serves this model is not on this machine; the message says how to get it."""

    status, error_type, code = 503, "server_error", "engine_not_installed"


class Unauthorized(GatewayError):
    """The API key is missing or wrong."""

    status, error_type, code = 401, "authentication_error", "invalid_api_key"


class Forbidden(GatewayError):
    """The Host or Origin of the request is not one this server answers to."""

    status, error_type, code = 403, "permission_error", "forbidden"


class NotFound(GatewayError):
    """No such address on this server."""

    status, error_type, code = 404, "invalid_request_error", "not_found"


class ModelNotFound(GatewayError):
    """No model by that name; the message holds near matches and where to look."""

    status, error_type, code = 404, "invalid_request_error", "model_not_found"


class ModelNotLoaded(GatewayError):
    """An unload named an engine that is not there."""

    status, error_type, code = 404, "invalid_request_error", "model_not_loaded"


class InvalidDestination(GatewayError):
    """A download's destination is no plain folder name inside the models directory."""

    status, error_type, code = 400, "invalid_request_error", "invalid_destination"


class NoSuchQuantization(GatewayError):
    """The repository has no such quantization; `details["choices"]` lists those it has."""

    status, error_type, code = 400, "invalid_request_error", "no_such_quantization"


class AmbiguousDownload(GatewayError):
    """Several models of the repository fit; `details["choices"]` lists them."""

    status, error_type, code = 400, "invalid_request_error", "ambiguous_download"


class NothingToDownload(GatewayError):
    """No file of the repository is wanted: none is a model's, or the patterns fit none."""

    status, error_type, code = 400, "invalid_request_error", "nothing_to_download"


class UnsafeRepository(GatewayError):
    """The repository's listing holds names that no folder may hold."""

    status, error_type, code = 400, "invalid_request_error", "unsafe_repository"


class DownloadOver(GatewayError):
    """The download has ended, so there is nothing to cancel, to pause or to resume."""

    status, error_type, code = 400, "invalid_request_error", "download_over"


class RepoGated(GatewayError):
    """The repository's owner lets only those in who asked; the message says how."""

    status, error_type, code = 403, "permission_error", "repo_gated"


class RepoForbidden(GatewayError):
    """The hub refuses this token, or nobody may have the repository any more."""

    status, error_type, code = 403, "permission_error", "repo_forbidden"


class RepoNotFound(GatewayError):
    """The hub has no such repository, or does not show it to this token."""

    status, error_type, code = 404, "invalid_request_error", "repo_not_found"


class RevisionNotFound(GatewayError):
    """The repository has no such branch, tag or commit."""

    status, error_type, code = 404, "invalid_request_error", "revision_not_found"


class DownloadNotFound(GatewayError):
    """There is no download of that id."""

    status, error_type, code = 404, "invalid_request_error", "download_not_found"


class ModelReadOnly(GatewayError):
    """The model lies in a further root, of which nothing is deleted."""

    status, error_type, code = 403, "permission_error", "model_read_only"


class ModelInUse(GatewayError):
    """The model is loaded or downloaded just now, so it cannot be deleted."""

    status, error_type, code = 409, "conflict_error", "model_in_use"


class DestinationOccupied(GatewayError):
    """The destination belongs to another download, or to another model."""

    status, error_type, code = 409, "conflict_error", "destination_occupied"


class HubUnreachable(GatewayError):
    """The hub does not answer, or not as a hub; later it may."""

    status, error_type, code = 503, "server_error", "hub_unreachable"


class ModelsDirUnusable(GatewayError):
    """Nothing can be written into the models directory."""

    status, error_type, code = 503, "server_error", "models_dir_unusable"


class InsufficientDisk(GatewayError):
    """The files do not fit the disk; `details` holds the numbers."""

    status, error_type, code = 507, "server_error", "insufficient_disk"


class MethodNotAllowed(GatewayError):
    """The address exists, the method does not. `allow` names the methods that do."""

    status, error_type, code = 405, "invalid_request_error", "method_not_allowed"

    def __init__(self, message: str, *, allow: str = "POST") -> None:
        super().__init__(message)
        self.allow = allow


class BodyTooLarge(GatewayError):
    """The body is over `max_body_bytes`."""

    status, error_type, code = 413, "invalid_request_error", "body_too_large"


class EngineRejected(GatewayError):
    """The engine's own 4xx, passed on with its status and its error object.

    `error` is what the engine said under `error`; the answer keeps all of it.
    """

    status, error_type, code = 400, "invalid_request_error", "engine_rejected"

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        error: Mapping[str, Any] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.status = status  # type: ignore[misc]  # the one class whose status is the engine's
        self.error = error or {}


class QueueFull(GatewayError):
    """As many requests wait already as `max_queue` allows."""

    status, error_type, code = 429, "rate_limit_error", "queue_full"


class EngineError(GatewayError):
    """The engine died or answered nonsense in the middle of a request."""

    status, error_type, code = 502, "server_error", "engine_error"


class EngineDied(GatewayError):
    """The engine says that it is about to end; the request was not served, the next one will be."""

    status, error_type, code = 502, "server_error", "engine_died"


class UpstreamUnreachable(GatewayError):
    """A configured upstream does not accept connections; the message names it."""

    status, error_type, code = 502, "server_error", "upstream_unreachable"


class UpstreamRedirects(GatewayError):
    """An upstream answers from another address; `detail` names its host. It is not followed."""

    status, error_type, code = 502, "server_error", "upstream_redirects"


class UpstreamNotAnApi(GatewayError):
    """What an upstream answered is a web page or the like: its address is another server's."""

    status, error_type, code = 502, "server_error", "upstream_not_an_api"


class UpstreamEmpty(GatewayError):
    """An upstream said that all is well, and then nothing else."""

    status, error_type, code = 502, "server_error", "upstream_error"


class UpstreamRefusesKey(GatewayError):
    """An upstream refuses the key the operator set for it, or wants one where none is set."""

    status, error_type, code = 502, "server_error", "upstream_refuses_key"


class UpstreamTimeout(GatewayError):
    """An upstream sent nothing for as long as `upstream_timeout_s`."""

    status, error_type, code = 504, "server_error", "upstream_timeout"


class EngineStartFailed(GatewayError):
    """The engine's process ended before it was ready; `detail` holds its last lines."""

    status, error_type, code = 503, "server_error", "engine_start_failed"


class InsufficientMemory(GatewayError):
    """The load does not fit the memory there is."""

    status, error_type, code = 503, "server_error", "insufficient_memory"


class LoadingTimeout(GatewayError):
    """The model did not become ready in the time this request may wait, or its load stalled."""

    status, error_type, code = 503, "server_error", "loading_timeout"


class QueueTimeout(GatewayError):
    """No engine's place became free in the time this request may wait."""

    status, error_type, code = 503, "server_error", "queue_timeout"


class EngineUnloaded(GatewayError):
    """The engine was unloaded by force while the request waited for it."""

    status, error_type, code = 503, "server_error", "engine_unloaded"


class ShuttingDown(GatewayError):
    """The gateway is ending and takes no new work."""

    status, error_type, code = 503, "server_error", "shutting_down"
