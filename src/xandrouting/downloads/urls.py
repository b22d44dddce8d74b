"""What an asked `url` names: a repository of the hub, and what of it. Nothing is looked up."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit

from xandrouting.core.errors import InvalidRequest

HUB_HOSTS: Final = frozenset(("huggingface.co", "www.huggingface.co", "hf.co"))
MAX_LENGTH: Final = 2048

_PORTS: Final = {"http": 80, "https": 443}
# Whitespace and control characters are dropped by some readers of URLs and not by others.
_UNCLEAN: Final = re.compile(r"[\\\x00-\x20\x7f-\xa0\ud800-\udfff]")
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_NAME: Final = re.compile(r"\b[\w.-]{1,96}\b", re.ASCII)
_QUANTIZATION: Final = re.compile(r"[\w.-]{1,200}", re.ASCII)
_FILES: Final = frozenset(("tree", "blob", "resolve", "raw"))
_OTHER_REPOSITORIES: Final = frozenset(("datasets", "spaces", "kernels", "buckets"))
_OTHER_PAGES: Final = frozenset(
    ("api", "blog", "collections", "docs", "models", "organizations", "papers", "posts", "settings")
)
_REFS: Final = frozenset(("pr", "convert"))
_LATEST: Final = "latest"  # how Ollama and llama.cpp spell that none is asked for
_HOW: Final = "Write org/name, org/name:QUANTIZATION, or the address of its page on the hub."


@dataclass(frozen=True, slots=True)
class Asked:
    """A repository, and what of it. None: not said.

    `file` is one file of it, `folder` one folder; at most one of the two is there.
    """

    repo_id: str
    revision: str | None = None
    file: str | None = None
    folder: str | None = None
    quantization: str | None = None


def parse(url: str, endpoint: str) -> Asked:
    """Return what `url` asks for. `endpoint` is the hub that bytes come from.

    Raises:
        InvalidRequest: it is no repository of models on a hub; the message says why.
    """
    text = url.strip()
    if not text:
        raise _invalid(f"The url is empty. {_HOW}")
    if len(text) > MAX_LENGTH:
        raise _invalid(f"The url has more than {MAX_LENGTH} characters. {_HOW}")
    if _UNCLEAN.search(text):
        raise _invalid(f"The url has a space, a backslash or a control character in it. {_HOW}")
    hub = urlsplit(endpoint)
    if _SCHEME.match(text) is None:
        host = text.partition("/")[0].lower()
        if host not in HUB_HOSTS and host != hub.netloc.lower():
            return _plain(text)
        text = f"{hub.scheme if host == hub.netloc.lower() else 'https'}://{text}"
    try:
        parts = urlsplit(text)
        _check_host(parts, hub)
    except ValueError:
        raise _invalid(f"The url cannot be read. {_HOW}") from None
    return _of_path(_path_of(parts, hub))


def check_revision(revision: str) -> str:
    """Return `revision` if it can be a branch, a tag or a commit.

    Raises:
        InvalidRequest: it cannot.
    """
    clean = _UNCLEAN.search(revision) is None and ".." not in revision
    if not clean or not 0 < len(revision) <= 200 or revision.strip("/") != revision:
        raise InvalidRequest(
            "revision: a branch, a tag or a commit of the repository is wanted.", param="revision"
        )
    return revision


def is_repo_id(text: str) -> bool:
    """Whether the hub would take `text` for a repository's id, `name` or `org/name`."""
    parts = text.split("/")
    return (
        len(parts) <= 2
        and all(_NAME.fullmatch(part) for part in parts)
        and not any(bad in text for bad in ("--", ".."))
        and not text.endswith(".git")
    )


def _plain(text: str) -> Asked:
    """Read `org/name[:QUANTIZATION]`."""
    name, colon, quantization = text.partition(":")
    if name.count("/") != 1:
        raise _invalid(f"{text[:100]!r} is no repository. {_HOW}")
    _check_kind(name.split("/"))
    return _quantized(Asked(_repo_id(name)), quantization if colon else None)


