"""The command line: `xandrouting serve`, `xandrouting engines`."""

from __future__ import annotations

import logging
import sys
import typing
from typing import Annotated

import typer
from pydantic import ValidationError
from pydantic_settings import CliApp, SettingsError

from xandrouting import __version__
from xandrouting.app import CannotStart, Gateway
from xandrouting.cli import engines
from xandrouting.server import listen, run
from xandrouting.settings import Settings

app = typer.Typer(
    help="One OpenAI-compatible server in front of many local models and several engines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(engines.app, name="engines")


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    """Serve local models behind one OpenAI-compatible address."""
    if version:
        typer.echo(f"xandrouting {__version__}")
        raise typer.Exit


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],  # the settings print their own help, one line for each
    }
)
def serve(context: typer.Context) -> None:
    """Run the server. `xandrouting serve --help` lists every setting."""
    settings = _settings(context.args)
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("uvicorn.error").setLevel(
        "DEBUG" if settings.log_level == "debug" else "WARNING"
    )
    try:
        listener = listen(settings.host, settings.port)
    except OSError as error:
        _end(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}")

    def on_ready(gateway: Gateway) -> None:
        print(f"ready {listener.url}", flush=True)  # noqa: T201 - promised on stdout
        _say_hello(gateway, listener.url, with_key=settings.api_key is not None)

    try:
        status = run(settings, on_ready, listener)
    except CannotStart as error:
        _end(str(error))
    raise typer.Exit(status)


def _settings(arguments: list[str]) -> Settings:
    """Read the settings, or end with what is wrong with them."""
    try:
        return CliApp.run(Settings, cli_args=arguments)
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in problem['loc']) or 'settings'}: "
            + problem["msg"].removeprefix("Value error, ")
            for problem in error.errors(include_url=False, include_input=False)
        ]
        _end("; ".join(lines))
    except SettingsError as error:
        _end(str(error))


def _end(message: str) -> typing.NoReturn:
    typer.echo(f"xandrouting: {message}", err=True)
    raise typer.Exit(2)


def _say_hello(gateway: Gateway, url: str, *, with_key: bool) -> None:
    """Print a first request that works when pasted, if there is a model to ask."""
    models = [model for model in gateway.inventory.snapshot.models if gateway.serves(model)]
    if not models:
        typer.echo(
            "No model yet: put a .gguf file into the models directory, or "
            "download one: POST /v1/models/download.",
            err=True,
        )
        return
    smallest = min(models, key=lambda model: model.size_bytes)
    key = ' -H "Authorization: Bearer $XANDROUTING_API_KEY"' if with_key else ""
    body = (
        f'{{"model": "{smallest.id}", "stream": true, "max_tokens": 200, '
        '"messages": [{"role": "user", "content": "Hello! Who are you?"}]}'
    )
    typer.echo(
        f"\nTry it:\n\n  curl -N {url}/v1/chat/completions"
        f" -H 'Content-Type: application/json'{key} \\\n    -d '{body}'\n",
        err=True,
    )
