"""The mover's one request: a range of a file, asked of whoever the hub says has it.

Runs in the mover's process; standard library only.
"""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from email.utils import mktime_tz, parsedate_tz
from http.client import HTTPResponse as Response
from typing import Final
from urllib.parse import SplitResult, urljoin, urlsplit

from xandrouting.downloads.mover_board import Board
from xandrouting.downloads.mover_files import File, Order
from xandrouting.downloads.mover_proxies import Proxy, UnusableProxy, proxy_before

_LAST_RETRY_AFTER_S: Final = 60.0
_CONNECT_S: Final = 10.0
# What the kernel has received a kill -9 throws away. It lets that grow to megabytes, which a
# server far away needs; from one that is near they make nothing faster.
_NEAR_BYTES: Final = 1 << 20  # the kernel takes it twice
_NEAR_US: Final = 250  # there and back; on this machine it is some 5
_RTT_US: Final = struct.Struct("68xI")  # Linux's tcp_info.tcpi_rtt
_MAX_HOPS: Final = 5
NETWORK: Final = (OSError, http.client.HTTPException, UnicodeError)  # the last: a host's name
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,19})-(\d+)/(\d{1,19}|\*)")


class Trouble(Exception):
    """One try failed. `final`: another one would fail too; `wait_s`: what the server asked for."""

    def __init__(
        self, why: str, code: str = "refused", *, final: bool = False, wait_s: float | None = None
    ) -> None:
        super().__init__(why)
        self.code, self.why, self.final, self.wait_s = code, why, final, wait_s


class Client:
    """Asks for ranges, follows redirects, and tells the token to whom it may be told."""

    def __init__(self, order: Order, board: Board, token: str | None) -> None:
        self._order, self._board, self._token = order, board, token
        self._tls: ssl.SSLContext | None = None

    @contextmanager
    def get(self, file: File, start: int, end: int) -> Iterator[tuple[Response, int]]:
        """Ask for a range; yield the answer and the offset its body begins at.

        Raises:
            Trouble: an answer without bytes of this file, or none.
            OSError, HTTPException: the network's.
        """
        url, home = file.url, _authority(_split(file.url))
        for _ in range(_MAX_HOPS):
            parts = _split(url)
            proxy = _proxy_before(parts)
            connection = self._connect(parts, proxy)
            try:
                with self._board.holding(connection.sock):
                    with _through(proxy if parts.scheme == "http" else None):
                        answer = self._ask(connection, parts, proxy, f"bytes={start}-{end - 1}")
                        moved, at_home = answer.status in _REDIRECTS, _authority(parts) == home
                        begin = 0 if moved else body_start(answer, file, start, at_home=at_home)
                    if not moved:
                        yield answer, begin
                        return
                    url = _split(answer.headers["location"] or "", url).geturl()
            finally:
                connection.close()
            if parts.scheme == "https" and _split(url).scheme != "https":
                raise Trouble("the hub redirects to an address without TLS", final=True)
        raise Trouble("the hub redirects in a circle")

    def _connect(self, parts: SplitResult, proxy: Proxy | None) -> http.client.HTTPConnection:
        assert parts.hostname is not None
        timeout_s = min(_CONNECT_S, self._order.stall_s)
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            self._tls = self._tls or ssl.create_default_context()
            connection = http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=timeout_s, context=self._tls
            )
            if proxy is None:
                connection.connect()
            else:
                with _through(proxy):
                    tunnel = _tunnel(proxy, _authority(parts), timeout_s, self._order.stall_s)
                connection.sock = self._tls.wrap_socket(tunnel, server_hostname=parts.hostname)
        else:
            host, port = (parts.hostname, parts.port) if proxy is None else (proxy.host, proxy.port)
            connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
            with _through(proxy):
                connection.connect()
        connection.sock.settimeout(self._order.stall_s)
        bound_buffer(connection.sock)
        return connection

    def _ask(
        self,
        connection: http.client.HTTPConnection,
        parts: SplitResult,
        proxy: Proxy | None,
        span: str,
    ) -> Response:
        headers = {"Range": span, "Accept-Encoding": "identity", "User-Agent": "xandrouting"}
        if self._token and _authority(parts) in self._order.token_hosts:
            headers["Authorization"] = f"Bearer {self._token}"
        target = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
        if proxy is not None and parts.scheme == "http":
            headers |= proxy.headers
            host = parts.netloc.rpartition("@")[2].encode("idna").decode()
            target = f"http://{host}{target}"
        connection.request("GET", target, headers=headers)
        answer = connection.getresponse()
        if proxy is not None and answer.status == 407:
            raise _refused_by(proxy, answer)
        return answer


def bound_buffer(connection: socket.socket) -> None:
    """Have little wait in the kernel if the other side is near."""
    if sys.platform != "linux":
        return
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RTT_US.size)
    if len(info) == _RTT_US.size and 0 < _RTT_US.unpack(info)[0] <= _NEAR_US:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _NEAR_BYTES)


def _proxy_before(parts: SplitResult) -> Proxy | None:
    try:
        return proxy_before(parts)
    except UnusableProxy as error:
        raise Trouble(str(error), final=True) from None