def _check_host(parts: SplitResult, hub: SplitResult) -> None:
    """Refuse what is no hub of ours.

    Raises:
        InvalidRequest: it says what is wrong with it.
        ValueError: the port is none.
    """
    if parts.scheme not in _PORTS:
        raise _invalid(f"A url begins with https://, not with {parts.scheme[:20]}:. {_HOW}")
    if "@" in parts.netloc:
        raise _invalid(
            "The url holds a user name or a password. Leave it away; set HF_TOKEN for repositories "
            "that want a token."
        )
    host, port = (parts.hostname or "").lower(), parts.port or _PORTS[parts.scheme]
    if (host, port) == ((hub.hostname or "").lower(), hub.port or _PORTS.get(hub.scheme, 0)):
        return
    if host not in HUB_HOSTS:
        raise _invalid(
            f"{host[:100] or 'That'} is not the hub. Models come from huggingface.co, or from the "
            "hub that HF_ENDPOINT names."
        )
    if parts.scheme != "https" or port != _PORTS["https"]:
        raise _invalid(f"Write https://{host}/….")


def _path_of(parts: SplitResult, hub: SplitResult) -> list[str]:
    """Return the path's parts, decoded, without what leads to the hub itself."""
    names = [unquote(part) for part in parts.path.split("/") if part]
    prefix = [part for part in hub.path.split("/") if part]
    if prefix and parts.netloc.lower() == hub.netloc.lower():
        if names[: len(prefix)] != prefix:
            raise _invalid(f"The url is not of the hub that HF_ENDPOINT names. {_HOW}")
        names = names[len(prefix) :]
    if any(name in (".", "..") or _UNCLEAN.search(name.replace(" ", "")) for name in names):
        raise _invalid(f"The url's path is not that of a repository. {_HOW}")
    return names


def _of_path(names: Sequence[str]) -> Asked:
    if not names:
        raise _invalid(f"The url names the hub and no repository. {_HOW}")
    _check_kind(names)
    # Some old repositories have no organization: gpt2, and gpt2/tree/main.
    alone = len(names) == 1 or (len(names) > 2 and names[1] in _FILES)
    split = 1 if alone else 2
    name, rest = "/".join(names[:split]), names[split:]
    name, colon, quantization = name.partition(":")
    asked = Asked(_repo_id(name))
    if rest:
        asked = _below(asked, rest)
    return _quantized(asked, quantization if colon else None)


def _below(asked: Asked, rest: Sequence[str]) -> Asked:
    view, rest = rest[0], rest[1:]
    if view not in _FILES:
        raise _invalid(f"The url is a page of {asked.repo_id}, but not of its files. {_HOW}")
    if not rest:
        return asked
    taken = 3 if rest[0] == "refs" and len(rest) > 2 and rest[1] in _REFS else 1
    path = "/".join(rest[taken:])
    asked = replace(asked, revision=check_revision("/".join(rest[:taken])))
    if view == "tree":
        return replace(asked, folder=path or None)
    if not path:
        raise _invalid(f"The url says {view} and no file. {_HOW}")
    return replace(asked, file=path)


def _check_kind(names: Sequence[str]) -> None:
    if names[0] in _OTHER_REPOSITORIES:
        raise _invalid(f"The url is one of the hub's {names[0]}; only models can be downloaded.")
    if names[0] in _OTHER_PAGES:
        raise _invalid(f"The url is a page of the hub and no repository. {_HOW}")


def _repo_id(text: str) -> str:
    if not is_repo_id(text):
        raise _invalid(
            f"{text[:100]!r} cannot be a repository: each part has up to 96 letters, digits, '-', "
            "'_' and '.', begins and ends with a letter or digit, and has no '--' or '..' in it."
        )
    return text


def _quantized(asked: Asked, quantization: str | None) -> Asked:
    if quantization is None or quantization == _LATEST:
        return asked
    if not _QUANTIZATION.fullmatch(quantization):
        raise _invalid("Behind the colon stands a quantization, as in org/name:Q4_K_M.")
    return replace(asked, quantization=quantization)


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="url")
