"""The real server as a process, and what tests ask of it and of its engines."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import httpx2
import psutil

from tests.fakes.processes import all_gone, is_gone, paused
from tests.waiting import wait_for

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache" / "models"
STARTER = "smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = f"/models/{STARTER}"
ENGINE_MODULE = "xandrouting.engines.llamacpp_server"
START_TIMEOUT_S = 30.0
HELD_BYTES = 48 << 20  # more than a runner takes before it loads, and a part of what it takes then
STOP_TIMEOUT_S = 40.0


@functools.cache
def starter() -> Path:
    """Return the starter model's file; it is fetched when it is not there yet."""
    path = CACHE / STARTER
    if not path.exists():
        script = ROOT / "scripts" / "fetch_starter.py"
        subprocess.run([sys.executable, str(script), str(CACHE)], check=True, timeout=100)
    assert path.exists(), "the starter model could not be fetched: `make test` needs it once"
    return path


def models_dir(root: Path, *names: str) -> Path:
    """Fill `root` with the starter model under each name; without a name, under its own.

    They are hard links where that is possible: remove a file before you write it.
    """
    for name in names or (STARTER,):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            link_or_copy(starter(), path)
    root.mkdir(parents=True, exist_ok=True)
    return root


def link_or_copy(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def clean_environment() -> dict[str, str]:
    """Return our environment without what the server would read as settings."""
    bare = (
        *("HOST", "PORT", "MODELS_DIR", "DEFAULT_TTL", "CORS_ORIGINS", "OLLAMA_BASE_URL"),
        *("HF_ENDPOINT", "HF_TOKEN"),
    )
    return {
        name: value
        for name, value in os.environ.items()
        if name not in bare and not name.startswith("XANDROUTING_")
    }


class Server:
    """`xandrouting serve` on a free port. Use as a context, or call `start` and `close`.

    Settings are keywords: `max_loaded=1` is `XANDROUTING_MAX_LOADED=1`. `environment` goes over
    ours; `answer_s` is how long a call may take.
    """

    def __init__(
        self,
        models: Path,
        data: Path,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        answer_s: float = 30.0,
        **settings: object,
    ) -> None:
        self.models = models
        self.data = data
        self._arguments = arguments
        self._environment = environment or {}
        self._answer_s = answer_s
        self._settings = settings
        self._process: psutil.Popen | None = None
        self._client: httpx2.Client | None = None
        self.url = ""

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> Self:
        """Start it and return when it serves."""
        stdout = self.launch()
        try:
            wait_for(lambda: "\n" in stdout.read_text() or is_gone(self.process), START_TIMEOUT_S)
            word, _, url = stdout.read_text().partition("\n")[0].partition(" ")
            assert word == "ready", f"the server did not start:\n{self.log()}"
        except AssertionError:
            self.close()
            raise
        self.url = url
        self._client = httpx2.Client(
            base_url=url,
            timeout=self._answer_s,
            trust_env=False,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
        )
        return self

    def refuses_to_start(self) -> str:
        """Start it where it cannot serve; return what it says."""
        stdout = self.launch()
        try:
            assert self.wait(START_TIMEOUT_S) == 2
            assert stdout.read_text() == ""
        finally:
            self.close()
        return self.log()

    def launch(self) -> Path:
        """Begin its process; return the file its stdout goes to."""
        self.data.mkdir(parents=True, exist_ok=True)
        settings = {f"XANDROUTING_{n.upper()}": str(v) for n, v in self._settings.items()}
        folders = ("--models-dir", str(self.models), "--data-dir", str(self.data))
        argv = [sys.executable, "-m", "xandrouting", "serve", *folders]
        settings.setdefault("XANDROUTING_PORT", "0")
        stdout, stderr = self.data / "stdout", self.data / "stderr"
        with stdout.open("wb") as out, stderr.open("ab") as log:
            self._process = psutil.Popen(
                [*argv, *self._arguments],
                env={**clean_environment(), **self._environment, **settings},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                cwd=self.data,
            )
        return stdout

    def close(self) -> None:
        """End it whatever it does, and show what it logged (pytest shows it on failure)."""
        if self._client is not None:
            self._client.close()
        if self._process is not None:
            tree = self.everything()
            if self._process.poll() is None:
                self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except psutil.TimeoutExpired:
                self._process.kill()
                self._process.wait(STOP_TIMEOUT_S)
            wait_for(all_gone(tree), 10.0)
        print(self.log(), file=sys.stderr)

    # The process.

    @property
    def process(self) -> psutil.Popen:
        assert self._process is not None, "not started"
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Send SIGTERM; return the exit status."""
        self.signal()
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Wait for its end; return the exit status."""
        return int(self.process.wait(timeout_s))

    def kill9(self) -> None:
        self.process.kill()
        self.process.wait(5)

    def log(self) -> str:
        """Return what it wrote to stderr so far."""
        path = self.data / "stderr"
        return path.read_text(errors="replace") if path.exists() else ""

    def starts(self, model: str = "") -> int:
        """Return how many engines it started, of `model` or of all, by its log."""
        return self.log().count(f"engine starting engine={model}")

    def everything(self) -> list[psutil.Process]:
        """Return every process below it: guards, engines, their children, and spares."""
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def tree(self) -> list[psutil.Process]:
        """Return the engines' guards, and every process below those. It must serve."""
        guards = [psutil.Process(process.ppid()) for process in self.engines()]
        return [p for guard in guards for p in (guard, *guard.children(recursive=True))]

    def engines(self, model: str = "") -> list[psutil.Process]:
        """Return the engines' processes, of `model` or all, without guards and spares."""
        pids = {item["pid"] for item in self.loaded() if model in ("", item["path"])}
        return [process for process in self.everything() if process.pid in pids]

    def runners(self) -> list[psutil.Process]:
        """Return the processes of llama.cpp's engines, and the spares."""
        return [process for process in self.everything() if is_engine(process)]

    def engine_processes(self, model: str = "") -> list[EngineProcess]:
        """Return the engines, of `model` or all, to be asked directly: they must listen."""
        return [EngineProcess.of(process) for process in self.engines(model)]

    def engine(self, model: str = "") -> EngineProcess:
        """Return the only engine, of `model` or of all."""
        [engine] = self.engine_processes(model)
        return engine

    # Calls.

    @property
    def client(self) -> httpx2.Client:
        assert self._client is not None, "not started"
        return self._client

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return self.client.get(path, **options)

    def post(self, path: str, body: object = None, **options: Any) -> httpx2.Response:
        return self.client.post(path, json=body, **options)

    def chat(self, text: str = "Hi", **fields: Any) -> httpx2.Response:
        """Ask a chat question; `fields` go into the body and over its defaults."""
        return self.post("/v1/chat/completions", chat_body(text, **fields))

    @contextmanager
    def stream(self, text: str = "Hi", **fields: Any) -> Iterator[Stream]:
        """Ask a chat question and read the answer as it comes."""
        body = chat_body(text, **{"stream": True, **fields})
        with self.client.stream("POST", "/v1/chat/completions", json=body) as response:
            yield Stream(response)

    @contextmanager
    def events(self, last_id: str | None = None, **query: str) -> Iterator[Events]:
        """Listen to what happens."""
        headers = {} if last_id is None else {"last-event-id": last_id}
        with self.client.stream("GET", "/v1/events", params=query, headers=headers) as response:
            yield Events(response)

    def load(self, model: str = MODEL, **fields: Any) -> dict[str, Any]:
        return ok(self.post("/v1/models/load", {"model": model, **fields}))

    def unload(self, model: str = MODEL, **fields: Any) -> httpx2.Response:
        return self.post("/v1/models/unload", {"model": model, **fields})

    def plan(self, model: str = MODEL, **fields: Any) -> dict[str, Any]:
        return ok(self.post("/v1/models/plan", {"model": model, **fields}))

    def pin(self, model: str = MODEL, pinned: bool = True) -> dict[str, Any]:
        return ok(self.post("/v1/models/pin", {"model": model, "pinned": pinned}))

    def loaded(self) -> list[dict[str, Any]]:
        models: list[dict[str, Any]] = ok(self.get("/v1/models/loaded"))["models"]
        return models

    def system(self) -> dict[str, Any]:
        return ok(self.get("/v1/system"))

    def stats(self) -> dict[str, Any]:
        return ok(self.get("/v1/models/stats"))


@dataclass(frozen=True)
class EngineProcess:
    """One engine, asked without the gateway between."""

    process: psutil.Process
    port: int
    key: str

    @classmethod
    def of(cls, process: psutil.Process) -> Self:
        environment = process.environ()
        key = environment.get("VLLM_API_KEY") or environment["XANDROUTING_ENGINE_KEY"]
        sockets = process.net_connections("tcp")
        [port] = [s.laddr.port for s in sockets if s.status == psutil.CONN_LISTEN]
        return cls(process, port, key)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def get(self, path: str) -> Any:
        answer = httpx2.get(f"{self.url}{path}", headers=self.headers, trust_env=False)
        return ok(answer)

    def slots(self) -> list[dict[str, Any]]:
        slots: list[dict[str, Any]] = self.get("/slots")
        return slots

    def busy(self) -> int:
        """Return how many of its slots work."""
        return sum(slot["is_processing"] for slot in self.slots())


class Stream:
    """The events of an answer, as far as they have come."""

    def __init__(self, response: httpx2.Response) -> None:
        self.response = response
        self._lines = response.iter_lines()

    def __iter__(self) -> Iterator[str]:
        """Yield what stands behind each `data: `.

        llama.cpp writes an empty comment whenever a second brought no token.
        """
        for line in self._lines:
            if line not in ("", ":"):
                assert line.startswith("data: "), line
                yield line.removeprefix("data: ")

    def first(self) -> str:
        return next(iter(self))

    def rest(self) -> list[str]:
        return list(self)


class Events:
    """The events of `GET /v1/events`, as far as they are read."""

    def __init__(self, response: httpx2.Response) -> None:
        assert response.status_code == 200, response.read()
        self._lines = response.iter_lines()
        self.last_id = ""

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield each event's kind and data; comments and `retry` are passed over."""
        fields: dict[str, str] = {}
        for line in self._lines:
            name, _, value = line.partition(": ")
            if line:
                fields[name] = value
            elif "data" in fields:
                self.last_id = fields["id"]
                yield fields["event"], json.loads(fields["data"])
                fields = {}

    def until(
        self, wanted: Callable[[str, dict[str, Any]], bool], timeout_s: float = 15.0
    ) -> dict[str, Any]:
        """Read on to the first event that is wanted, and return its data.

        A gauge comes every two seconds, so nothing is waited for in vain for long.
        """
        deadline = time.monotonic() + timeout_s
        seen = []
        for kind, data in self:
            if wanted(kind, data):
                return data
            seen.append((kind, data.get("event") or data.get("kind")))
            assert time.monotonic() < deadline, f"not among {seen}"
        raise AssertionError(f"the stream ended: {seen}")


def when(text: str) -> float:
    """Return the wall time of a time as the server tells it."""
    assert text.endswith("Z")
    return datetime.fromisoformat(text).timestamp()


def is_engine(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[1:3] == ["-m", ENGINE_MODULE]
    except psutil.Error:
        return False


def chat_body(text: str = "Hi", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "messages": messages, "max_tokens": 8, "temperature": 0} | fields


def ok(response: httpx2.Response, status: int = 200) -> Any:
    """Return what the answer holds; fail when it is not what was expected."""
    assert response.status_code == status, f"{response.status_code} {response.text[:2000]}"
    return response.json()


def text_of(response: httpx2.Response) -> str:
    text: str = ok(response)["choices"][0]["message"]["content"]
    return text


def error_of(response: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """Return the error object; fail unless the answer is that error, whole and harmless."""
    assert response.status_code == status, f"{response.status_code} {response.text[:2000]}"
    return check_error(response.json(), code)


def check_error(body: dict[str, Any], code: str) -> dict[str, Any]:
    error: dict[str, Any] = body["error"]
    assert error["code"] == code, error
    message = error["message"]
    assert body["detail"] == message
    assert isinstance(message, str)
    assert message
    assert error["type"]
    assert "param" in error
    for word in ("JSON", "Unexpected", "Traceback", str(ROOT), "/tmp", ".py"):
        assert word not in message, message
    return error


def deltas(events: list[str]) -> str:
    """Return the text of a stream's events up to [DONE]."""
    chunks = [json.loads(event) for event in events if event != "[DONE]"]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


@contextmanager
def story(server: Server, model: str = MODEL, **fields: Any) -> Iterator[Stream]:
    """Have a model generate for a second or more; the first word is there."""
    fields = {"max_tokens": 100, "ignore_eos": True} | fields
    with server.stream("Tell me a long story.", model=model, **fields) as stream:
        assert stream.response.status_code == 200
        stream.first()
        yield stream


@contextmanager
def held(server: Server, model: str = MODEL) -> Iterator[psutil.Process]:
    """Stop the process of a model's engine that loads, for as long as the block.

    Enough of it is there by then for a percentage over 0.
    """
    [process] = wait_for(lambda: server.engines(model), 10)
    wait_for(lambda: process.memory_info().rss > HELD_BYTES)
    with paused(process):
        yield process


@contextmanager
def held_load(server: Server, model: str = MODEL, **fields: Any) -> Iterator[Future[Any]]:
    """Ask for a load and stop its engine's process in the middle, for as long as the block."""
    with together(1) as pool:
        asked = pool.submit(server.chat, model=model, **fields)
        with held(server, model):
            assert not asked.done()
            yield asked


@contextmanager
def together(count: int) -> Iterator[ThreadPoolExecutor]:
    """Run calls at the same time; leaving waits for all of them."""
    with ThreadPoolExecutor(count) as pool:
        yield pool


def results(futures: list[Future[Any]], timeout_s: float = 60.0) -> list[Any]:
    return [future.result(timeout_s) for future in futures]
