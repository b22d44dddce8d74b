"""What the hub tells of a repository. The only user of huggingface_hub.

The library is for metadata, errors and their classes; bytes are the mover's.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import urlsplit

from xandrouting.core.errors import (
    GatewayError,
    HubUnreachable,
    InvalidRequest,
    RepoForbidden,
    RepoGated,
    RepoNotFound,
    RevisionNotFound,
)
from xandrouting.downloads.jobs import Package, RemoteFile
from xandrouting.downloads.mover_proxies import UnusableProxy, proxy_before
from xandrouting.downloads.urls import is_repo_id

if TYPE_CHECKING:  # the library takes 0.3 s and 30 MB: it is loaded when it is used
    import huggingface_hub
    from huggingface_hub.hf_api import RepoFile

log = logging.getLogger(__name__)

CALL_TIMEOUT_S: Final = 10.0  # the library itself would wait for ever
LOOK_TIMEOUT_S: Final = 25.0  # both calls together, however slowly their bytes come
MAX_LOOKS: Final = 4  # at once
MAX_FILES: Final = 100_000  # of a repository
RETRY_S: Final = 30.0  # when a hub that says nothing may be asked again
MAX_RETRY_S: Final = 3600.0  # what is passed on of a hub that wants more

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_TOO_LARGE: Final = 1 << 50
_LOOPBACK: Final = ("127.0.0.1", "localhost", "[::1]")
_CLIENT_LOCK: Final = threading.Lock()
_client_is_ours: Final = threading.Event()  # a later call would close what others use

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository of models as it is at one commit. `license` is None where it says none.

    `package` has its only file, where the hub could not be asked.
    """

    repo_id: str
    commit: str
    files: tuple[RemoteFile, ...]
    gated: bool = False
    private: bool = False
    license: str | None = None
    package: Package | None = None


class Hub:
    """Asks one hub, at `endpoint`, with one token or none."""

    def __init__(self, endpoint: str, token: str | None = None) -> None:
        self.endpoint = endpoint.rstrip("/")
        self._token = token
        self._turn = asyncio.Semaphore(MAX_LOOKS)

    async def look(self, repo_id: str, revision: str | None) -> Repository:
        """Return the repository as it is now. It asks once and tries nothing again.

        Raises:
            RepoNotFound: there is none, or it is private.
            RevisionNotFound: it has no such revision.
            RepoGated: its terms must be accepted first.
            RepoForbidden: the token is refused, or the repository is closed.
            HubUnreachable: the hub does not answer, or not as a hub.
        """
        look = functools.partial(_look, self.endpoint, self._token, repo_id, revision)
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S), self._turn:
                return await _in_thread(look)
        except TimeoutError:
            raise self._unreachable("it is too slow") from None
        except GatewayError:
            raise
        except _Unreachable as error:
            raise self._unreachable(str(error), error.retry_after_s) from error

    def _unreachable(self, why: str, retry_after_s: float = RETRY_S) -> HubUnreachable:
        host = urlsplit(self.endpoint).netloc.rpartition("@")[2]
        return HubUnreachable(
            f"The hub at {host} cannot be asked: {why}. Check the network and HF_ENDPOINT, and "
            "try again.",
            retry_after_s=retry_after_s,
        )


class _Unreachable(Exception):
    def __init__(self, why: str, retry_after_s: float = RETRY_S) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s


