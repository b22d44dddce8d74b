"""An Ollama as its documentation has it: no binary of it can be had here.

Written from docs/api.md (as of commit 01e52d2), docs/openapi.yaml (017eb8a) and docs/openai.md
(000ce02) of ollama/ollama: `/api/tags`, `/api/ps`, `/api/version`, `/api/show`, `/api/generate`
to load (without a prompt) and to unload (`keep_alive: 0`), and the OpenAI side of it. A model
that is asked for is loaded first, as there, and then stays for `keep_alive`. Models for embeddings
and the case of names are as server/routes.go (0018813) has them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.fakes.web import Asked, Call, Web, web

GIB = 1 << 30
DEFAULT_KEEP_ALIVE_S = 300.0
FOR_EVER = timedelta(days=292 * 365)  # what a negative keep_alive becomes
DETAILS = {
    "parent_model": "",
    "format": "gguf",
    "family": "llama",
    "families": ["llama"],
    "parameter_size": "3.2B",
    "quantization_level": "Q4_K_M",
}


@dataclass
class Ollama:
    """What it has, what it holds in memory, and how it behaves.

    `load_s` is how long a load takes, `busy_s` how long a model goes on after it was told to
    leave.
    """

    models: dict[str, int] = field(default_factory=lambda: {"llama3.2:latest": 2 * GIB})
    embedders: frozenset[str] = frozenset()  # those of them that generate nothing
    running: dict[str, datetime] = field(default_factory=dict)
    load_s: float = 0.0
    busy_s: float = 0.0
    web: Web = field(init=False)

    @property
    def url(self) -> str:
        return self.web.url

    def answer(self, call: Call, asked: Asked) -> None:
        match asked.method, asked.path:
            case "GET", "/":
                call.say(200, b"Ollama is running", "text/plain; charset=utf-8")
            case "GET", "/api/version":
                call.json({"version": "0.12.6"})
            case "GET", "/api/tags":
                call.json({"models": [self._tag(name) for name in self.models]})
            case "GET", "/api/ps":
                call.json({"models": [self._process(name) for name in self.running]})
            case "GET", "/v1/models":
                call.json({"object": "list", "data": [self._listed(n) for n in self.models]})
            case "POST", "/api/show":
                self._show(call, asked.json)
            case "POST", "/api/generate":
                self._generate(call, asked.json)
            case "POST", "/api/embed":
                self._load_embedder(call, asked.json)
            case "POST", "/v1/chat/completions":
                self._chat(call, asked.json)
            case "POST", "/v1/completions":
                self._complete(call, asked.json)
            case "POST", "/v1/embeddings":
                self._embed(call, asked.json)
            case _:
                call.say(404, b"404 page not found", "text/plain")

    # Its own calls.

    def _tag(self, name: str) -> dict[str, Any]:
        return {
            "name": name,
            "model": name,
            "modified_at": "2025-10-03T23:34:03.409490317-07:00",
            "size": self.models[name],
            "digest": "a" * 64,
            "details": DETAILS,
        }

    def _process(self, name: str) -> dict[str, Any]:
        return {
            "name": name,
            "model": name,
            "size": 3 * GIB,
            "digest": "a" * 64,
            "details": DETAILS,
            "expires_at": self.running[name].isoformat(),
            "size_vram": 2 * GIB,
            "context_length": 4096,
        }

    def _show(self, call: Call, asked: dict[str, Any]) -> None:
        if _tagged(asked["model"]) not in self.models:
            call.json({"error": f"model '{asked['model']}' not found"}, 404)
            return
        info = {"general.architecture": "llama", "llama.context_length": 131_072}
        call.json({"details": DETAILS, "model_info": info, "capabilities": ["completion"]})

    def _generate(self, call: Call, asked: dict[str, Any]) -> None:
        name = _tagged(asked["model"])
        if name not in self.models:
            call.json({"error": f"model '{asked['model']}' not found"}, 404)
            return
        assert not asked.get("prompt"), "the gateway has nothing to say here"
        answer = {
            "model": asked["model"],
            "created_at": datetime.now(UTC).isoformat(),
            "response": "",
            "done": True,
        }
        if asked.get("keep_alive") == 0:
            if self.busy_s:
                threading.Timer(self.busy_s, self.running.pop, (name, None)).start()
            else:
                self.running.pop(name, None)
            call.json(answer | {"done_reason": "unload"})
            return
        if name in self.embedders:
            call.json({"error": f'"{asked["model"]}" does not support generate'}, 400)
            return
        self._load(name, asked.get("keep_alive"))
        call.json(answer | {"done_reason": "load"})

    def _load_embedder(self, call: Call, asked: dict[str, Any]) -> None:
        assert asked["input"] == "", "the gateway has nothing to say here"
        self._load(_tagged(asked["model"]), asked.get("keep_alive"))
        call.json({"model": asked["model"], "embeddings": []})

    def _load(self, name: str, keep_alive_s: float | None = None) -> None:
        if name not in self.running:
            time.sleep(self.load_s)
        stays = timedelta(seconds=DEFAULT_KEEP_ALIVE_S if keep_alive_s is None else keep_alive_s)
        if stays < timedelta(0):
            stays = FOR_EVER
        self.running[name] = datetime.now(UTC) + stays

    # OpenAI's.

    def _listed(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 1_759_559_643, "owned_by": "library"}

    def _found(self, call: Call, asked: dict[str, Any]) -> bool:
        if _tagged(asked["model"]) in self.models:
            self._load(_tagged(asked["model"]))
            return True
        message = f"model '{asked['model']}' not found"
        error = {"message": message, "type": "not_found_error", "param": None, "code": None}
        call.json({"error": error}, 404)
        return False

    def _chat(self, call: Call, asked: dict[str, Any]) -> None:
        if not self._found(call, asked):
            return
        words = [f"word{number} " for number in range(asked.get("max_tokens") or 3)]
        if not asked.get("stream"):
            message = {"role": "assistant", "content": "".join(words)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            usage = {"prompt_tokens": 1, "completion_tokens": len(words)}
            call.json(_envelope(asked, "chat.completion", choice) | {"usage": usage})
            return
        call.begin_events()
        for word in words:
            delta = {"role": "assistant", "content": word}
            choice = {"index": 0, "delta": delta, "finish_reason": None}
            call.event(_envelope(asked, "chat.completion.chunk", choice))
        last = {"index": 0, "delta": {"content": ""}, "finish_reason": "stop"}
        call.event(_envelope(asked, "chat.completion.chunk", last))
        call.event("[DONE]")

    def _complete(self, call: Call, asked: dict[str, Any]) -> None:
        if self._found(call, asked):
            choice = {"index": 0, "text": "word0 word1", "finish_reason": "stop"}
            call.json(_envelope(asked, "text_completion", choice))

    def _embed(self, call: Call, asked: dict[str, Any]) -> None:
        if self._found(call, asked):
            data = [{"object": "embedding", "embedding": [0.5, -0.5], "index": 0}]
            usage = {"prompt_tokens": 1, "total_tokens": 1}
            call.json({"object": "list", "data": data, "model": asked["model"], "usage": usage})


def _tagged(name: str) -> str:
    return (name if ":" in name else f"{name}:latest").lower()


def _envelope(asked: dict[str, Any], kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": kind,
        "created": int(time.time()),
        "model": asked["model"],
        "system_fingerprint": "fp_ollama",
        "choices": [choice],
    }


@contextmanager
def ollama(port: int = 0, **behaviour: Any) -> Iterator[Ollama]:
    fake = Ollama(**behaviour)
    with web(fake.answer, port) as fake.web:
        yield fake
