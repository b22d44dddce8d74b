"""A server in a thread that answers whatever its test says, and remembers who asked."""

from __future__ import annotations

import json
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Asked:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Call(BaseHTTPRequestHandler):
    """One request under way, to be answered by the web's `answer`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def log_message(self, *_: object) -> None:
        """Say nothing: the output is for the tests."""

    def do_GET(self) -> None:
        self._take()

    def do_POST(self) -> None:
        self._take()

    def _take(self) -> None:
        length = int(self.headers.get("content-length", 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        asked = Asked(self.command, self.path, headers, self.rfile.read(length))
        self.server.web.asked.append(asked)
        try:
            self.server.web.answer(self, asked)
        except ConnectionError:
            self.close_connection = True

    def say(
        self, status: int, body: bytes = b"", kind: str = "application/json", **headers: str
    ) -> None:
        """Answer, and be done with it."""
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def json(self, body: object, status: int = 200) -> None:
        self.say(status, json.dumps(body).encode())

    def begin_events(self) -> None:
        """Begin a stream of events; `event` sends each, `[DONE]` ends it."""
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()

    def event(self, data: object) -> None:
        text = data if isinstance(data, str) else json.dumps(data)
        payload = f"data: {text}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(payload), payload))
        if data == "[DONE]":
            self.wfile.write(b"0\r\n\r\n")

    def cut(self) -> None:
        """Close the connection in the middle of whatever was said."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def until_left(self, timeout_s: float = 30.0) -> None:
        """Say nothing until the other side has gone."""
        readable, _, _ = select.select([self.connection], [], [], timeout_s)
        assert readable, "nobody left"
        self.server.web.left.append(self.path)
        self.close_connection = True


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int, web: Web) -> None:
        super().__init__(("127.0.0.1", port), Call)
        self.web = web

    def handle_error(self, *_: object) -> None:
        """Say nothing: who cuts a connection is what these tests are about."""


@dataclass
class Web:
    """Where it listens, what it was asked, and by whom it was left; `answer` may be replaced."""

    answer: Callable[[Call, Asked], None]
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def posts(self) -> list[Asked]:
        return [asked for asked in self.asked if asked.method == "POST"]


@contextmanager
def web(answer: Callable[[Call, Asked], None], port: int = 0) -> Iterator[Web]:
    served = Web(answer)
    with _Listener(port, served) as listener:
        served.url = f"http://127.0.0.1:{listener.server_port}"
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield served
        finally:
            listener.shutdown()
            thread.join(5)
