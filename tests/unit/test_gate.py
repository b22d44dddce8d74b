"""Who may ask."""

from __future__ import annotations

import pytest

from xandrouting.core.errors import Forbidden, GatewayError, Unauthorized
from xandrouting.http.gate import MAX_KNOWN_HOSTS, OPEN_PATHS, Gate

CHAT = "/v1/chat/completions"
LOCAL = Gate(api_key=None, check_host=True, hosts=("Studio.lan",))
KEYED = Gate(api_key="s3crét", check_host=False)


def check(
    gate: Gate, method: str = "POST", path: str = CHAT, *, host: str = "localhost", **headers: str
) -> type[GatewayError] | None:
    """Return what the gate raised, or None."""
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    try:
        gate.check(method, path, dict([(b"host", host.encode("latin-1")), *pairs]))
    except GatewayError as error:
        return type(error)
    return None


# The key.


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer s3crét"},
        {"authorization": "bearer s3crét"},
        {"authorization": "BEARER  s3crét "},
        {"x_api_key": "s3crét"},
        {"authorization": "Basic dXNlcg==", "x_api_key": "s3crét"},
    ],
)
def test_the_key_opens(headers: dict[str, str]) -> None:
    assert check(KEYED, **headers) is None


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": "Bearer s3cre"},
        {"authorization": "Bearer S3CRÉT"},
        {"authorization": "Bearer s3crét2"},
        {"authorization": "s3crét"},
        {"authorization": "Basic s3crét"},
        {"authorization": "Bearer wrong", "x_api_key": "s3crét"},
        {"x_api_key": "wrong"},
        {"cookie": "s3crét"},
    ],
)
def test_nothing_else_opens(headers: dict[str, str]) -> None:
    assert check(KEYED, **headers) is Unauthorized
    assert check(KEYED, "GET", "/v1/models", **headers) is Unauthorized
    assert check(KEYED, "GET", "/metrics", **headers) is Unauthorized


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
def test_some_paths_need_no_key(path: str) -> None:
    assert check(KEYED, "GET", path) is None


@pytest.mark.parametrize("path", ["/health/", "/HEALTH", "//", "/docs/oauth2-redirect", ""])
def test_what_looks_like_an_open_path_is_none(path: str) -> None:
    assert check(KEYED, "GET", path) is Unauthorized


def test_with_a_key_any_name_will_do() -> None:
    keyed = Gate(api_key="k", check_host=True)
    assert check(keyed, host="attacker.example", authorization="Bearer k") is None


def test_without_a_key_nothing_is_asked_for() -> None:
    assert check(LOCAL, authorization="Bearer whatever") is None


# The Host: a web page may let its own name point at this machine.


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST:8080", "app.localhost:1", "127.0.0.1", "127.0.0.1:8080"),
        *("[::1]", "[::1]:8080", "192.168.1.7:80", "studio.lan", "STUDIO.LAN:8080", ""),
    ],
)
def test_the_server_goes_by_these_hosts(host: str) -> None:
    assert check(LOCAL, host=host) is None
    assert check(LOCAL, host=host) is None  # and it remembers


@pytest.mark.parametrize(
    "host",
    [
        *("attacker.example", "attacker.example:8080", "localhost.attacker.example", "xlocalhost"),
        *("127.0.0.1.nip.io", "studio.lan.example", "[attacker.example]", "2130706433", "é.lan"),
    ],
)
def test_and_by_no_others(host: str) -> None:
    assert check(LOCAL, host=host) is Forbidden
    assert check(LOCAL, host=host) is Forbidden
    assert check(LOCAL, "GET", "/health", host=host) is Forbidden


def test_a_flood_of_hosts_is_not_kept() -> None:
    gate = Gate(api_key=None, check_host=True)
    for number in range(3 * MAX_KNOWN_HOSTS):
        assert check(gate, host=f"localhost:{number}") is None
        assert check(gate, host=f"attacker{number}.example") is Forbidden
    assert len(gate._known_hosts) <= MAX_KNOWN_HOSTS


def test_behind_a_public_address_the_host_is_not_looked_at() -> None:
    assert check(Gate(api_key=None, check_host=False), host="models.example") is None


# The Origin: what a web page may do.


@pytest.mark.parametrize("origin", ["http://localhost:8080", "HTTP://LOCALHOST:8080"])
def test_its_own_pages_may_ask(origin: str) -> None:
    assert check(LOCAL, host="Localhost:8080", origin=origin) is None


@pytest.mark.parametrize(
    "origin",
    [
        *("http://attacker.example", "http://localhost:3000", "http://localhost", "null"),
        *("http://localhost:8080.attacker.example", "localhost:8080", "file://"),
    ],
)
@pytest.mark.parametrize("method", ["POST", "DELETE", "PUT", "PATCH"])
def test_other_pages_may_change_nothing(method: str, origin: str) -> None:
    assert check(LOCAL, method, host="localhost:8080", origin=origin) is Forbidden


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_other_pages_may_ask_where_nothing_changes(method: str) -> None:
    # Without CORS headers the browser keeps the answer from them.
    assert check(LOCAL, method, origin="http://attacker.example") is None


@pytest.mark.parametrize("path", ["/unload", "/upstream/qwen/slots"])
@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://attacker.example"},
        {"origin": "null", "sec_fetch_site": "same-origin"},
        {"sec_fetch_site": "cross-site"},  # a link or an image has no Origin
        {"sec_fetch_site": "Cross-Site"},
        {"sec_fetch_site": "same-site"},  # http://localhost:3000
    ],
)
def test_other_pages_may_not_change_by_a_get(path: str, headers: dict[str, str]) -> None:
    assert check(LOCAL, "GET", path, **headers) is Forbidden
    assert check(LOCAL, "GET", "/running", **headers) is None


@pytest.mark.parametrize("path", ["/unload", "/upstream/qwen/slots"])
def test_who_is_no_foreign_page_may(path: str) -> None:
    assert check(LOCAL, "GET", path) is None  # curl
    assert check(LOCAL, "GET", path, sec_fetch_site="none") is None  # typed by a person
    assert check(LOCAL, "GET", path, sec_fetch_site="same-origin") is None
    chat = Gate(api_key=None, check_host=True, origins=("https://chat.example",))
    headers = {"origin": "https://chat.example", "sec_fetch_site": "cross-site"}
    assert check(chat, "GET", path, **headers) is None
    assert check(chat, "GET", path, sec_fetch_site="cross-site") is Forbidden
    anyone = Gate(api_key=None, check_host=True, origins=("*",))
    assert check(anyone, "GET", path, sec_fetch_site="cross-site") is None


def test_configured_origins_may_ask() -> None:
    gate = Gate(api_key=None, check_host=True, origins=("https://Chat.Example",))
    assert check(gate, origin="https://chat.example") is None
    assert check(gate, origin="http://chat.example") is Forbidden
    assert check(gate, origin="https://chat.example.attacker.example") is Forbidden
    anyone = Gate(api_key=None, check_host=True, origins=("*",))
    assert check(anyone, origin="https://whoever.example") is None


def test_a_key_does_not_make_up_for_a_foreign_origin() -> None:
    headers = {"authorization": "Bearer s3crét", "origin": "http://attacker.example"}
    assert check(KEYED, **headers) is Forbidden