@contextmanager
def _through(proxy: Proxy | None) -> Iterator[None]:
    """Name the proxy in whatever goes wrong: it may be its fault, or its own answer."""
    try:
        yield
    except _ProxyTrouble:
        raise
    except Trouble as error:
        if proxy is None:
            raise
        why = f"{error.why}; it went through the proxy at {proxy.name}"
        raise Trouble(why, error.code, final=error.final, wait_s=error.wait_s) from None
    except NETWORK as error:
        if proxy is None:
            raise
        words = "it does not answer" if isinstance(error, TimeoutError) else words_of(error)
        raise Trouble(f"the proxy at {proxy.name} cannot be used: {words}") from None


class _ProxyTrouble(Trouble):
    """One that names the proxy already."""


def _tunnel(proxy: Proxy, authority: str, timeout_s: float, answer_s: float) -> socket.socket:
    """Have the proxy connect us to an authority; it is told that alone."""
    authority = authority.encode("idna").decode()
    connection = socket.create_connection((proxy.host, proxy.port), timeout_s)
    try:
        connection.settimeout(answer_s)
        headers = {"Host": authority, "User-Agent": "xandrouting", **proxy.headers}
        lines = [f"CONNECT {authority} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items())]
        connection.sendall("".join(f"{line}\r\n" for line in [*lines, ""]).encode("ascii"))
        with closing(Response(connection, method="CONNECT")) as answer:
            answer.begin()
            if not 200 <= answer.status < 300:
                raise _refused_by(proxy, answer)
        connection.settimeout(timeout_s)
    except BaseException:
        connection.close()
        raise
    return connection


def _refused_by(proxy: Proxy, answer: Response) -> _ProxyTrouble:
    who, status = f"the proxy at {proxy.name}", answer.status
    if status == 407 and proxy.headers:
        words = f"{who} refuses the user name and password in its address (407)"
        return _ProxyTrouble(words, final=True)
    if status == 407:
        words = f"{who} wants a user name and password (407): put them into its address"
        return _ProxyTrouble(words, final=True)
    if status in (408, 429) or status >= 500:
        words = f"{who} cannot reach it ({status})"
        return _ProxyTrouble(words, wait_s=retry_after_s(answer))
    return _ProxyTrouble(f"{who} does not let it through ({status})", final=True)


def _split(url: str, base: str = "") -> SplitResult:
    try:
        parts = urlsplit(urljoin(base, url))
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    except ValueError:
        pass  # a port that is no number, or half an IPv6 address
    raise Trouble("the hub redirects to what is no web address", final=True)


def _authority(parts: SplitResult) -> str:
    port = parts.port or (443 if parts.scheme == "https" else 80)
    host = parts.hostname or ""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def body_start(answer: Response, file: File, start: int, *, at_home: bool) -> int:
    """Return the offset at which an answer's body begins; raise Trouble if it has no such body."""
    status, headers = answer.status, answer.headers
    if status in (200, 206):
        if headers["content-encoding"] not in (None, "", "identity"):
            raise Trouble("the hub sent it packed", final=True)
        if headers.get_content_type() == "text/html" and not file.path.endswith((".html", ".htm")):
            raise Trouble("something between here and the hub sent a web page instead")
    if status == 206:
        match = _CONTENT_RANGE.fullmatch(headers["content-range"] or "")
        if match is None or int(match[1]) > start:
            raise Trouble("the hub sent another range than it was asked for")
        if match[3] != "*" and int(match[3]) != file.size:
            raise Trouble(f"it has {match[3]} bytes now, not {file.size}", "wrong_size")
        return int(match[1])
    if status == 200:
        if answer.length is None or answer.length == file.size:
            return 0
        raise Trouble(f"it has {answer.length} bytes now, not {file.size}", "wrong_size")
    if status == 416:
        raise Trouble(f"it is shorter than {file.size} bytes now", "wrong_size")
    if status in (401, 403):
        remedy = ": accept its terms on the hub, and check HF_TOKEN" if at_home else ""
        raise Trouble(f"access was refused ({status}){remedy}", "forbidden", final=at_home)
    if status in (404, 410):
        raise Trouble(f"it is not there any more ({status})", "gone", final=at_home)
    again = status in (408, 429) or status >= 500
    raise Trouble(f"the hub answered {status}", final=not again, wait_s=retry_after_s(answer))


def retry_after_s(answer: Response) -> float | None:
    """Return how long the server asks to wait, at most a minute."""
    told = answer.headers["retry-after"]
    if told is None and answer.status == 429:  # the hub's own way to say it
        match = re.search(r";\s*t=(\d+)", answer.headers["ratelimit"] or "")
        told = match[1] if match else None
    if told is None:
        return None
    try:
        seconds = float(told)
    except ValueError:
        date = parsedate_tz(told)
        if date is None:
            return None
        try:
            seconds = mktime_tz(date) - time.time()
        except (ValueError, OverflowError):  # no such year
            return None
    return min(max(0.0, seconds), _LAST_RETRY_AFTER_S)


def words_of(error: BaseException) -> str:
    """Return what the network says went wrong."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
