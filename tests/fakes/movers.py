"""The mover as a test drives it: its order made from a fake hub, its process, its events."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.fakes.hub import Hub
from tests.waiting import wait_for
from xandrouting.downloads.courier import MOVER

MANIFEST = ".xandrouting.json"
REPO = "org/name"


def order_for(
    hub: Hub, models: Path, repo_id: str = REPO, *, job: str = "job", **changes: Any
) -> dict[str, Any]:
    """Order all files of a repository's `main` into `models/name`, with short waits."""
    commit = hub.repos[repo_id].revisions["main"]
    folder = models / ".incoming" / job
    files = [
        {
            "path": file.path,
            "url": hub.resolve_url(repo_id, file.path, commit.sha),
            "size": file.size,
            "sha256": file.blob.sha256 if file.lfs else None,
            "blob_id": None if file.lfs else file.blob_id,
        }
        for file in commit.files.values()
    ]
    order = {
        "files": files,
        "parts": str(folder / ".parts"),
        "stage": str(folder / "tree"),
        "target": str(models / repo_id.partition("/")[2]),
        "manifest": {"repo_id": repo_id, "commit": commit.sha, "files": files},
        "merge": False,
        "replace": [],
        "token_hosts": [hub.authority],
        "parallel": 4,
        "window_bytes": 512 << 20,
        "stall_s": 20,
        "report_s": 0.05,
    }
    return order | changes


class Mover:
    """A mover's process, with what it has said so far."""

    def __init__(
        self,
        order: Mapping[str, Any],
        token: str | None = None,
        *,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        env = env or {"PATH": os.environ["PATH"]}
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-I", "-S", str(MOVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env if token is None else {**env, "HF_TOKEN": token},
        )
        self.events: list[dict[str, Any]] = []
        self.stderr = b""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()
        self._threads = [threading.Thread(target=self._hear), threading.Thread(target=self._mind)]
        for thread in self._threads:
            thread.start()

    def _hear(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip():
                self.events.append(json.loads(line))

    def _mind(self) -> None:
        assert self.process.stderr is not None
        self.stderr = self.process.stderr.read()

    def wait(self, timeout_s: float = 60.0) -> int:
        """Wait for its end; return the exit status."""
        status = self.process.wait(timeout_s)
        for thread in self._threads:
            thread.join(5)
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()

    def named(self, event: str) -> list[dict[str, Any]]:
        return [said for said in list(self.events) if said["event"] == event]

    @property
    def done(self) -> dict[str, int]:
        """Bytes on the disk, as it said last."""
        progress = self.named("progress")
        return dict(progress[-1]["done"]) if progress else {}

    @property
    def fetched(self) -> int:
        progress = self.named("progress")
        return int(progress[-1]["fetched"]) if progress else 0

    @property
    def failure(self) -> dict[str, Any] | None:
        failed = self.named("failed")
        return failed[-1] if failed else None

    @property
    def alive(self) -> bool:
        return psutil.Process(self.process.pid).status() != psutil.STATUS_ZOMBIE

    def until_bytes(self, size: int, timeout_s: float = 20.0) -> None:
        """Wait until it has said that so many bytes are on the disk."""
        wait_for(lambda: sum(self.done.values()) >= size, timeout_s)


@contextmanager
def mover(order: Mapping[str, Any], token: str | None = None, **options: Any) -> Iterator[Mover]:
    running = Mover(order, token, **options)
    try:
        yield running
    finally:
        running.close()


def run_mover(order: Mapping[str, Any], token: str | None = None) -> Mover:
    """Run one to its end."""
    with mover(order, token) as running:
        running.wait()
    assert running.stderr == b""
    return running


def waits(said: Mover) -> list[float]:
    """How long it waited before each further try."""
    return [event["seconds"] for event in said.named("waiting")]


def assert_published(hub: Hub, order: Mapping[str, Any], repo_id: str = REPO) -> None:
    """Assert that the target is exactly the repository and the manifest, and nothing is left."""
    target = Path(order["target"])
    files = hub.repos[repo_id].revisions["main"].files
    there = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert there == {*files, MANIFEST}
    for path, file in files.items():
        assert (target / path).read_bytes() == file.blob.read(0, file.blob.size), path
    assert json.loads((target / MANIFEST).read_text()) == order["manifest"]
    assert not Path(order["parts"]).parent.exists()


def part_sizes(order: Mapping[str, Any]) -> dict[str, int]:
    """What lies in the parts, by the files' paths."""
    sizes = {}
    for file in order["files"]:
        part = Path(order["parts"]) / (file["sha256"] or file["blob_id"])
        sizes[file["path"]] = part.stat().st_size if part.exists() else 0
    return sizes
