"""Flags, then the environment, then the default; and no open door."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError
from pydantic_settings import CliApp, SettingsError

from xandrouting.settings import BARE_NAMES, Settings


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without settings, whatever the machine's has."""
    for name in list(os.environ):
        if name.startswith("XANDROUTING_") or name.lower() in BARE_NAMES:
            monkeypatch.delenv(name)
    return monkeypatch


def settings(*flags: str, **env: str) -> Settings:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        return CliApp.run(Settings, cli_args=list(flags)) if flags else Settings()


def refused(*flags: str, **env: str) -> str:
    with pytest.raises((ValidationError, SettingsError)) as caught:
        settings(*flags, **env)
    return str(caught.value)


# Where a value comes from.


def test_the_defaults_are_closed_and_small() -> None:
    plain = settings()
    assert (plain.host, plain.port, plain.api_key, plain.is_loopback) == (
        *("127.0.0.1", 8080, None),
        True,
    )
    assert (plain.default_ttl, plain.max_loaded, plain.device_fallback) == (300.0, None, True)
    assert (plain.cors_origins, plain.allowed_hosts, plain.upstreams) == ((), (), {})


def test_flags_come_before_the_environment() -> None:
    both = {"XANDROUTING_PORT": "2", "PORT": "3"}
    assert settings("--port", "1", **both).port == 1
    assert settings(**both).port == 2
    assert settings(PORT="3").port == 3
    assert settings().port == 8080


@pytest.mark.parametrize(
    ("env", "name", "value"),
    [
        ({"HOST": "::1"}, "host", "::1"),
        ({"MODELS_DIR": "/srv/m"}, "models_dir", Path("/srv/m")),
        ({"DEFAULT_TTL": "0"}, "default_ttl", 0.0),
        ({"CORS_ORIGINS": "http://a, http://b ,"}, "cors_origins", ("http://a", "http://b")),
        ({"XANDROUTING_MAX_LOADED": "7"}, "max_loaded", 7),
        ({"XANDROUTING_LOAD_STALL_S": "1.5"}, "load_stall_s", 1.5),
        ({"XANDROUTING_DEVICE_FALLBACK": "false"}, "device_fallback", False),
        ({"XANDROUTING_MAX_BODY_BYTES": "2MiB"}, "max_body_bytes", 2 << 20),
        ({"XANDROUTING_ALLOWED_HOSTS": "a.lan,b.lan"}, "allowed_hosts", ("a.lan", "b.lan")),
    ],
)
def test_the_environment(env: dict[str, str], name: str, value: object) -> None:
    assert getattr(settings(**env), name) == value


@pytest.mark.parametrize("name", ["MAX_LOADED", "API_KEY", "LOG_LEVEL", "DATA_DIR"])
def test_other_names_need_the_prefix(name: str) -> None:
    assert settings(**{name: "debug"}) == settings()


@pytest.mark.parametrize("name", [name.upper() for name in BARE_NAMES])
def test_an_empty_bare_variable_is_unset(name: str) -> None:
    assert settings(**{name: ""}) == settings()


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (("--max-loaded", "5"), "max_loaded", 5),
        (("--models-dir", "/srv/m"), "models_dir", Path("/srv/m")),
        (("--no-auth", "--host", "0.0.0.0"), "no_auth", True),
        (("--default-ttl", "0.5"), "default_ttl", 0.5),
        (("--cors-origins", "http://a,http://b"), "cors_origins", ("http://a", "http://b")),
        (("--log-level", "debug"), "log_level", "debug"),
        (("--port=0",), "port", 0),
    ],
)
def test_flags(flags: tuple[str, ...], name: str, value: object) -> None:
    assert getattr(settings(*flags), name) == value


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        settings().port = 1  # type: ignore[misc]


# No open door.


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "models.example", "0"])
def test_who_serves_others_needs_a_key_or_says_so(host: str) -> None:
    assert "set an API key, or say --no-auth" in refused(HOST=host)
    assert settings(HOST=host, XANDROUTING_NO_AUTH="1").no_auth
    assert settings(HOST=host, XANDROUTING_API_KEY="k").api_key is not None
    assert not settings(HOST=host, XANDROUTING_NO_AUTH="1").is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_this_machine_needs_none(host: str) -> None:
    assert settings(HOST=host).is_loopback


def test_an_empty_key_is_no_key() -> None:
    assert "API key" in refused(HOST="0.0.0.0", XANDROUTING_API_KEY="")


def test_a_key_is_not_shown() -> None:
    keyed = settings(
        XANDROUTING_API_KEY="s3cret",
        XANDROUTING_UPSTREAMS="big=https://big.example",
        XANDROUTING_UPSTREAM_KEYS="big=s3cret",
    )
    assert "s3cret" not in repr(keyed)
    assert keyed.api_key is not None
    assert keyed.api_key.get_secret_value() == "s3cret"
    assert keyed.upstream_keys == {"big": "s3cret"}