async def _in_thread(call: Callable[[], T]) -> T:
    """Run `call` in a thread that the end of the process does not wait for.

    One of a pool would be waited for, and a hub that hangs could hold the end up.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, failure = None, None
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
            failure = error
        try:
            loop.call_soon_threadsafe(tell, result, failure)
        except RuntimeError:  # the loop has ended meanwhile
            log.debug("hub answered too late")

    threading.Thread(target=run, name="hub", daemon=True).start()
    return await done


def _look(endpoint: str, token: str | None, repo_id: str, revision: str | None) -> Repository:
    import httpx2
    from huggingface_hub import constants, errors

    if constants.is_offline_mode():
        raise _Unreachable("HF_HUB_OFFLINE is set")
    proxy = _proxy_before(endpoint)
    behind = "" if proxy is None else f" through the proxy at {proxy}"
    try:
        api = _api(endpoint, token)
        _check_access(api, repo_id)
        info = api.model_info(
            repo_id, revision=revision, files_metadata=True, timeout=CALL_TIMEOUT_S
        )
        return _repository(repo_id, info, _files(api, repo_id, info))
    except errors.HfHubHTTPError as error:
        if proxy is not None and error.response.status_code == 407:
            why = f"the proxy at {proxy} wants a user name and password that it knows (407)"
            raise _Unreachable(why) from error
        raise _in_our_words(error, endpoint, repo_id, revision, has_token=bool(token)) from error
    except httpx2.TimeoutException as error:
        raise _Unreachable(f"no answer in {CALL_TIMEOUT_S:.0f} s{behind}") from error
    except ImportError as error:  # the client is made for every proxy there is, used or not
        raise _Unreachable("ALL_PROXY names a SOCKS proxy: set it to an http:// one") from error
    except httpx2.ProxyError as error:  # its answer to CONNECT
        raise _Unreachable(f"the proxy at {proxy} refuses ({error})") from error
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        raise _Unreachable(f"no connection{behind}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # Whatever the library makes of an answer that is none of a hub.
        raise _Unreachable("it does not answer as a hub does") from error


def _proxy_before(endpoint: str) -> str | None:
    """Return the name of the proxy that the hub is behind, for bytes too."""
    try:
        proxy = proxy_before(urlsplit(endpoint))
    except UnusableProxy as error:
        raise _Unreachable(str(error)) from None
    return None if proxy is None else proxy.name


@functools.cache
def _api(endpoint: str, token: str | None) -> huggingface_hub.HfApi:
    from huggingface_hub import HfApi

    _use_our_client()
    return HfApi(endpoint=endpoint, token=token or False, library_name="xandrouting")


def _use_our_client() -> None:
    """Have the library make its calls with a client of ours: one that does not wait for ever."""
    import httpx2
    from huggingface_hub import constants, set_client_factory

    class Client(httpx2.Client):
        """One that may be closed in a forked child, where the library closes it.

        Its lock may be held there by a thread that stayed behind. The child would wait for it
        before it becomes another program, and the event loop for the child, both for ever.
        """

        def __init__(self) -> None:
            # A hub on this machine is not behind a proxy.
            direct = dict.fromkeys(f"all://{host}" for host in _LOOPBACK)
            super().__init__(follow_redirects=True, timeout=CALL_TIMEOUT_S, mounts=direct)
            self._pid = os.getpid()

        def close(self) -> None:
            if self._pid == os.getpid():
                super().close()

    with _CLIENT_LOCK:
        if not _client_is_ours.is_set():
            logging.getLogger("httpx2").setLevel(logging.WARNING)  # else a line for each call
            # Else it asks huggingface.co, whatever the endpoint, how to tell who runs us.
            constants.HF_HUB_DISABLE_TELEMETRY = True
            set_client_factory(Client)
            _client_is_ours.set()


def _check_access(api: huggingface_hub.HfApi, repo_id: str) -> None:
    """Ask whether its files may be had: what a gated repository is, everybody may know."""
    from huggingface_hub import errors

    try:
        api.auth_check(repo_id)
    except errors.GatedRepoError:
        raise
    except errors.RepositoryNotFoundError:
        pass  # whether there is one, the next call tells: olah says this of the call itself
    except errors.HfHubHTTPError as error:
        if error.response.status_code != 404:
            raise
        # A mirror that does not know the call; the mover will be told.


def _in_our_words(
    error: huggingface_hub.errors.HfHubHTTPError,
    endpoint: str,
    repo_id: str,
    revision: str | None,
    *,
    has_token: bool,
) -> Exception:
    # The order matters: a gated repository is a kind of one that is not found.
    from huggingface_hub import errors

    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        then = (
            "the account of HF_TOKEN has no access yet"
            if has_token
            else "then set HF_TOKEN to a token of your account"
        )
        return RepoGated(
            f"{repo_id} is gated: accept its terms at {endpoint}/{repo_id}; {then}.", param="url"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return RevisionNotFound(
            f"{repo_id} has no revision {(revision or 'main')[:100]!r}.", param="revision"
        )
    if isinstance(error, errors.DisabledRepoError):
        return RepoForbidden(f"{repo_id} was disabled on the hub.", param="url")
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        private = (
            "or the account of HF_TOKEN may not see it"
            if has_token
            else "or it is private and needs HF_TOKEN"
        )
        return RepoNotFound(
            f"There is no model {repo_id} on the hub, {private}. Check its spelling.", param="url"
        )
    if status in (401, 403):
        which = (
            "the token in HF_TOKEN: check it, and what it may read"
            if has_token
            else "a request without a token: set HF_TOKEN"
        )
        return RepoForbidden(f"The hub refuses {which} ({repo_id}).", param="url")
    if status == 400:
        return InvalidRequest(f"The hub refuses to tell of {repo_id}.", param="url")
    said = error.response.headers.get("retry-after", "")
    retry_after_s = min(float(said), MAX_RETRY_S) if said.isdecimal() else RETRY_S
    return _Unreachable(f"it answers {status}", retry_after_s)


def _files(
    api: huggingface_hub.HfApi, repo_id: str, info: huggingface_hub.ModelInfo
) -> tuple[RemoteFile, ...]:
    """Return what a repository holds, each file with its size and its hash.

    Raises:
        ValueError: they are not told, or there are too many.
    """
    from huggingface_hub.hf_api import RepoFile

    siblings = info.siblings or ()
    if all(one.size is not None for one in siblings):
        return tuple(_file(str(one.rfilename), one) for one in siblings)
    # A mirror that tells the names alone, as olah does. The listing itself tells all of it.
    found = []
    for entry in api.list_repo_tree(repo_id, recursive=True, revision=info.sha):
        if isinstance(entry, RepoFile):
            found.append(_file(str(entry.path), entry))
        if len(found) > MAX_FILES:
            raise ValueError("too many files")
    return tuple(found)


def _repository(
    asked: str, info: huggingface_hub.ModelInfo, files: tuple[RemoteFile, ...]
) -> Repository:
    """Take what is needed, and nothing that is not what it should be.

    Raises:
        ValueError: something is not.
    """
    if not _COMMIT.fullmatch(info.sha or ""):
        raise ValueError("no commit")
    license_name = getattr(info.card_data, "license", None)
    if not isinstance(license_name, str):
        named = [tag for tag in info.tags or () if str(tag).startswith("license:")]
        license_name = named[0].removeprefix("license:") if named else None
    return Repository(
        repo_id=info.id if is_repo_id(info.id) else asked,
        commit=info.sha or "",
        files=files,
        gated=bool(info.gated),
        private=bool(info.private),
        license=license_name,
    )


def _file(path: str, told: huggingface_hub.hf_api.RepoSibling | RepoFile) -> RemoteFile:
    lfs = told.lfs
    size = told.size if lfs is None else lfs.size
    sha256 = None if lfs is None else lfs.sha256
    blob_id = told.blob_id if lfs is None else None
    hashed = _SHA256.fullmatch(sha256) if sha256 is not None else _COMMIT.fullmatch(blob_id or "")
    if hashed is None or size is None or not 0 <= index(size) < _TOO_LARGE:
        raise ValueError("a file without size or hash")
    return RemoteFile(path, size, sha256, blob_id)
