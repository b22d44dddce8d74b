"""A real process that answers like an engine, and misbehaves on request.

`python fake_engine.py --port N [...]`; standard library only. Beside an engine's own addresses
`GET /seen` lists what happened to the requests: `{"event": E, "request": N}` with E one of
`started`, `left` (the client went before the answer was complete) and `finished`.

With `--sleep-mode` it also answers the calls of vLLM's sleep mode, as vLLM does: what it has of a
card is the number in its `--card-file`. Its answers are garbage while it sleeps, or where a
wake forgot something.

With `--orders` it says that it waits, and reads the rest of its options from a line of stdin. Told
`rest` it starts over; when stdin ends, so does it.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

DEFAULT_TOKENS = 16
ALLOCATE = (
    "held = bytearray(b'x') * ({mib} << 20); print(flush=True); import time; time.sleep(3600)"
)
WAITING_LINE = "fake engine waiting"
COMPLETIONS = "/v1/chat/completions"
SLEEP_CALLS = ("sleep", "wake_up", "collective_rpc", "reset_prefix_cache")
HALF_MEGABYTE = 512 * 1024


class ClientLeft(Exception):
    """Nobody is there to take the answer."""


class Card:
    """What it has of a card, in a file; and how much of it sleeps."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self.asleep: set[str] = set()
        self.garbage = False  # the memory of its weights is there and empty
        self.stale = False  # it takes its cache for what it was
        self.leaks = False
        self.write()

    @property
    def sound(self) -> bool:
        return not (self.asleep or self.garbage or self.stale)

    def write(self) -> None:
        if self._options.card_file is None:
            return
        sizes = {"weights": self._options.weights_mib, "kv_cache": self._options.cache_mib}
        awake = sizes.values() if self.leaks else (sizes[t] for t in sizes.keys() - self.asleep)
        told = json.dumps([os.getpid(), sum(awake) << 20])
        fresh = Path(f"{self._options.card_file}.new")
        fresh.write_text(told)
        fresh.replace(self._options.card_file)

    def sleep(self, level: int) -> None:
        if self.asleep:
            return  # vLLM answers, and does nothing
        time.sleep(self._options.sleep_s)
        self.asleep = {"weights", "kv_cache"}
        self.garbage, self.stale = level == 2, True
        self.leaks = level in self._options.sleep_leaks
        self.write()

    def wake(self, tags: set[str]) -> None:
        time.sleep(self._options.wake_s)
        self.asleep -= tags
        self.write()


