"""Repositories of a fake hub: their files in memory, with true hashes."""

from __future__ import annotations

import hashlib
import os
import random
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

Content = bytes | tuple[str, int, int]
"""What a file holds: these bytes, or ("random", size, seed), the same for the same three."""

_BLOCK_BYTES = 1 << 20
_IN_LFS = (".gguf", ".safetensors", ".bin", ".pt", ".onnx")
_LFS_FROM_BYTES = 10 << 20  # smaller files are in git itself, unless by their name


@dataclass
class Blob:
    """A file's content, in memory without a name, so that it can be sent without reading it."""

    size: int
    fd: int
    sha256: str
    git: str  # the id of an object that holds the content itself

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self.fd, size, offset)


def random_bytes(size: int, seed: int) -> bytes:
    """Return what a file of ("random", size, seed) holds."""
    return b"".join(_random_blocks(size, seed))


def _random_blocks(size: int, seed: int) -> list[bytes]:
    block = random.Random(seed).randbytes(_BLOCK_BYTES)
    count = -(-size // _BLOCK_BYTES)
    blocks = [index.to_bytes(8, "big") + block[8:] for index in range(count)]
    if blocks:
        blocks[-1] = blocks[-1][: size - (count - 1) * _BLOCK_BYTES]
    return blocks


def _in_memory() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("hub")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def blob_of(content: Content) -> Blob:
    fd = _in_memory()
    if isinstance(content, bytes):
        size, blocks = len(content), [content]
    else:
        _, size, seed = content
        blocks = _random_blocks(size, seed)
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    with open(fd, "wb", closefd=False) as file:
        for block in blocks:
            file.write(block)
            sha256.update(block)
            git.update(block)
    return Blob(size, fd, sha256.hexdigest(), git.hexdigest())


@dataclass
class File:
    """One file of a repository. What the listing says of it can be overridden for a lie."""

    path: str
    blob: Blob
    size: int

    @property
    def lfs(self) -> bool:
        return self.path.endswith(_IN_LFS) or self.blob.size >= _LFS_FROM_BYTES

    @cached_property
    def pointer(self) -> bytes:
        text = (
            "version https://git-lfs.github.com/spec/v1\n"
            f"oid sha256:{self.blob.sha256}\nsize {self.size}\n"
        )
        return text.encode()

    @cached_property
    def blob_id(self) -> str:
        """The id of git's object: in LFS that holds only the pointer."""
        if not self.lfs:
            return self.blob.git
        return hashlib.sha1(b"blob %d\0" % len(self.pointer) + self.pointer).hexdigest()

    @property
    def etag(self) -> str:
        return self.blob.sha256 if self.lfs else self.blob.git

    def sibling(self, *, blobs: bool) -> dict[str, Any]:
        """As `model_info` lists it."""
        if not blobs:
            return {"rfilename": self.path}
        told = {"rfilename": self.path, "size": self.size, "blobId": self.blob_id}
        if self.lfs:
            sizes = {"size": self.size, "pointerSize": len(self.pointer)}
            told["lfs"] = {"sha256": self.blob.sha256, **sizes}
        return told

    def entry(self) -> dict[str, Any]:
        """As `tree` lists it."""
        told = {"type": "file", "oid": self.blob_id, "size": self.size, "path": self.path}
        if self.lfs:
            sizes = {"size": self.size, "pointerSize": len(self.pointer)}
            told["lfs"] = {"oid": self.blob.sha256, **sizes}
        return told


@dataclass
class Commit:
    """A repository's files at one moment."""

    sha: str
    files: dict[str, File]

    def entries(self) -> list[dict[str, Any]]:
        """Files and folders, as `tree` lists them."""
        folders = {
            path[:index] for path in self.files for index, char in enumerate(path) if char == "/"
        }
        told = [
            {
                "type": "directory",
                "path": path,
                "size": 0,
                "oid": hashlib.sha1(path.encode()).hexdigest(),
            }
            for path in folders
        ]
        told += [file.entry() for file in self.files.values()]
        return sorted(told, key=lambda entry: str(entry["path"]))


@dataclass
class Repo:
    """One repository: who may have it, and its commits by revision and by hash."""

    id: str
    gated: bool | str = False
    private: bool = False
    token: str | None = None  # that may have it; None: whoever asks, or nobody if it is gated
    license: str | None = "apache-2.0"
    revisions: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def push(self, files: Mapping[str, Content], revision: str = "main") -> Commit:
        """Make these files what the revision is; earlier commits stay where they are."""
        made = {}
        for path, content in files.items():
            blob = blob_of(content)
            made[path] = File(path, blob, blob.size)
        listing = sorted((path, file.blob_id) for path, file in made.items())
        nth = len(self.commits)
        sha = hashlib.sha1(repr((self.id, nth, listing)).encode()).hexdigest()
        commit = Commit(sha, made)
        self.revisions[revision] = self.commits[sha] = commit
        return commit

    def find(self, revision: str) -> Commit | None:
        return self.revisions.get(revision) or self.commits.get(revision)

    def close(self) -> None:
        for commit in self.commits.values():
            for file in commit.files.values():
                os.close(file.blob.fd)
