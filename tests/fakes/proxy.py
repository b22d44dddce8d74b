"""A forward proxy on loopback, and a hub that is reached through it alone.

    with ForwardProxy() as proxy, FarHub(proxy) as hub:
        ...  # HTTP_PROXY=proxy.url, and the hub is http://hub.test, its CDN http://cdn.test

No other name than these two is known, and only the proxy knows them. With a certificate for both
they are https://, behind tunnels.
"""

from __future__ import annotations

import base64
import select
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import pytest

from tests.fakes.hub import Hub
from tests.fakes.web import Asked

_PIECE_BYTES = 256 << 10
_LOOK_S = 0.05  # whether it is over


class ForwardProxy:
    """Answers `CONNECT` and requests with a whole address, to whom it knows, and remembers them."""

    def __init__(self, user: str | None = None, password: str = "") -> None:
        self.hosts: dict[str, int] = {}  # "name:port" to a port on loopback
        self.asked: list[Asked] = []
        self.inside: list[Asked] = []  # of tunnels, as the servers at their ends hear it
        self.refuse: int | None = None  # what it answers to everybody
        self.silent = False  # it takes connections, and says nothing
        self.user, self.password = user, password
        self.ended = threading.Event()
        self._listeners: list[tuple[_Listener, threading.Thread]] = []
        self.port = self.listen()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        for listener, thread in self._listeners:
            listener.shutdown()
            thread.join(5)
            listener.server_close()

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        userinfo = "" if self.user is None else f"{self.user}:{self.password}@"
        return f"http://{userinfo}{self.name}"

    @property
    def environment(self) -> dict[str, str]:
        return {"HTTP_PROXY": self.url, "HTTPS_PROXY": self.url}

    @property
    def authorization(self) -> str | None:
        """What everybody has to tell it."""
        secret = f"{self.user}:{self.password}".encode()
        return None if self.user is None else f"Basic {base64.b64encode(secret).decode()}"

    def listen(self, certificate: Path | None = None) -> int:
        """Listen at one more port, as the servers behind it with their certificate; return it."""
        listener = _Listener(self, is_front=certificate is not None)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            listener.socket = context.wrap_socket(listener.socket, server_side=True)
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        self._listeners.append((listener, thread))
        return listener.server_port

    def methods(self) -> set[str]:
        return {asked.method for asked in self.asked}

    def told(self, header: str) -> set[str]:
        """Every value of a header that it saw."""
        return {asked.headers[header] for asked in self.asked if header in asked.headers}


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, proxy: ForwardProxy, *, is_front: bool) -> None:
        self.proxy, self.is_front = proxy, is_front
        super().__init__(("127.0.0.1", 0), _Call)

    def handle_error(self, *_: object) -> None:
        """Say nothing: who cuts a connection is what these tests are about."""


class _Call(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def log_message(self, *_: object) -> None:
        """Say nothing: the output is for the tests."""

    def do_GET(self) -> None:
        if self.server.is_front:
            self.server.proxy.inside.append(self._asked())
            self._forward(f"{self.headers['host'].partition(':')[0]}:80", self.path)
        elif self._may():
            parts = urlsplit(self.path)
            path = parts._replace(scheme="", netloc="").geturl()
            self._forward(f"{parts.hostname}:{parts.port or 80}", path)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_CONNECT(self) -> None:
        if not self._may():
            return
        with self._upstream(self.path) as upstream:
            self.send_response(200)
            self.end_headers()
            self.close_connection = True
            ends = {self.connection: upstream, upstream: self.connection}
            while not self.server.proxy.ended.is_set():
                for end in select.select([*ends], [], [], _LOOK_S)[0]:
                    data = end.recv(_PIECE_BYTES)
                    if not data:
                        return
                    ends[end].sendall(data)

    def _may(self) -> bool:
        proxy, asked = self.server.proxy, self._asked()
        proxy.asked.append(asked)
        while proxy.silent and not proxy.ended.is_set():
            proxy.ended.wait(_LOOK_S)
        wrong = asked.headers.get("proxy-authorization") != proxy.authorization
        status = proxy.refuse or (407 if wrong else None)
        if status is not None:
            self._say(status)
        return status is None

    def _asked(self) -> Asked:
        headers = {name.lower(): value for name, value in self.headers.items()}
        return Asked(self.command, self.path, headers, b"")

    def _say(self, status: int) -> None:
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()
        self.close_connection = True

    def _upstream(self, authority: str) -> socket.socket:
        port = self.server.proxy.hosts.get(authority)
        if port is None:
            self._say(502)
            raise ConnectionError(f"{authority} is not known")
        return socket.create_connection(("127.0.0.1", port))

    def _forward(self, authority: str, path: str) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        ours = ("connection", "proxy-connection", "proxy-authorization")
        kept = {name: value for name, value in self.headers.items() if name.lower() not in ours}
        kept["Connection"] = "close"
        self.close_connection = True
        with self._upstream(authority) as upstream, upstream.makefile("rb") as answer:
            lines = [f"{self.command} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in kept.items())]
            upstream.sendall("".join(f"{line}\r\n" for line in [*lines, ""]).encode() + body)
            if not (status := answer.readline()):
                return
            self.connection.sendall(status + b"Connection: close\r\n")
            while data := answer.read1(_PIECE_BYTES):
                self.connection.sendall(data)

    def finish(self) -> None:
        with suppress(OSError, ValueError):
            super().finish()


class FarHub(Hub):
    """A hub that is known by its name, behind a proxy."""

    def __init__(self, proxy: ForwardProxy, certificate: Path | None = None) -> None:
        super().__init__()
        self._scheme = "http" if certificate is None else "https"
        ports = {"hub": self._hub.port, "cdn": self._cdn.port}
        proxy.hosts |= {f"{name}.test:80": port for name, port in ports.items()}
        if certificate is not None:
            front = proxy.listen(certificate)
            proxy.hosts |= {f"{name}.test:443": front for name in ports}

    @property
    def url(self) -> str:
        return f"{self._scheme}://hub.test"

    @property
    def cdn_url(self) -> str:
        return f"{self._scheme}://cdn.test"

    @property
    def authority(self) -> str:
        return f"hub.test:{443 if self._scheme == 'https' else 80}"


def far_certificate(folder: Path) -> Path:
    """Make a certificate for a far hub and its CDN, with its key; who trusts it, trusts itself."""
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("openssl is not installed")
    pem, key = folder / "far.pem", folder / "far.key"
    made: Mapping[str, Any] = {"check": True, "capture_output": True}
    subprocess.run(
        [
            *(program, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-keyout", key, "-out", pem, "-subj", "/CN=hub.test"),
            *("-addext", "subjectAltName=DNS:hub.test,DNS:cdn.test"),
        ],
        **made,
    )
    pem.write_bytes(key.read_bytes() + pem.read_bytes())
    return pem
