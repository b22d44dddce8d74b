"""Every setting, read once: flags, then the environment, then the default.

Each is a flag (`--max-loaded 3`) and an environment variable (`XANDROUTING_MAX_LOADED=3`);
a few names are accepted without the prefix too.
"""

from __future__ import annotations

import ipaddress
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BeforeValidator,
    ByteSize,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from xandrouting.core.budget import Budget
from xandrouting.core.model import Backend

BARE_NAMES: Final = (
    "host",
    "port",
    "models_dir",
    "default_ttl",
    "cors_origins",
    "ollama_base_url",
    "hf_endpoint",
    "hf_token",
)
OLLAMA_PORT: Final = 11434
HF_ENDPOINT: Final = "https://huggingface.co"

_UPSTREAM_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NO_ADDRESS: Final = "has a host or a port that cannot be: write http://HOST:PORT"
_KEY: Final = re.compile(r"[!-~]+")  # what a header's value may hold, but blanks

Names = Annotated[tuple[str, ...], NoDecode]
MemoryBudget = Annotated[
    Budget,
    NoDecode,
    BeforeValidator(lambda v: v if isinstance(v, Budget) else Budget.parse(str(v))),
]
Pairs = Annotated[dict[str, str], NoDecode]


def default_models_dir() -> Path:
    """Return `./models` in a checkout, else the user's data directory's."""
    here = Path.cwd()
    is_checkout = (here / "src" / "xandrouting").is_dir()
    return here / "models" if is_checkout else default_data_dir() / "models"


