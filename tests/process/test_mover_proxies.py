"""The mover behind a proxy: what it is told, what it is not, and what is said when it refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.fakes.hub import Cut, Hub, Refuse
from tests.fakes.movers import REPO, Mover, assert_published, mover, order_for
from tests.fakes.proxy import FarHub, ForwardProxy, far_certificate
from tests.waiting import wait_for
from xandrouting.downloads.mover_proxies import Proxy, UnusableProxy, proxy_before

MIB = 1 << 20
BIG = "big-Q4_0.gguf"
TOKEN = "hf_secret"
FILES = {BIG: ("random", 8 * MIB, 1), "config.json": b"{}"}


@pytest.fixture
def proxy() -> Iterator[ForwardProxy]:
    with ForwardProxy() as proxy:
        yield proxy


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    return far_certificate(tmp_path)


@pytest.fixture(params=["http", "https"])
def hub(request: pytest.FixtureRequest, proxy: ForwardProxy, tmp_path: Path) -> Iterator[FarHub]:
    certificate = far_certificate(tmp_path) if request.param == "https" else None
    with FarHub(proxy, certificate) as hub:
        hub.tokens.add(TOKEN)
        hub.add_repo(REPO, FILES)
        yield hub


def environment(tmp_path: Path, **proxies: str) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "SSL_CERT_FILE": str(tmp_path / "far.pem"),
        **proxies,
    }


def run(hub: Hub, tmp_path: Path, proxies: dict[str, str], **changes: object) -> Mover:
    """Run a mover to its end."""
    order = order_for(hub, tmp_path, **changes)
    with mover(order, TOKEN, env=environment(tmp_path, **proxies)) as said:
        said.wait()
    assert said.stderr == b""
    return said


def first_wait(hub: Hub, tmp_path: Path, proxies: dict[str, str], **changes: object) -> str:
    """Run one until it waits; return why."""
    order = order_for(hub, tmp_path, **changes)
    with mover(order, TOKEN, env=environment(tmp_path, **proxies)) as said:
        wait_for(lambda: said.named("waiting") or said.failure)
    assert said.failure is None
    return str(said.named("waiting")[0]["why"])


def failed_at_once(said: Mover) -> str:
    """Assert that it tried once; return what it says."""
    assert said.failure is not None
    assert said.failure["code"] == "refused"
    assert said.named("waiting") == []
    return str(said.failure["message"])


@pytest.mark.parametrize(
    "names",
    [
        ("HTTP_PROXY", "HTTPS_PROXY"),
        ("http_proxy", "https_proxy"),
        ("ALL_PROXY",),
        ("all_proxy",),
    ],
)
def test_bytes_go_through_the_proxy(
    hub: FarHub, proxy: ForwardProxy, tmp_path: Path, names: tuple[str, ...]
) -> None:
    run(hub, tmp_path, dict.fromkeys(names, proxy.url))
    assert_published(hub, order_for(hub, tmp_path))
    assert hub.authorizations("hub") == {f"Bearer {TOKEN}"}
    assert hub.authorizations("cdn") == set()
    is_tls = hub.url.startswith("https")
    assert proxy.methods() == {"CONNECT" if is_tls else "GET"}
    if is_tls:
        assert {asked.path for asked in proxy.asked} == {"hub.test:443", "cdn.test:443"}
        assert {*proxy.asked[0].headers} == {"host", "user-agent"}
        assert proxy.told("authorization") == set()
        assert TOKEN not in repr(proxy.asked)
    else:
        assert proxy.told("host") == {"hub.test", "cdn.test"}


def test_password_is_for_the_proxy_alone(tmp_path: Path) -> None:
    with ForwardProxy("me", "p@ss word") as proxy, FarHub(proxy, far_certificate(tmp_path)) as hub:
        hub.tokens.add(TOKEN)
        hub.add_repo(REPO, FILES)
        url = f"http://me:p%40ss%20word@{proxy.name}"
        run(hub, tmp_path, {"https_proxy": url})
        assert_published(hub, order_for(hub, tmp_path))
        assert proxy.methods() == {"CONNECT"}
        assert proxy.inside
        assert not any("proxy-authorization" in asked.headers for asked in proxy.inside)

    with ForwardProxy("me", "p@ss word") as proxy, FarHub(proxy) as hub:
        hub.tokens.add(TOKEN)
        hub.add_repo("org/other", FILES)
        order = order_for(hub, tmp_path, "org/other")
        url = f"http://me:p%40ss%20word@{proxy.name}"
        with mover(order, TOKEN, env=environment(tmp_path, HTTP_PROXY=url)) as said:
            said.wait()
        assert_published(hub, order, "org/other")


def test_what_breaks_behind_a_proxy_goes_on(
    hub: FarHub, proxy: ForwardProxy, tmp_path: Path
) -> None:
    hub.fault(BIG, Cut(3 * MIB, reset=True), times=2)
    hub.fault(BIG, Refuse(503, "cdn", retry_after_s=0.1))
    run(hub, tmp_path, proxy.environment)
    assert_published(hub, order_for(hub, tmp_path))


@pytest.mark.parametrize("no_proxy", ["", "*"])
def test_a_hub_on_this_machine_is_not_behind_a_proxy(tmp_path: Path, no_proxy: str) -> None:
    with Hub() as hub:
        hub.tokens.add(TOKEN)
        hub.add_repo(REPO, FILES)
        nowhere = dict.fromkeys(("HTTP_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
        run(hub, tmp_path, {**nowhere, "NO_PROXY": no_proxy})
        assert_published(hub, order_for(hub, tmp_path))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (False, "wants a user name and password (407)"),
        (True, "refuses the user name and password in its address (407)"),
    ],
)
def test_a_proxy_that_does_not_know_us(
    hub: FarHub, proxy: ForwardProxy, tmp_path: Path, given: bool, says: str
) -> None:
    proxy.user, proxy.password = "me", "right"
    userinfo = "me:hunter2@" if given else ""
    url = f"http://{userinfo}{proxy.name}"
    said = run(hub, tmp_path, {"HTTP_PROXY": url, "HTTPS_PROXY": url})
    message = failed_at_once(said)
    assert f"the proxy at {proxy.name} {says}" in message
    assert "hunter2" not in repr(said.events)
    assert hub.asked == []


def test_a_proxy_that_lets_nobody_through(hub: FarHub, proxy: ForwardProxy, tmp_path: Path) -> None:
    proxy.refuse = 403
    said = run(hub, tmp_path, proxy.environment)
    assert said.failure is not None
    assert f"the proxy at {proxy.name}" in said.failure["message"]
    assert "(403)" in said.failure["message"]
    assert said.named("waiting") == []


def test_a_proxy_that_does_not_reach_it_is_asked_again(
    hub: FarHub, proxy: ForwardProxy, tmp_path: Path
) -> None:
    proxy.refuse = 502
    why = first_wait(hub, tmp_path, proxy.environment)
    assert f"the proxy at {proxy.name}" in why
    assert "502" in why
    proxy.refuse = None
    run(hub, tmp_path, proxy.environment)
    assert_published(hub, order_for(hub, tmp_path))


def test_a_proxy_that_says_nothing(hub: FarHub, proxy: ForwardProxy, tmp_path: Path) -> None:
    proxy.silent = True
    why = first_wait(hub, tmp_path, proxy.environment, stall_s=0.3)
    assert f"the proxy at {proxy.name} cannot be used: it does not answer" in why


def test_a_proxy_that_is_not_there(hub: FarHub, tmp_path: Path) -> None:
    nowhere = "http://me:hunter2@127.0.0.1:9"
    why = first_wait(hub, tmp_path, {"ALL_PROXY": nowhere})
    assert "the proxy at 127.0.0.1:9 cannot be used: Connection refused" in why
    assert "hunter2" not in why


@pytest.mark.parametrize("scheme", ["socks5", "socks5h", "socks4", "https"])
def test_another_kind_of_proxy_is_refused_at_once(hub: FarHub, tmp_path: Path, scheme: str) -> None:
    said = run(hub, tmp_path, {"ALL_PROXY": f"{scheme}://me:hunter2@proxy.test:1080"})
    message = failed_at_once(said)
    assert f"the proxy at proxy.test:1080 speaks {scheme}" in message
    assert "hunter2" not in message


def test_a_name_that_is_not_ascii_goes_as_the_dns_has_it(
    proxy: ForwardProxy, tmp_path: Path
) -> None:
    for scheme, port in (("http", ""), ("https", ":443")):
        file = {"path": "a", "url": f"{scheme}://b\u00fccher.test/a", "size": 1, "sha256": None}
        with FarHub(proxy) as hub:
            hub.add_repo(REPO, FILES)
            first_wait(hub, tmp_path, proxy.environment, files=[file])
        assert f"xn--bcher-kva.test{port}" in proxy.told("host")


def test_certificate_behind_a_tunnel_is_checked(proxy: ForwardProxy, tmp_path: Path) -> None:
    with FarHub(proxy, far_certificate(tmp_path)) as hub:
        hub.add_repo(REPO, FILES)
        order = order_for(hub, tmp_path)
        env = {"PATH": os.environ["PATH"], "HTTPS_PROXY": proxy.url}
        with mover(order, TOKEN, env=env) as said:
            said.wait()
        assert "certificate" in failed_at_once(said)
        assert hub.asked == []


# Which proxy


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "request_method"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


def before(url: str) -> Proxy | None:
    return proxy_before(urlsplit(url))


def test_the_scheme_s_own_is_first_and_lower_case(no_proxies: pytest.MonkeyPatch) -> None:
    assert before("https://hub.test/a") is None
    no_proxies.setenv("ALL_PROXY", "http://all:1")
    no_proxies.setenv("HTTPS_PROXY", "http://upper:2")
    no_proxies.setenv("http_proxy", "lower:3")
    no_proxies.setenv("HTTP_PROXY", "http://upper:4")
    assert before("https://hub.test/a") == Proxy("upper:2", "upper", 2, {})
    assert before("http://hub.test/a") == Proxy("lower:3", "lower", 3, {})
    no_proxies.setenv("https_proxy", "")
    assert before("https://hub.test/a") == Proxy("all:1", "all", 1, {})
    no_proxies.setenv("https_proxy", "http://[::1]")
    assert before("https://hub.test/a") == Proxy("[::1]:80", "::1", 80, {})
    for here in ("localhost", "127.0.0.1", "127.1.2.3", "[::1]"):
        assert before(f"http://{here}:8/a") is None
    assert before("http://127.0.0.1.test/a") is not None


@pytest.mark.parametrize(
    ("no_proxy", "direct", "behind"),
    [
        ("hub.test", "hub.test a.hub.test HUB.test:8", "thehub.test hub.test.org"),
        (".hub.test, other", "hub.test a.hub.test other", "thehub.test"),
        ("*.hub.test", "a.hub.test", "thehub.test"),
        ("hub.test:8443", "hub.test:8443", "hub.test hub.test:8"),
        ("hub.test:443", "hub.test", "hub.test:8"),
        ("a,*", "hub.test 10.1.1.1 [fd00::1]", ""),
        ("10.0.0.0/8,fd00::/8", "10.200.1.1 [fd00::1]", "11.0.0.1 hub.test [fe00::1]"),
        ("10.1.1.1,[fd00::1],[fd00::2]:443", "10.1.1.1 [fd00::1] [fd00::2]", "10.1.1.2"),
        ("10.0.0.0/99, ,", "", "10.0.0.1 hub.test"),
    ],
)
def test_no_proxy(no_proxies: pytest.MonkeyPatch, no_proxy: str, direct: str, behind: str) -> None:
    no_proxies.setenv("HTTPS_PROXY", "http://proxy:1")
    no_proxies.setenv("no_proxy", no_proxy)
    assert [host for host in direct.split() if before(f"https://{host}/a")] == []
    assert [host for host in behind.split() if not before(f"https://{host}/a")] == []


@pytest.mark.parametrize(
    "address",
    [
        "http://",
        "http://me:hunter2",
        "http://me:hun/ter2@proxy:1",
        "http://me:hun#ter2@proxy:1",
        "http://[::1",
        "http://proxy:99999",
        "me:hunter2",
    ],
)
def test_no_address_of_a_proxy(no_proxies: pytest.MonkeyPatch, address: str) -> None:
    no_proxies.setenv("HTTPS_PROXY", address)
    with pytest.raises(UnusableProxy, match="HTTPS_PROXY is not the address of a proxy") as error:
        before("https://hub.test/a")
    assert "hun" not in str(error.value)
