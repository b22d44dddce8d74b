"""`xandrouting engines`: which engines are here, and installing the one that is no package."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import Annotated, Final, Literal

import typer
from pydantic import ValidationError
from pydantic_settings import CliApp, SettingsError

from xandrouting.app import addresses
from xandrouting.backends import LLAMACPP_COMMAND
from xandrouting.core.model import Backend
from xandrouting.engines.upstream import OLLAMA, root_of
from xandrouting.net.client import Client, UpstreamError
from xandrouting.provision.install import (
    CPU,
    GPU,
    CannotInstall,
    described,
    has_gpu,
    install_vllm,
)
from xandrouting.provision.vllm import Missing, environments, find_vllm
from xandrouting.settings import Settings, default_data_dir
from xandrouting.upstreams import ollama
from xandrouting.upstreams.openai import Unusable
from xandrouting.upstreams.values import Address

app = typer.Typer(help="List and install engines.", no_args_is_help=True)

OLLAMA_WAIT_S: Final = 2.0

DataDir = Annotated[
    Path,
    typer.Option(
        envvar="XANDROUTING_DATA_DIR",
        default_factory=default_data_dir,
        show_default="the user's data directory",
        help="What the server remembers.",
    ),
]


@app.command("list")
def show(data_dir: DataDir) -> None:
    """List each backend: its version and place, or why it is not available."""
    vllm = find_vllm(os.environ, beside=environments(Path.cwd(), data_dir))
    if isinstance(vllm, Missing):
        line = f"not available: {vllm.reason}; {vllm.command}"
    else:
        line = f"{described(vllm)}  {vllm.executable}"
    lines = {
        Backend.LLAMACPP: _llamacpp(),
        Backend.VLLM: line,
        Backend.TRANSFORMERS: line,
        Backend.OLLAMA: _ollama(),
    }
    for backend, text in lines.items():
        typer.echo(f"{backend:<14}{text}")


@app.command()
def install(
    engine: Annotated[Literal["vllm"], typer.Argument(help="Which engine.")],  # noqa: ARG001
    data_dir: DataDir,
    *,
    gpu: Annotated[
        bool | None,
        typer.Option("--gpu/--cpu", help="Which build; by default, what this machine has."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build it anew.")] = False,
    into: Annotated[
        Path | None,
        typer.Option(help="Its folder; by default .venv-vllm in a checkout, else data."),
    ] = None,
) -> None:
    """Install vLLM into an environment of its own."""
    recipe = GPU if (has_gpu() if gpu is None else gpu) else CPU
    try:
        found = install_vllm(into or _default_folder(data_dir), recipe, _say, force=force)
    except (CannotInstall, OSError) as error:
        _say(str(error))
        raise typer.Exit(1) from None
    typer.echo(found.executable)


def _default_folder(data_dir: Path) -> Path:
    in_checkout, in_data = environments(Path.cwd(), data_dir)
    return in_checkout if Path("src", "xandrouting").is_dir() else in_data


def _say(text: str) -> None:
    typer.echo(f"xandrouting: {text}", err=True)


def _llamacpp() -> str:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        return f"not available: llama.cpp is not installed; {LLAMACPP_COMMAND}"
    version = importlib.metadata.version("xllamacpp")
    return f"xllamacpp {version}  {Path(spec.origin).parent}"


def _ollama() -> str:
    """Ask the Ollama that a server started from here would find."""
    try:
        there = addresses(CliApp.run(Settings, cli_args=[])).get(OLLAMA)
    except (ValidationError, SettingsError):
        return "not asked: the server's settings are wrong; xandrouting serve tells which"
    if there is None:
        return "not looked for: OLLAMA_BASE_URL is none"
    url = root_of(there.url)
    try:
        version = asyncio.run(_version(url, there))
    except TimeoutError:
        return f"not running at {url}: no answer within {OLLAMA_WAIT_S:g} s"
    except UpstreamError as error:
        return f"not running at {url}: {error}"
    except Unusable as error:
        return f"no Ollama at {url}: {error}"
    if version is None:
        return f"no Ollama at {url}: it has no /api/version"
    return f"Ollama {version}  {url}"


async def _version(url: str, there: Address) -> str | None:
    client = Client(url, api_key=there.api_key or None)
    try:
        async with asyncio.timeout(OLLAMA_WAIT_S):
            return await ollama.version(client)
    finally:
        client.close()
