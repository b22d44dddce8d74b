"""Switching fast: spares, sleepers, parked conversations, files read ahead."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import OTHER, Serve
from tests.fakes.processes import all_gone, freeze
from tests.server import MODEL, STARTER, Server, chat_body, held, ok, story, together
from tests.waiting import wait_for

LONG = "The sea is wide and deep. " * 60  # more tokens than are parked at least
NAMES = (STARTER, OTHER.removeprefix("/models/"))


def ask(server: Server, messages: list[dict[str, str]], **fields: Any) -> dict[str, Any]:
    """Ask with a whole conversation; return the answer."""
    body = chat_body(max_tokens=4, messages=messages, **fields)
    answer: dict[str, Any] = ok(server.post("/v1/chat/completions", body))
    return answer


def cached(answer: dict[str, Any]) -> int:
    tokens: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


class Conversation:
    """A long one, that goes on."""

    def __init__(self, server: Server, **fields: Any) -> None:
        self.server = server
        self.fields = fields
        self.messages = [{"role": "user", "content": LONG}]
        self.first = self.go_on()

    def go_on(self) -> dict[str, Any]:
        answer = ask(self.server, self.messages, **self.fields)
        said = answer["choices"][0]["message"]["content"]
        self.messages += [
            {"role": "assistant", "content": said},
            {"role": "user", "content": "Go on."},
        ]
        return answer

    @property
    def tokens(self) -> int:
        read: int = self.first["usage"]["prompt_tokens"]
        return read


def parked(server: Server) -> list[Path]:
    return sorted(path for path in (server.data / "parked").iterdir())


def files_of(server: Server, kind: str) -> list[Path]:
    return [path for path in parked(server) if path.suffix == kind]


def until_sealed(server: Server) -> Path:
    """Wait until what was parked has its manifest; return it."""
    wait_for(lambda: bool(files_of(server, ".json")))
    [manifest] = files_of(server, ".json")
    return manifest


def spares(server: Server) -> list[psutil.Process]:
    engines = {process.pid for process in server.engines()}
    return [process for process in server.runners() if process.pid not in engines]


def until_spare(server: Server) -> psutil.Process:
    wait_for(lambda: len(spares(server)) == 1)
    [spare] = spares(server)
    return spare


# Spares.


def test_a_load_takes_the_spare_and_another_one_comes(serve: Serve) -> None:
    server = serve(*NAMES)
    spare = until_spare(server)
    loaded = server.load(MODEL)
    assert loaded["pid"] == spare.pid
    assert until_spare(server).pid != spare.pid
    wait_for(lambda: server.system()["spares"]["count"] == 1)
    assert 0 < server.system()["spares"]["memory_bytes"] < 64 << 20
    assert ok(server.chat())["choices"]


def test_a_killed_spare_is_no_harm(serve: Serve) -> None:
    server = serve()
    until_spare(server).kill()
    assert ok(server.chat())["choices"]
    wait_for(lambda: len(spares(server)) == 1)


def test_a_spare_that_dies_as_it_is_taken_is_no_harm(serve: Serve) -> None:
    server = serve()
    spare = until_spare(server)
    freeze(spare)  # it cannot follow its order
    with together(1) as pool:
        asked = pool.submit(server.chat)
        wait_for(server.engines)
        spare.kill()
        answer = asked.result(20)
    assert ok(answer)["choices"]
    assert answer.headers["x-xandrouting-engine"].startswith("llamacpp/cpu#1")
    assert "spare ended as it was taken" in server.log()
    assert server.engine().process.pid != spare.pid


def test_without_spares_there_are_none(serve: Serve) -> None:
    server = serve(spares="none")
    assert ok(server.chat())["choices"]
    assert spares(server) == []
    assert server.system()["spares"] == {"count": 0, "memory_bytes": 0}


def test_spares_end_with_a_killed_server(serve: Serve) -> None:
    server = serve()
    until_spare(server)
    processes = server.everything()
    server.kill9()
    wait_for(all_gone(processes))


def test_spares_of_an_unknown_backend_are_refused(serve: Serve, tmp_path: Path) -> None:
    server = Server(tmp_path / "models", tmp_path / "data", spares="tgi")
    assert "spares" in server.refuses_to_start()


# Sleep.


def test_an_idle_engine_sleeps_and_wakes(serve: Serve) -> None:
    server = serve(soft_idle_s=0.3, default_ttl=300)
    talk = Conversation(server)
    before = server.loaded()[0]
    wait_for(lambda: server.loaded()[0]["state"] == "sleeping")
    wait_for(lambda: server.loaded()[0]["memory"]["measured_bytes"] < 40 << 20)
    item = server.loaded()[0]
    assert item["pid"] == before["pid"]
    assert item["memory"]["charged_bytes"] < 40 << 20
    assert 0 < item["ttl_remaining"] < 300
    assert ok(server.get("/v1/models"))["data"][0]["status"]["value"] == "sleeping"
    assert server.stats()["loaded_count"] == 0

    response = server.post("/v1/chat/completions", chat_body(max_tokens=4, messages=talk.messages))
    assert response.headers["x-xandrouting-load"].startswith("cold;dur=")
    assert response.headers["x-xandrouting-engine"] == "llamacpp/cpu#1"
    assert cached(ok(response)) > 0.9 * talk.tokens
    assert server.loaded()[0]["pid"] == before["pid"]
    assert server.stats()["loads"] == 2


def test_a_sleeper_wakes_with_what_is_asked_now(serve: Serve) -> None:
    server = serve(soft_idle_s=0.3)
    server.load(MODEL, n_ctx=512)
    wait_for(lambda: server.loaded()[0]["state"] == "sleeping")
    assert server.load(MODEL, n_ctx=2048)["n_ctx"] == 2048
    assert server.stats()["loads"] == 2


def test_a_sleeper_ends_with_its_ttl_by_wish_and_by_force(serve: Serve) -> None:
    server = serve(soft_idle_s=0.2)
    server.load(MODEL, ttl=1)
    wait_for(lambda: server.loaded() == [])
    for force in (False, True):
        server.load(MODEL, ttl=0)
        wait_for(lambda: server.loaded()[0]["state"] == "sleeping")
        assert ok(server.unload(MODEL, force=force))["count"] == 1
        assert server.loaded() == []


def test_a_sleeper_that_is_killed_is_loaded_anew(serve: Serve) -> None:
    server = serve(soft_idle_s=0.3)
    server.load(MODEL)
    wait_for(lambda: server.loaded()[0]["state"] == "sleeping")
    psutil.Process(server.loaded()[0]["pid"]).kill()
    wait_for(lambda: server.loaded() == [])
    assert ok(server.chat())["choices"]


def test_a_pinned_model_does_not_sleep(serve: Serve) -> None:
    server = serve(*NAMES, soft_idle_s=0.3, pinned=MODEL)
    server.load(OTHER)
    wait_for(lambda: {item["state"] for item in server.loaded()} == {"ready", "sleeping"})
    [pinned] = [item for item in server.loaded() if item["pinned"]]
    assert pinned["state"] == "ready"


def test_a_sleeper_leaves_its_place_to_others(serve: Serve) -> None:
    server = serve(*NAMES, soft_idle_s=0.3, max_loaded=1)
    server.load(MODEL)
    wait_for(lambda: server.loaded()[0]["state"] == "sleeping")
    server.load(OTHER)
    assert {item["path"] for item in server.loaded()} == {MODEL, OTHER}
    assert ok(server.chat(model=MODEL))["choices"]
    assert server.stats()["evictions"] == 1


# Parking.


def test_a_conversation_outlives_its_engine(serve: Serve) -> None:
    server = serve()
    talk = Conversation(server)
    assert cached(talk.first) == 0
    ok(server.unload(MODEL))
    manifest = until_sealed(server)
    assert oct(manifest.stat().st_mode & 0o777) == oct(0o600)
    assert [oct(path.stat().st_mode & 0o777) for path in files_of(server, ".slot")] == [oct(0o600)]
    assert oct((server.data / "parked").stat().st_mode & 0o777) == oct(0o700)
    assert server.system()["parked"]["conversations"] == 1

    assert cached(talk.go_on()) > 0.9 * talk.tokens
    assert server.stats()["loads"] == 2
    assert parked(server) == []


def test_a_conversation_outlives_an_eviction_and_the_server(serve: Serve) -> None:
    server = serve(*NAMES, max_loaded=1)
    talk = Conversation(server, model=MODEL)
    server.load(OTHER)
    assert cached(talk.go_on()) > 0.9 * talk.tokens
    server.close()
    server.start()
    assert cached(talk.go_on()) > 0.9 * talk.tokens


def test_parking_can_be_switched_off(serve: Serve) -> None:
    server = serve(parking_quota=0)
    talk = Conversation(server)
    ok(server.unload(MODEL))
    assert cached(talk.go_on()) == 0
    assert not (server.data / "parked").exists()


def test_what_exceeds_the_quota_is_not_parked(serve: Serve) -> None:
    server = serve(parking_quota=1 << 20)
    talk = Conversation(server)
    ok(server.unload(MODEL))
    assert cached(talk.go_on()) == 0


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def turn_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, turn_a_bit, Path.unlink])
def test_a_damaged_conversation_is_read_again(serve: Serve, damage: Any) -> None:
    server = serve()
    talk = Conversation(server)
    ok(server.unload(MODEL))
    until_sealed(server)
    [slot] = files_of(server, ".slot")
    damage(slot)
    assert cached(talk.go_on()) == 0
    assert parked(server) == []
    assert "parked file damaged" in server.log()
    assert server.stats()["load_failures"] == 0


@pytest.mark.parametrize("fields", [{"n_ctx": 1024}, {"cache_type_k": "q8_0"}])
def test_a_conversation_of_other_options_is_read_again(serve: Serve, fields: Any) -> None:
    server = serve()
    talk = Conversation(server, n_ctx=2048)
    ok(server.unload(MODEL))
    until_sealed(server)
    talk.fields = fields
    assert cached(talk.go_on()) == 0
    assert parked(server) == []


def test_a_model_that_changed_drops_what_was_parked(serve: Serve) -> None:
    server = serve("own/own.gguf")
    model = "/models/own/own.gguf"
    talk = Conversation(server, model=model)
    path = server.models / "own/own.gguf"
    other = path.with_suffix(".new")
    shutil.copyfile(path, other)
    other.replace(path)
    ok(server.unload(model))
    until_sealed(server)
    assert cached(talk.go_on()) == 0
    assert parked(server) == []
    assert "of no use any more" in server.log()


def test_a_full_disk_is_not_in_the_way(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "parked"
    folder.mkdir(parents=True)
    server = serve()
    talk = Conversation(server)
    folder.rmdir()
    folder.write_text("no folder: nothing can be written here")
    assert ok(server.unload(MODEL))["count"] == 1
    assert cached(talk.go_on()) == 0


def test_a_killed_server_leaves_nothing_that_is_taken_for_whole(serve: Serve) -> None:
    server = serve()
    Conversation(server)
    ok(server.unload(MODEL))
    manifest = until_sealed(server)
    manifest.unlink()
    server.kill9()
    server.start()
    assert parked(server) == []


def test_an_engine_ended_by_force_is_not_waited_for(serve: Serve) -> None:
    server = serve()
    Conversation(server)
    ok(server.unload(MODEL, force=True))
    assert not (server.data / "parked").exists() or parked(server) == []


def test_an_engine_that_hangs_leaves_without_its_conversation(serve: Serve) -> None:
    server = serve(shutdown_grace_s=5)
    Conversation(server)
    with held(server):
        assert ok(server.unload(MODEL))["count"] == 1
    assert files_of(server, ".json") == [] if (server.data / "parked").exists() else True


# Reading ahead.


def test_files_are_read_while_a_busy_engine_drains(serve: Serve) -> None:
    server = serve(*NAMES, max_loaded=1, log_level="debug", min_residency_s=0, fair_wait_s=0.5)
    with story(server, MODEL, max_tokens=2000) as stream:  # the block's end ends it
        stream.first()
        answer = server.post("/v1/models/load", {"model": OTHER, "wait": False})
        ok(answer, 202)
        wait_for(lambda: server.log().count("read ahead bytes=98362432") == 2)
        assert server.starts(OTHER) == 0
    wait_for(lambda: server.starts(OTHER) == 1)


def test_the_manifest_names_no_conversation(serve: Serve) -> None:
    server = serve()
    Conversation(server)
    ok(server.unload(MODEL))
    text = until_sealed(server).read_text()
    assert "sea" not in text
    assert json.loads(text)["slots"][0]["tokens"] > 128
