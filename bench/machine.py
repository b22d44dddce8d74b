"""What the figures were taken on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from bench.processes import CORES
from bench.stage import NGINX
from xandrouting.provision.vllm import FOLDER, Missing, find_vllm

PACKAGES = ("xandrouting", "xllamacpp", "uvicorn", "uvloop", "httptools", "msgspec")


def describe() -> list[tuple[str, str]]:
    """Return what to know about this machine and this run, as pairs of name and value."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [
        ("date", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("command", shlex.join(["python", "-m", "bench", *sys.argv[1:]])),
        ("processor", f"{_processor()}, {len(CORES)} cores"),
        ("memory", f"{memory_bytes / 2**30:.0f} GiB"),
        ("system", f"{_system()}, Linux {platform.release()}"),
        ("Python", platform.python_version()),
        (
            "versions",
            ", ".join(f"{name} {_version(name)}" for name in PACKAGES) + _vllm() + _nginx(),
        ),
        ("load before", f"{os.getloadavg()[0]:.2f} (1 minute; a quiet machine has 0)"),
    ]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return platform.system()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _vllm() -> str:
    found = find_vllm(os.environ, beside=[Path(FOLDER)])
    if isinstance(found, Missing):
        return ", no vllm"
    return f", vllm {found.version or 'of an unknown version'}"


def _nginx() -> str:
    if NGINX is None:
        return ", no nginx"
    said = subprocess.run([NGINX, "-v"], capture_output=True, text=True, check=False).stderr
    return f", nginx {said.strip().rpartition('/')[2]}"
