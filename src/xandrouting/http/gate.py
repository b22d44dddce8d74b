"""Who may ask: the key, the Host and the Origin of a request."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from xandrouting.core.errors import Forbidden, Unauthorized

OPEN_PATHS: Final = frozenset(("/", "/health", "/docs", "/openapi.json"))
MAX_KNOWN_HOSTS: Final = 100
_SAFE_METHODS: Final = frozenset(("GET", "HEAD", "OPTIONS"))
# Where a GET changes something, as llama-swap has it.
_CHANGING_PATHS: Final = ("/unload", "/upstream/")
# What browsers say of a request that another origin's page caused.
_FOREIGN_SITES: Final = (b"cross-site", b"same-site")


class Gate:
    """Closed by default: see `check`.

    `api_key` None: no key is asked for. `check_host`: only for a server that nobody outside
    this machine can reach, where a web page could still reach it by a name that it lets
    point here (DNS rebinding). `origins` may hold `*`.
    """

    def __init__(
        self,
        *,
        api_key: str | None,
        check_host: bool,
        hosts: Iterable[str] = (),
        origins: Sequence[str] = (),
    ) -> None:
        self._key = None if api_key is None else _digest(api_key.encode())
        self._check_host = check_host and api_key is None
        self._hosts = frozenset(host.lower() for host in hosts)
        self._known_hosts: set[bytes] = set()  # Host headers found to be ours
        self._origins = frozenset(origin.lower().encode() for origin in origins)

    def check(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> None:
        """Let the request pass, or raise.

        Raises:
            Unauthorized: the key is missing or wrong.
            Forbidden: a web page of another origin asks for a change, or the Host is a name
                this server does not go by.
        """
        host = headers.get(b"host", b"")
        if self._check_host and host not in self._known_hosts and not self._is_ours(host):
            raise Forbidden(
                "This server does not go by that host name. "
                "Use localhost or an address, or add the name to allowed_hosts."
            )
        changes = method not in _SAFE_METHODS or path.startswith(_CHANGING_PATHS)
        if changes and self._is_foreign(headers, host.lower()):
            raise Forbidden("Web pages of that origin may not do this. See cors_origins.")
        if self._key is not None and path not in OPEN_PATHS and not self._opens(headers):
            raise Unauthorized(
                "The API key is missing or wrong. Send it as `Authorization: Bearer …`."
            )

    def _opens(self, headers: Mapping[bytes, bytes]) -> bool:
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            key = headers.get(b"x-api-key", b"")
        return _digest(key.strip()) == self._key

    def _is_ours(self, host: bytes) -> bool:
        if len(self._known_hosts) >= MAX_KNOWN_HOSTS:
            self._known_hosts.clear()
        if self._names_us(host.decode("latin-1").lower()):
            self._known_hosts.add(host)
            return True
        return False

    def _names_us(self, name: str) -> bool:
        name = name[1 : name.find("]")] if name.startswith("[") else name.partition(":")[0]
        if name in ("", "localhost") or name.endswith(".localhost") or name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _is_foreign(self, headers: Mapping[bytes, bytes], host: bytes) -> bool:
        """Whether a web page that may change nothing here caused the request."""
        origin = headers.get(b"origin", b"").lower()
        if origin:
            return not self._is_allowed(origin, host)
        # Links and images are asked for without an Origin.
        site = headers.get(b"sec-fetch-site", b"").lower()
        return site in _FOREIGN_SITES and b"*" not in self._origins

    def _is_allowed(self, origin: bytes, host: bytes) -> bool:
        if origin in self._origins or b"*" in self._origins:
            return True
        return origin.partition(b"://")[2] == host


def _digest(key: bytes) -> bytes:
    # Comparing digests takes the same time wherever two keys differ.
    return hashlib.sha256(key).digest()
