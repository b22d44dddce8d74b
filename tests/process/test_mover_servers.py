"""The mover against servers that are not like the hub, and over TLS."""

from __future__ import annotations

import os
import shutil
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.movers import mover, run_mover, waits
from tests.fakes.web import Asked, Call, web
from tests.waiting import wait_for

MIB = 1 << 20


def answered(tmp_path: Path, url: str, data: bytes = b"{}", **changes: Any) -> dict[str, Any]:
    file = {"path": "a.txt", "url": url, "size": len(data), "sha256": None, "blob_id": None}
    folder = tmp_path / ".incoming" / "job"
    order = {
        "files": [file],
        "parts": str(folder / ".parts"),
        "stage": str(folder / "tree"),
        "target": str(tmp_path / "name"),
        "manifest": {},
        "merge": False,
        "replace": [],
        "token_hosts": [],
        "parallel": 4,
        "window_bytes": 512 << 20,
        "stall_s": 20,
        "report_s": 0.05,
    }
    return order | changes


def test_chunks_without_a_length(tmp_path: Path) -> None:
    data = os.urandom(300_000)

    def answer(call: Call, asked: Asked) -> None:
        call.send_response(200)
        call.send_header("transfer-encoding", "chunked")
        call.end_headers()
        for at in range(0, len(data), 70_000):
            piece = data[at : at + 70_000]
            call.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        call.wfile.write(b"0\r\n\r\n")

    with web(answer) as server:
        order = answered(tmp_path, f"{server.url}/a", data)
        assert run_mover(order).named("done")
    assert (tmp_path / "name/a.txt").read_bytes() == data


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("file:///etc/passwd", "no web address"),
        ("ftp://127.0.0.1/a", "no web address"),
        ("http://127.0.0.1:99999/a", "no web address"),
        ("http://[::1/a", "no web address"),
    ],
)
def test_redirects_that_lead_nowhere(tmp_path: Path, location: str, words: str) -> None:
    with web(lambda call, _: call.say(302, location=location)) as server:
        said = run_mover(answered(tmp_path, f"{server.url}/a"))
    assert said.process.returncode == 3
    assert said.failure is not None
    assert said.failure["code"] == "refused"
    assert words in said.failure["message"]


def test_redirect_in_a_circle_is_left(tmp_path: Path) -> None:
    with web(lambda call, _: call.say(302, location="/a")) as server:
        with mover(answered(tmp_path, f"{server.url}/a")) as said:
            wait_for(lambda: said.named("waiting"))
            assert "circle" in said.named("waiting")[0]["why"]
        assert len(server.asked) == 5


@pytest.mark.parametrize(
    "headers",
    [
        {"content_range": "bytes 1-2/2"},
        {"content_range": "nonsense"},
        {"content_range": f"bytes {'9' * 5000}-1/2"},
        {"content_range": f"bytes 0-1/{'9' * 5000}"},
        {"content_encoding": "gzip", "content_range": "bytes 0-1/2"},
    ],
)
def test_answers_that_make_no_sense_bring_nothing(tmp_path: Path, headers: dict[str, str]) -> None:
    told = {name.replace("_", "-"): value for name, value in headers.items()}
    with web(lambda call, _: call.say(206, b"no", **told)) as server:
        order = answered(tmp_path, f"{server.url}/a")
        with mover(order) as said:
            wait_for(lambda: said.named("waiting") or said.named("failed"))
        assert said.done == {"a.txt": 0}


@pytest.mark.parametrize("gmt", [True, False])
def test_retry_after_as_a_date(tmp_path: Path, gmt: bool) -> None:
    told = {"retry-after": formatdate(time.time() + 30, usegmt=gmt)}
    with (
        web(lambda call, _: call.say(429, **told)) as server,
        mover(answered(tmp_path, f"{server.url}/a")) as said,
    ):
        wait_for(lambda: said.named("waiting"))
    assert 20 <= waits(said)[0] <= 30


@pytest.mark.parametrize("year", ["99999", "9" * 30])
def test_retry_after_as_no_date(tmp_path: Path, year: str) -> None:
    told = {"retry-after": f"Mon, 01 Jan {year} 00:00:00 GMT"}
    with (
        web(lambda call, _: call.say(429, **told)) as server,
        mover(answered(tmp_path, f"{server.url}/a")) as said,
    ):
        wait_for(lambda: said.named("waiting"))
    assert waits(said)[0] == 0.5


def test_rate_limit_in_the_hubs_own_words(tmp_path: Path) -> None:
    told = {"ratelimit": '"resolvers";r=0;t=7'}
    with (
        web(lambda call, _: call.say(429, **told)) as server,
        mover(answered(tmp_path, f"{server.url}/a")) as said,
    ):
        wait_for(lambda: said.named("waiting"))
    assert waits(said)[0] == 7


# TLS


class _Slowly(BaseHTTPRequestHandler):
    """Answers the range it is asked for, a little at a time, until it is told to hurry."""

    data = b""
    hurry = threading.Event()

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        first, last = self.headers["range"].removeprefix("bytes=").split("-")
        start, end = int(first), int(last) + 1
        self.send_response(206)
        self.send_header("content-range", f"bytes {start}-{end - 1}/{len(self.data)}")
        self.send_header("content-length", str(end - start))
        self.end_headers()
        for at in range(start, end, 50_000):
            self.wfile.write(self.data[at : min(at + 50_000, end)])
            self.hurry.wait(0.005)


class _Secure(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_: object) -> None:
        """Say nothing: who cuts a connection is what these tests are about."""


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("openssl is not installed")
    pem = tmp_path / "server.pem"
    subprocess.run(
        [
            *(program, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-keyout", pem, "-out", tmp_path / "cert.pem", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    pem.write_bytes(pem.read_bytes() + (tmp_path / "cert.pem").read_bytes())
    return pem


@contextmanager
def secure_server(certificate: Path, data: bytes) -> Iterator[str]:
    handler = type("Handler", (_Slowly,), {"data": data, "hurry": threading.Event()})
    with _Secure(("127.0.0.1", 0), handler) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"https://127.0.0.1:{server.server_port}/a"
        finally:
            handler.hurry.set()
            server.shutdown()
            thread.join(5)


def test_stopped_in_the_middle_of_tls_it_keeps_plain_bytes_only(
    tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(8 * MIB)
    env = {"PATH": os.environ["PATH"], "SSL_CERT_FILE": str(certificate)}
    with secure_server(certificate, data) as url:
        order = answered(tmp_path, url, data)
        for _ in range(3):
            with mover(order, env=env) as said:
                before = wait_for(lambda: said.named("progress") and said.done["a.txt"] + 1)
                said.until_bytes(before + 500_000)
                said.process.send_signal(signal.SIGTERM)
                assert said.wait() == 0
            part = next(Path(order["parts"]).iterdir()).read_bytes()
            assert part == data[: len(part)]
            assert len(part) >= 500_000


def test_certificate_nobody_trusts_is_refused(tmp_path: Path, certificate: Path) -> None:
    with secure_server(certificate, b"{}") as url:
        said = run_mover(answered(tmp_path, url))
    assert said.failure is not None
    assert said.failure["code"] == "refused"
    assert "certificate" in said.failure["message"]