class Engine(ThreadingHTTPServer):
    """The server and what all its requests share."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(("127.0.0.1", options.port), Handler)
        self.options = options
        self.loaded = threading.Event()
        self.seen: list[dict[str, Any]] = []
        self.held = bytearray()
        self.card = Card(options)
        self._requests = 0
        self._lock = threading.Lock()

    @property
    def api_key(self) -> str | None:
        name = self.options.api_key_env
        return os.environ[name] if name else None

    def begin(self) -> int:
        with self._lock:
            self._requests += 1
            self.note("started", self._requests)
            return self._requests

    def note(self, event: str, request: int) -> None:
        self.seen.append({"event": event, "request": request})


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Engine

    def log_message(self, *_: object) -> None:
        """Say nothing: the output is for the tests."""

    def do_GET(self) -> None:
        if self.path == "/health" and self.server.loaded.is_set():
            self.answer(200, {"status": "ok"})
        elif self.path == "/health":
            self.answer(503, {"error": {"message": "Loading model"}})
        elif self.path == "/seen":
            self.answer(200, self.server.seen)
        elif self.path == "/is_sleeping" and self.server.options.sleep_mode:
            self.answer(200, {"is_sleeping": bool(self.server.card.asleep)})
        else:
            self.answer(404, {"error": {"message": "File Not Found"}})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        key = self.server.api_key
        call, _, query = self.path.removeprefix("/").partition("?")
        if key is not None and self.headers.get("authorization") != f"Bearer {key}":
            self.answer(401, {"error": {"message": "Invalid API Key"}})
        elif self.path == COMPLETIONS and self.server.card.sound:
            self.complete(json.loads(body))
        elif self.path == COMPLETIONS:
            self.answer(500, {"error": {"message": "it would answer with garbage"}})
        elif self.server.options.sleep_mode and call in SLEEP_CALLS:
            self.server.seen.append({"event": f"{call} {query}".strip(), "request": 0})
            self.sleep_call(call, query, body)
        else:
            self.answer(404, {"error": {"message": "File Not Found"}})

    def sleep_call(self, call: str, query: str, body: bytes) -> None:
        options, card = self.server.options, self.server.card
        if call in options.fails:
            self.answer(500, {"error": "it does not"})
            return
        while call in options.hangs:
            time.sleep(3600)
        match call:
            case "sleep":
                level = int(query.removeprefix("level=").partition("&")[0])
                card.sleep(level)
                self.answer(200, {"status": "sleeping", "level": level})
            case "wake_up":
                tag = query.removeprefix("tags=")
                card.wake({tag} if tag else {"weights", "kv_cache"})
                status = "sleeping" if card.asleep else "awake"
                self.answer(200, {"status": status, "tags": [tag] if tag else None})
            case "collective_rpc":
                card.garbage = json.loads(body) != {"method": "reload_weights"}
                self.answer(200, {"results": [None]})
            case "reset_prefix_cache":
                card.stale = False
                self.answer(200, {"success": True})

    def complete(self, asked: dict[str, Any]) -> None:
        request = self.server.begin()
        try:
            if asked.get("stream"):
                self.stream(asked)
            else:
                self.while_connected(asked.get("fake_delay_s", 0.0))
                self.answer(200, completion(asked))
        except (ClientLeft, ConnectionError):
            self.server.note("left", request)
            self.close_connection = True
        else:
            self.server.note("finished", request)

    def stream(self, asked: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.while_connected(asked.get("fake_delay_s", 0.0))
        for number in range(tokens(asked)):
            self.event(json.dumps(delta(asked, {"content": f"word{number} "}, None)))
            if self.server.options.die_after == number + 1:
                os._exit(9)
            self.while_connected(self.server.options.token_ms / 1000)
        self.event(json.dumps(delta(asked, {}, "stop")))
        self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def event(self, data: str) -> None:
        payload = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(payload), payload))

    def while_connected(self, seconds: float) -> None:
        """Let time pass, as a working engine would; end it when the client leaves."""
        if select.select([self.connection], [], [], seconds)[0]:
            if not self.connection.recv(1, socket.MSG_PEEK):
                raise ClientLeft
            time.sleep(seconds)  # it is there, and already asks the next thing

    def answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def tokens(asked: dict[str, Any]) -> int:
    return int(asked.get("max_tokens") or DEFAULT_TOKENS)


def envelope(asked: dict[str, Any], kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    return {
        "choices": [{"index": 0, **choice}],
        "created": int(time.time()),
        "id": "chatcmpl-fake",
        "model": asked.get("model"),
        "object": kind,
    }


def delta(asked: dict[str, Any], content: dict[str, str], finish: str | None) -> dict[str, Any]:
    return envelope(asked, "chat.completion.chunk", {"finish_reason": finish, "delta": content})


def completion(asked: dict[str, Any]) -> dict[str, Any]:
    count = tokens(asked)
    content = "".join(f"word{number} " for number in range(count))
    choice = {"finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    usage = {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1}
    return envelope(asked, "chat.completion", choice) | {"usage": usage, "echo": asked}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--load-s", type=float, default=0.0)
    parser.add_argument("--ready-line", default="fake engine ready")
    parser.add_argument("--ignore-sigterm", action="store_true")
    parser.add_argument("--with-child", action="store_true")
    parser.add_argument("--die-after", type=int)
    parser.add_argument("--stall", action="store_true")
    parser.add_argument("--big-stderr", action="store_true")
    parser.add_argument("--exit", type=int, dest="exit_status")
    parser.add_argument("--say", default="fake engine failed")
    parser.add_argument("--token-ms", type=float, default=0.0)
    parser.add_argument("--api-key-env")
    parser.add_argument("--allocate-mib", type=int)
    parser.add_argument("--big-mib", type=int, default=0)
    parser.add_argument("--sleep-mode", action="store_true")
    parser.add_argument("--card-file")
    parser.add_argument("--weights-mib", type=int, default=0)
    parser.add_argument("--cache-mib", type=int, default=0)
    parser.add_argument("--sleep-s", type=float, default=0.0)
    parser.add_argument("--wake-s", type=float, default=0.0)
    parser.add_argument("--sleep-leaks", type=int, nargs="*", default=[], help="at these levels")
    parser.add_argument("--fails", nargs="*", default=[], help="these calls")
    parser.add_argument("--hangs", nargs="*", default=[], help="these calls")
    parser.add_argument("--orders", action="store_true")
    parser.add_argument("--deaf-to-orders", action="store_true")
    return parser.parse_args(arguments)


def wait_for_order() -> list[str]:
    print(WAITING_LINE, flush=True)
    order = sys.stdin.readline()
    if not order:
        sys.exit(0)
    return shlex.split(order)


def follow_orders() -> None:
    """Rest when told to. Returns when nobody is there to tell."""
    while line := sys.stdin.readline():
        if line == "rest\n":
            os.execv(sys.executable, [sys.executable, *sys.argv])


def take_sigterm(ignore: bool) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN if ignore else lambda *_: os._exit(0))


def make_child() -> None:
    """Leave a process in a session of its own that inherits a deaf ear for SIGTERM."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "3600"], start_new_session=True)
    signal.signal(signal.SIGTERM, before)
    print(f"child {child.pid}", flush=True)


def allocate(mib: int) -> bytearray:
    """Take so much memory, written to so that it is really taken, and a child as much again."""
    command = [sys.executable, "-c", ALLOCATE.format(mib=mib)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert child.stdout
    child.stdout.readline()  # it has
    return bytearray(b"x") * (mib << 20)


def write_much() -> None:
    line = "x" * 63 + "\n"
    sys.stderr.write(line * (HALF_MEGABYTE // len(line)))
    sys.stderr.write("y" * HALF_MEGABYTE + "\n")
    sys.stderr.flush()


def main() -> int:
    arguments = sys.argv[1:]
    if "--orders" in arguments:
        arguments += wait_for_order()
    options = parse(arguments)
    take_sigterm(options.ignore_sigterm)
    if options.exit_status is not None:
        print(options.say, file=sys.stderr, flush=True)
        return int(options.exit_status)
    engine = Engine(options)
    threading.Thread(target=engine.serve_forever, daemon=True).start()
    if options.with_child:
        make_child()
    if options.allocate_mib:
        engine.held = allocate(options.allocate_mib)
    if options.big_mib:
        engine.held = bytearray(b"x") * (options.big_mib << 20)
    if options.big_stderr:
        write_much()
    if not options.stall:
        time.sleep(options.load_s)
        engine.loaded.set()
        print(options.ready_line, flush=True)
    if options.orders and not options.deaf_to_orders:
        follow_orders()
        return 0
    while True:
        signal.pause()


if __name__ == "__main__":
    sys.exit(main())