# Upstreams.


@pytest.mark.parametrize(
    ("text", "upstreams"),
    [
        ("", {}),
        ("a=http://h:1", {"a": "http://h:1"}),
        (" a = http://h:1/v1 , b=https://x/q=1,", {"a": "http://h:1/v1", "b": "https://x/q=1"}),
        ("a.b_c-1=https://[::1]:8000/api", {"a.b_c-1": "https://[::1]:8000/api"}),
    ],
)
def test_upstreams(text: str, upstreams: dict[str, str]) -> None:
    assert settings(XANDROUTING_UPSTREAMS=text).upstreams == upstreams
    if text:
        assert settings("--upstreams", text).upstreams == upstreams


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("http://h:1", "write name=value"),
        ("a=", "write name=value"),
        ("=http://h:1", "write name=value"),
        ("a", "write name=value"),
        ("a=h:1", "begins with http:// or https://"),
        ("a=file:///etc/passwd", "begins with http:// or https://"),
        ("models=http://h:1", "cannot be an upstream's name"),
        ("a/b=http://h:1", "cannot be an upstream's name"),
        ("a b=http://h:1", "cannot be an upstream's name"),
        ("ä=http://h:1", "cannot be an upstream's name"),
        ("a=http://h:1,a=http://h:2", "only once"),
        ("a=http://", "cannot be"),
        ("a=http://:80", "cannot be"),
        ("a=http://h:99999", "cannot be"),
        ("a=http://h:x", "cannot be"),
        ("a=http://h:0", "cannot be"),
        ("a=http://[::1", "cannot be"),
        ("a=http://a..b", "cannot be"),
        (f"a=http://{'a' * 64}.example", "cannot be"),
        ("a=http://h/a b", "cannot be"),
        ("a=http://h\r\nx: 1", "cannot be"),
        ("a=http://me:secret@h:1", "upstream_keys"),
        ("a=http://h:1/?key=secret", "upstream_keys"),
    ],
)
def test_what_is_no_upstream(text: str, words: str) -> None:
    assert words in refused(XANDROUTING_UPSTREAMS=text)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("a=k\r\nx-evil: 1", "the key of upstream a"),
        ("a=k 1", "the key of upstream a"),
        ("a=ké", "the key of upstream a"),
        ("b=k", "no upstream is called b"),
    ],
)
def test_what_is_no_key_of_an_upstream(keys: str, words: str) -> None:
    said = refused(XANDROUTING_UPSTREAMS="a=http://h:1", XANDROUTING_UPSTREAM_KEYS=keys)
    assert words in said


def test_the_known_ollama_may_have_a_key() -> None:
    assert settings(XANDROUTING_UPSTREAM_KEYS="ollama=k").upstream_keys == {"ollama": "k"}


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://gpu:11434", "http://gpu:11434"),
        ("https://gpu.example/ollama/", "https://gpu.example/ollama"),
        ("http://gpu:11434/v1", "http://gpu:11434"),
        ("gpu:8000", "http://gpu:8000"),
        ("gpu:8000/v1/", "http://gpu:8000"),
        ("gpu", "http://gpu:11434"),
        ("127.0.0.1", "http://127.0.0.1:11434"),
        ("[::1]", "http://[::1]:11434"),
        ("[::1]:8000/", "http://[::1]:8000"),
        ("none", None),
        ("", "http://127.0.0.1:11434"),
    ],
)
def test_the_address_of_ollama(text: str, url: str | None) -> None:
    assert settings(OLLAMA_BASE_URL=text).ollama_base_url == url
    assert settings(XANDROUTING_OLLAMA_BASE_URL=text).ollama_base_url == url


def test_what_is_no_address_of_ollama() -> None:
    assert "begins with http:// or https://" in refused(OLLAMA_BASE_URL="ftp://gpu")
    for text in ("gpu:port", "::1", ":11434", "http://gpu:99999"):
        assert "cannot be" in refused(OLLAMA_BASE_URL=text)


# Bad values.


@pytest.mark.parametrize(
    "flags",
    [
        ("--port", "65536"),
        ("--port", "-1"),
        ("--port", "http"),
        ("--default-ttl", "-1"),
        ("--max-loaded", "0"),
        ("--max-queue", "0"),
        ("--load-stall-s", "0"),
        ("--keepalive-after-s", "-1"),
        ("--log-level", "loud"),
        ("--max-body-bytes", "much"),
    ],
)
def test_bad_values_are_refused_by_name(flags: tuple[str, str]) -> None:
    assert flags[0].removeprefix("--").replace("-", "_") in refused(*flags)


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        settings("--prot", "1")
    assert "--prot" in capsys.readouterr().err
