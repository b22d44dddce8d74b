"""Which proxy stands before an address: what the environment says, as curl would read it.

Runs in the mover's process, and is asked for the hub too; standard library only.
"""

from __future__ import annotations

import base64
import ipaddress
import re
from typing import Final, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies_environment

_LOOPBACK: Final = re.compile(r"localhost|::1|127(\.\d{1,3}){3}")
_PORTS: Final = {"http": 80, "https": 443}
_NO_ADDRESS: Final = "HTTP_PROXY or HTTPS_PROXY is not the address of a proxy: set it anew"


class UnusableProxy(Exception):
    """The environment names a proxy that bytes cannot go through; said without its password."""


class Proxy(NamedTuple):
    """An HTTP proxy. `headers` are for it alone: they may have a password."""

    name: str  # host and port, to be shown
    host: str
    port: int
    headers: dict[str, str]


def proxy_before(parts: SplitResult) -> Proxy | None:
    """Return the proxy that an address is behind.

    Raises:
        UnusableProxy: it is none of HTTP.
    """
    proxies, host = getproxies_environment(), parts.hostname or ""
    address = proxies.get(parts.scheme) or proxies.get("all")
    if address is None or _LOOPBACK.fullmatch(host):
        return None
    port = parts.port or _PORTS[parts.scheme]
    exempt = proxies.get("no", "").lower().split(",")
    if any(_exempts(entry.strip(), host, port) for entry in exempt):
        return None
    return _proxy_at(address)


def _exempts(entry: str, host: str, port: int) -> bool:
    """Whether one entry of NO_PROXY means a host: a name with all below it, or a network."""
    if entry in ("", "*"):
        return entry == "*"
    if "/" in entry:
        try:
            return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
        except ValueError:
            return False  # a name is in no network
    if match := re.fullmatch(r"(\[.+\]|[^:]+):(\d+)", entry):
        if int(match[2]) != port:
            return False
        entry = match[1]
    name = entry.removeprefix("*").lstrip(".").strip("[]")
    return host == name or host.endswith(f".{name}")


def _proxy_at(address: str) -> Proxy:
    try:
        parts = urlsplit(address if "://" in address else f"http://{address}")
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        raise UnusableProxy(_NO_ADDRESS) from None
    if host is None or "@" in parts.path + parts.query + parts.fragment:
        # The second: a password with a slash in it. What looks like the host is a piece of it.
        raise UnusableProxy(_NO_ADDRESS)
    name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if parts.scheme != "http":
        raise UnusableProxy(
            f"the proxy at {name} speaks {parts.scheme}, and bytes go through http:// ones alone: "
            "set HTTP_PROXY and HTTPS_PROXY to one, or name the hub in NO_PROXY"
        )
    headers = {}
    if parts.username is not None:
        secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(secret).decode()}"
    return Proxy(name, host, port, headers)