def default_data_dir() -> Path:
    """Return the user's data directory for this program."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "xandrouting"
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "xandrouting"


class Settings(BaseSettings):
    """Every default is safe on a laptop; every duration is in seconds."""

    model_config = SettingsConfigDict(
        env_prefix="XANDROUTING_",
        env_ignore_empty=True,  # a compose file's ${NAME:-} is no value
        frozen=True,
        extra="forbid",
        cli_prog_name="xandrouting serve",
        cli_kebab_case=True,
        cli_implicit_flags="toggle",
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8080, ge=0, le=65535, description="port to listen on; 0: a free one")
    models_dir: Path = Field(
        default_factory=default_models_dir,
        description="where the models lie; default: ./models in a checkout",
    )
    model_roots: Names = Field(
        (),
        description="further folders with models, which are only read: PATH or NAME=PATH, …; "
        "what lies in one is /models/NAME/…",
    )
    data_dir: Path = Field(
        default_factory=default_data_dir,
        description="what the server remembers; default: the user's data directory",
    )
    api_key: SecretStr | None = Field(None, description="the key clients must send")
    no_auth: bool = Field(False, description="serve other machines without a key")
    allowed_hosts: Names = Field((), description="host names it goes by, besides localhost")
    cors_origins: Names = Field((), description="origins whose web pages may use it; * for all")

    default_ttl: NonNegativeFloat = Field(
        300.0, description="idle seconds until an engine is unloaded; 0: never"
    )
    soft_idle_s: PositiveFloat | None = Field(
        None,
        description="idle seconds until an engine gives its memory back and keeps its process; "
        "default: never before it is unloaded",
    )
    parking_quota: ByteSize = Field(
        ByteSize(4 << 30),
        description="disk for the conversations of engines that were unloaded, kept for a day; "
        "0: none are kept",
    )
    spares: Names = Field(
        ("llamacpp",),
        description="backends that keep a started process for the next load: llamacpp (32 MB), "
        "vllm (400 MB); none: no backend",
    )
    max_loaded: PositiveInt | None = Field(
        None, description="engines loaded at once; default: as many as fit the budgets"
    )
    ram_budget: MemoryBudget | None = Field(
        None,
        description="main memory for engines: 16GiB or 70%; default: what is free at the start, "
        "less a reserve",
    )
    vram_budget: MemoryBudget | None = Field(
        None, description="the same for each GPU: 20GiB or 90%"
    )
    pinned: Names = Field((), description="models loaded at the start that never leave")
    preload: Names = Field((), description="models loaded at the start")
    models_autoload: bool = Field(
        True, description="load the model of a request that is not loaded"
    )
    max_queue: PositiveInt = Field(1000, description="requests that may wait for an engine")
    max_queue_wait_s: PositiveFloat = Field(
        300.0, description="how long a request waits for its engine to begin to load"
    )
    max_load_wait_s: PositiveFloat = Field(
        600.0, description="how long a request that is no stream waits for its engine in all"
    )
    load_stall_s: PositiveFloat = Field(
        120.0, description="a load in which nothing moves for so long has failed"
    )
    keepalive_after_s: PositiveFloat = Field(
        10.0, description="a stream that waits longer gets its headers and comments"
    )
    fair_wait_s: PositiveFloat = Field(
        5.0, description="the first in the queue waits so long before a busy engine drains for it"
    )
    min_residency_s: NonNegativeFloat = Field(
        5.0,
        description="a model in use stays for so long once it is loaded, though others wait",
    )
    shutdown_grace_s: NonNegativeFloat = Field(
        30.0, description="how long running requests may end at SIGTERM"
    )
    max_body_bytes: ByteSize = Field(ByteSize(64 << 20), description="largest request body")
    device_fallback: bool = Field(
        True, description="use the cpu where the device asked for is missing"
    )
    upstreams: Pairs = Field(
        default_factory=dict, description="other servers by name: name=http://host:port,…"
    )
    upstream_keys: Pairs = Field(
        default_factory=dict, description="their keys: name=key,…", repr=False
    )
    upstream_timeout_s: PositiveFloat = Field(
        300.0, description="another server that sends nothing for so long is given up"
    )
    ollama_base_url: str | None = Field(
        f"http://127.0.0.1:{OLLAMA_PORT}", description="where Ollama listens; none: nowhere"
    )
    vllm_fast_start: bool | None = Field(
        None,
        description="vLLM compiles nothing: it starts in seconds and answers slower; default: so "
        "on the cpu, not on a GPU",
    )
    hf_endpoint: str = Field(HF_ENDPOINT, description="the hub that models are downloaded from")
    hf_token: SecretStr | None = Field(
        None, description="the token for repositories of the hub that are gated or private"
    )
    starter: bool = Field(
        False, description="download a small model for a first chat if there is none at all"
    )
    max_downloads: PositiveInt = Field(
        2, description="downloads that move at once; the others wait"
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator(
        *("allowed_hosts", "cors_origins", "model_roots", "pinned", "preload", "spares"),
        mode="before",
    )
    @classmethod
    def _split_names(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(name.strip() for name in value.split(",") if name.strip())
        return value

    @field_validator("model_roots")
    @classmethod
    def _are_folders(cls, value: Names) -> Names:
        for root in value:
            name, equals, path = root.rpartition("=")
            if not path or (equals and (not name or "/" in name or name.startswith("."))):
                raise ValueError(f"{root!r}: write PATH, or NAME=PATH with a plain name")
        return value

    @field_validator("spares")
    @classmethod
    def _are_backends(cls, value: Names) -> Names:
        if value == ("none",):
            return ()
        unknown = set(value) - {Backend.LLAMACPP, Backend.VLLM}
        if unknown:
            names = ", ".join(sorted(unknown))
            raise ValueError(f"no spares of {names}: use llamacpp, vllm, or none")
        return value

    @field_validator("upstreams", "upstream_keys", mode="before")
    @classmethod
    def _split_pairs(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        pairs = [pair.strip().partition("=") for pair in value.split(",") if pair.strip()]
        if not all(name.strip() and equals and rest.strip() for name, equals, rest in pairs):
            raise ValueError("write name=value, several with commas between them")
        names = [name.strip() for name, _, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError("each name may be there only once")
        return {name.strip(): rest.strip() for name, _, rest in pairs}

    @field_validator("upstreams")
    @classmethod
    def _are_addresses(cls, value: dict[str, str]) -> dict[str, str]:
        for name, url in value.items():
            if name == "models" or not _UPSTREAM_NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} cannot be an upstream's name: it has letters, digits, '.', '_' and "
                    "'-' alone, and is not 'models'"
                )
            wrong = _wrong_with(url)
            if wrong is not None:
                raise ValueError(f"the address of upstream {name} {wrong}")
        return value

    @field_validator("upstream_keys")
    @classmethod
    def _fit_a_header(cls, value: dict[str, str]) -> dict[str, str]:
        for name, key in value.items():
            if not _KEY.fullmatch(key):
                raise ValueError(f"the key of upstream {name} holds a blank or what is no ASCII")
        return value

    @model_validator(mode="after")
    def _keys_are_for_upstreams(self) -> Self:
        unknown = self.upstream_keys.keys() - self.upstreams.keys() - {Backend.OLLAMA}
        if unknown:
            raise ValueError(f"upstream_keys: no upstream is called {', '.join(sorted(unknown))}")
        return self

    @field_validator("ollama_base_url")
    @classmethod
    def _is_ollama(cls, value: str | None) -> str | None:
        """Take it as people write it: `host`, `host:port`, with a slash or `/v1` at its end."""
        if value is None or value.lower() == "none":
            return None
        if "://" not in value:
            host, slash, path = value.partition("/")
            port = "" if re.search(r":\d+$", host) else f":{OLLAMA_PORT}"
            value = f"http://{host}{port}{slash}{path}"
        wrong = _wrong_with(value)
        if wrong is not None:
            raise ValueError(f"the address of Ollama {wrong}")
        return value.rstrip("/").removesuffix("/v1").rstrip("/")

    @field_validator("hf_endpoint")
    @classmethod
    def _is_hub(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ValueError("the hub's address is https://HOST, without a user name")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _no_open_door(self) -> Self:
        if not self.api_key and not self.no_auth and not self.is_loopback:
            raise ValueError(
                f"host {self.host} is reachable from outside: set an API key, or say --no-auth"
            )
        return self

    @property
    def further_roots(self) -> tuple[tuple[str, Path], ...]:
        """The further folders with models, each with the name it shall have or an empty one."""
        parts = (root.rpartition("=") for root in self.model_roots)
        return tuple((name, Path(path)) for name, _, path in parts)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - no .env is read
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - nor secret files
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read names with the prefix before names without it."""
        return init_settings, env_settings, _BareNames(settings_cls)


def _wrong_with(url: str) -> str | None:
    """Return what is wrong with the address of another server; None: nothing."""
    if not url.startswith(("http://", "https://")):
        return "begins with http:// or https://"
    try:
        parts = urlsplit(url)
        is_whole = bool((parts.hostname or "").encode("idna")) and parts.port != 0
    except ValueError:  # a port that is none, half an IPv6 address, a name that can be none
        return _NO_ADDRESS
    if not is_whole or not url.isprintable() or " " in url:
        return _NO_ADDRESS
    if parts.username is not None or parts.query or parts.fragment:
        return "has a host, a port and a path alone; a key belongs into upstream_keys"
    return None


class _BareNames(PydanticBaseSettingsSource):
    """The environment variables that are accepted without the prefix."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002
        value = os.environ.get(field_name.upper()) if field_name in BARE_NAMES else None
        return value, field_name, False

    def __call__(self) -> dict[str, Any]:
        values = {name: os.environ.get(name.upper()) for name in BARE_NAMES}
        return {name: value for name, value in values.items() if value}
