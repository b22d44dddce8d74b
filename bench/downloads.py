"""Downloads from a hub on loopback into memory: how fast, against curl and `hf download`."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import llm, stage
from bench.processes import TICKS_PER_S, BenchError, running
from bench.stage import Effort
from bench.table import Row, show

SIZE_BYTES = 1_000_000_000
MEMORY = "/dev/shm"
CALL = "/v1/models/download"
HF = str(Path(sys.executable).with_name("hf"))
NICENESS = 10  # the mover's own, so that other work on this machine costs all of them the same
ASK_EVERY_S = 0.05


@dataclass(frozen=True)
class Took:
    """One download: from the first word to the file that is there, and the CPU of the client."""

    seconds: float
    cpu_s: float


def download(effort: Effort) -> list[Row]:
    seen: dict[str, list[Took]] = {"gateway": [], "curl": [], "hf": []}
    with hub_program() as hub, memory_folder() as folder:
        models = folder / "models"
        models.mkdir()
        with stage.gateway("--models-dir", str(models), "--hf-endpoint", hub["url"]) as gateway:
            for number in range(effort.rounds):
                seen["curl"].append(_by_curl(hub, folder))
                seen["gateway"].append(_by_gateway(gateway, hub, models, f"m{number}"))
                seen["hf"].append(_by_hf(hub, folder))
    speed = {name: SIZE_BYTES / 1e6 / _median(took, "seconds") for name, took in seen.items()}
    cpu_s = {name: _median(took, "cpu_s") * 1e9 / SIZE_BYTES for name, took in seen.items()}
    to = {
        name: statistics.median(
            other.seconds / ours.seconds
            for ours, other in zip(seen["gateway"], seen[name], strict=True)
        )
        for name in ("curl", "hf")
    }
    hf_start_s = _start_of_hf()
    return [
        Row(
            "download of 1 GB to memory, hash included, to curl without",
            to["curl"],
            "x",
            0.7,
            at_least=True,
            gateway=show(speed["gateway"], "MB/s"),
            direct=show(speed["curl"], "MB/s"),
            note=f"CPU: {show(cpu_s['gateway'], 's/GB')} of the gateway and its mover, "
            f"{show(cpu_s['curl'], 's/GB')} of curl. All at niceness {NICENESS}; {_spread(seen)}",
        ),
        Row(
            "download of 1 GB to memory, hash included, to `hf download`",
            to["hf"],
            "x",
            1.3,
            at_least=True,
            gateway=show(speed["gateway"], "MB/s"),
            direct=show(speed["hf"], "MB/s"),
            note=f"CPU: {show(cpu_s['hf'], 's/GB')} of hf; `hf version` alone takes "
            f"{show(hf_start_s, 's')}, which is in its time",
        ),
        Row("CPU of a download, gateway and mover", cpu_s["gateway"], "s/GB"),
    ]


@contextlib.contextmanager
def hub_program(size_bytes: int = SIZE_BYTES) -> Iterator[Mapping[str, Any]]:
    """Run a hub with one big file in a process of its own; yield what it says of itself."""
    with running([sys.executable, "tests/fakes/hub.py", "--size", str(size_bytes)]) as process:
        yield json.loads(process.line())


@contextlib.contextmanager
def memory_folder() -> Iterator[Path]:
    """Make a folder on tmpfs."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=MEMORY) as folder:
        yield Path(folder)


def begin(port: int, repo_id: str, destination: str) -> str:
    """Begin a download; return the job's id."""
    body = {"url": repo_id, "destination": destination}
    return str(llm.call(port, "POST", CALL, body)["job_id"])


def wait_until_complete(port: int, job_id: str, timeout_s: float = 120.0) -> dict[str, Any]:
    """Wait for the end of a job; return it."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        job = llm.call(port, "GET", f"{CALL}/{job_id}")
        if job["status"] == "completed":
            return dict(job)
        if job["status"] in ("failed", "cancelled", "paused"):
            raise BenchError(f"the download is {job['status']}: {job['error']}")
        time.sleep(ASK_EVERY_S)
    raise BenchError("the download did not end")


def _by_gateway(
    gateway: stage.Contender, hub: Mapping[str, Any], models: Path, destination: str
) -> Took:
    cpu_s, began = _with_children_s(gateway.pid), time.monotonic()
    wait_until_complete(gateway.port, begin(gateway.port, hub["repo_id"], destination))
    took = Took(time.monotonic() - began, _with_children_s(gateway.pid) - cpu_s)
    file = models / destination / hub["path"]
    _check(file, hub)
    file.unlink()
    return took


def _by_curl(hub: Mapping[str, Any], folder: Path) -> Took:
    file = folder / "by-curl"
    took = _run(["curl", "--silent", "--fail", "--location", "-o", str(file), hub["file_url"]])
    _check(file, hub)
    file.unlink()
    return took


def _by_hf(hub: Mapping[str, Any], folder: Path) -> Took:
    with tempfile.TemporaryDirectory(dir=folder) as home:
        env = {"HF_ENDPOINT": hub["url"], "HF_HOME": home, "HF_HUB_DISABLE_TELEMETRY": "1"}
        there = Path(home, "there")
        took = _run([HF, "download", hub["repo_id"], "--local-dir", str(there)], env)
        _check(there / hub["path"], hub)
    return took


def _start_of_hf() -> float:
    return statistics.median(_run([HF, "version"]).seconds for _ in range(3))


def _check(file: Path, hub: Mapping[str, Any]) -> None:
    if file.stat().st_size != hub["size"]:
        raise BenchError(f"{file} has {file.stat().st_size} bytes")


def _run(argv: Sequence[str], env: Mapping[str, str] | None = None) -> Took:
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    ended = subprocess.run(
        argv,
        capture_output=True,
        check=False,
        env={**os.environ, **(env or {})},
        preexec_fn=_step_back,
    )
    seconds = time.monotonic() - began
    if ended.returncode != 0:
        raise BenchError(f"{argv[0]} failed: {ended.stderr[-300:]!r}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Took(seconds, cpu_s)


def _step_back() -> None:
    """Be as nice as the mover, which is in a session of its own; Linux may group by those."""
    os.setsid()
    os.nice(NICENESS)
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(NICENESS))


def _with_children_s(pid: int) -> float:
    """Return the CPU seconds of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return sum(int(field) for field in fields[11:15]) / TICKS_PER_S


def _median(took: Sequence[Took], what: str) -> float:
    return statistics.median(getattr(one, what) for one in took)


def _spread(seen: Mapping[str, Sequence[Took]]) -> str:
    def seconds(name: str) -> str:
        taken = [one.seconds for one in seen[name]]
        return f"{name} {min(taken):.2f} to {max(taken):.2f} s"

    return ", ".join(seconds(name) for name in seen)
