"""A hub on loopback that the real huggingface_hub client believes, with a CDN on another port.

    with Hub() as hub:
        hub.add_repo("org/name", {"config.json": b"{}", "m-Q4_0.gguf": ("random", 1 << 20, 7)})
        hub.fault("m-Q4_0.gguf", Cut(1000, reset=True), times=2)  # `times=None`: until healed

Metadata and small files come from the hub, files in LFS (`.gguf`, `.safetensors`, … or 10 MiB and
more) by a redirect to the CDN with a signature that expires. As at the real one, a missing or
private repository is 401 to strangers, a gated one's metadata is public, and a token that nobody
was given is refused everywhere (`hub.tokens` holds those that are known).

A fault's path is that in the repository, or `org/name/path`; "api" stands for every metadata call.

As a program it serves one big file: `python tests/fakes/hub.py --size 1GiB`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Self
from urllib.parse import quote

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.fakes.hub_body import Signatures
from tests.fakes.hub_content import Content, Repo
from tests.fakes.hub_faults import (
    HTML,
    Corrupt,
    Cut,
    Fault,
    Host,
    Html,
    IgnoreRange,
    NeedsRange,
    Refuse,
    Slow,
    Stall,
    WrongLength,
)
from tests.fakes.hub_server import Asked, Server

__all__ = [
    "HTML",
    "Asked",
    "Corrupt",
    "Cut",
    "Html",
    "Hub",
    "IgnoreRange",
    "NeedsRange",
    "Refuse",
    "Slow",
    "Stall",
    "WrongLength",
]


class Hub:
    """A hub and its CDN, both up from the start until the `with` block ends."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: set[str] = set()
        self.asked: list[Asked] = []
        self.page_entries = 1000  # of a tree; the rest is on further pages
        self.signatures = Signatures()
        self._faults: dict[str, list[tuple[Fault, int | None]]] = {}
        self._stalls: dict[str, list[Stall]] = {}
        self._served: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._hub = Server(self, "hub")
        self._cdn = Server(self, "cdn")
        self.up()

    @property
    def url(self) -> str:
        return f"http://{self.authority}"

    @property
    def cdn_url(self) -> str:
        return f"http://127.0.0.1:{self._cdn.port}"

    @property
    def authority(self) -> str:
        """Host and port: who may be told the token."""
        return f"127.0.0.1:{self._hub.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
        for repo in self.repos.values():
            repo.close()

    def down(self) -> None:
        """Cut every connection and refuse new ones."""
        for server in (self._hub, self._cdn):
            server.down()

    def up(self) -> None:
        """Listen again, at the same ports."""
        for server in (self._hub, self._cdn):
            server.up()

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, Content],
        *,
        gated: bool | str = False,
        private: bool = False,
        token: str | None = None,
        license: str | None = "apache-2.0",  # noqa: A002 - the hub's word
        revisions: Mapping[str, Mapping[str, Content]] | None = None,
    ) -> Repo:
        """Add a repository with these files on `main`, and others on further revisions.

        `token` may have it, if it is gated or private; None: nobody.
        """
        repo = Repo(repo_id, gated=gated, private=private, token=token, license=license)
        repo.push(files)
        for revision, other in (revisions or {}).items():
            repo.push(other, revision)
        self.repos[repo_id] = repo
        if token is not None:
            self.tokens.add(token)
        return repo

    def resolve_url(self, repo_id: str, path: str, revision: str = "main") -> str:
        return f"{self.url}/{repo_id}/resolve/{quote(revision, safe='')}/{quote(path)}"

    def fault(self, path: str, fault: Fault, times: int | None = 1) -> None:
        """Have this happen to the next so many answers about the path; None: to all of them."""
        with self._lock:
            self._faults.setdefault(path, []).append((fault, times))
            if isinstance(fault, Stall):
                self._stalls.setdefault(path, []).append(fault)

    def heal(self, path: str | None = None) -> None:
        """Take back what is left of a path's faults, or of all; who is stalled goes on."""
        with self._lock:
            for known in [path] if path is not None else {*self._faults, *self._stalls}:
                self._faults.pop(known, None)
                for stall in self._stalls.pop(known, []):
                    stall.released.set()

    def take_faults(self, repo_id: str, path: str, host: Host, *, body: bool) -> list[Fault]:
        """Return what happens to one answer; `body`: it is the one with the bytes."""
        with self._lock:
            taken: list[Fault] = []
            for key in (path, f"{repo_id}/{path}"):
                kept = []
                for fault, times in self._faults.get(key, []):
                    here = fault.host == host if isinstance(fault, Refuse) else body
                    one_at_a_time = isinstance(fault, Refuse) and any(
                        isinstance(other, Refuse) for other in taken
                    )
                    if here and not one_at_a_time:
                        taken.append(fault)
                        times = times if times is None else times - 1
                    if times != 0:
                        kept.append((fault, times))
                self._faults[key] = kept
            return taken

    def served_bytes(self, path: str | None = None, repo_id: str | None = None) -> int:
        """Count the body bytes that left for a file, or for all; those in flight are in it."""
        with self._lock:
            if path is None:
                return self._served["*"]
            return self._served[path if repo_id is None else f"{repo_id}/{path}"]

    def count_served(self, repo_id: str, path: str, size: int) -> None:
        with self._lock:
            for key in (path, f"{repo_id}/{path}", "*"):
                self._served[key] += size

    def requests(self, path: str | None = None, host: Host | None = None) -> list[Asked]:
        """List what was asked for, of one file or at one host."""
        return [
            asked
            for asked in list(self.asked)
            if (path is None or asked.file == path) and (host is None or asked.host == host)
        ]

    def authorizations(self, host: Host) -> set[str]:
        """Every `Authorization` header this host was ever told."""
        told = (asked.authorization for asked in self.requests(host=host))
        return {header for header in told if header is not None}


def main() -> None:
    """Serve one repository until stdin ends."""
    parser = argparse.ArgumentParser(description="A fake hub with one big file, from memory.")
    parser.add_argument("--size", default="1GiB", help="of the file: bytes, MiB or GiB")
    parser.add_argument("--repo", default="bench/big")
    parser.add_argument("--file", default="big-Q4_0.gguf")
    options = parser.parse_args()
    units = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10, "": 1}
    number, unit = re.fullmatch(r"(\d+)\s*([KMG]iB)?", options.size).groups("")  # type: ignore[union-attr]
    with Hub() as hub:
        repo = hub.add_repo(
            options.repo,
            {options.file: ("random", int(number) * units[unit], 1), "README.md": b"#"},
        )
        file = repo.revisions["main"].files[options.file]
        told = {
            "url": hub.url,
            "cdn_url": hub.cdn_url,
            "repo_id": repo.id,
            "commit": repo.revisions["main"].sha,
            "path": file.path,
            "size": file.size,
            "sha256": file.blob.sha256,
            "file_url": hub.resolve_url(repo.id, file.path),
        }
        print(json.dumps(told), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
