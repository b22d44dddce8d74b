"""Asking a hub, with the real client against a hub on loopback."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from tests.fakes.hub import Hub, Refuse
from tests.fakes.hub_content import File
from tests.fakes.web import Asked, Call, web
from xandrouting.core.errors import (
    GatewayError,
    HubUnreachable,
    InvalidRequest,
    RepoForbidden,
    RepoGated,
    RepoNotFound,
    RevisionNotFound,
)
from xandrouting.downloads import hub as hub_module
from xandrouting.downloads.hub import Hub as Client

GOOD = "hf_good"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        files = {"config.json": b"{}", "m-Q4_0.gguf": ("random", 1 << 16, 7), "sub/a.txt": b"x"}
        hub.add_repo("org/name", files, revisions={"v1": {"old.txt": b"old"}})
        hub.add_repo("org/gated", {"a": b"a"}, gated="auto", token=GOOD, license=None)
        hub.add_repo("org/private", {"a": b"a"}, private=True, token=GOOD)
        yield hub


async def refused(client: Client, repo_id: str, revision: str | None = None) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        await client.look(repo_id, revision)
    assert "JSON" not in caught.value.message
    assert "Unexpected" not in caught.value.message
    assert GOOD not in caught.value.message
    return caught.value


async def test_a_repository(hub: Hub) -> None:
    found = await Client(f"{hub.url}/").look("org/name", None)
    assert (found.repo_id, found.gated, found.private) == ("org/name", False, False)
    assert found.license == "apache-2.0"
    assert len(found.commit) == 40
    assert {file.path: file.size for file in found.files} == {
        "config.json": 2,
        "m-Q4_0.gguf": 1 << 16,
        "sub/a.txt": 1,
    }
    for file in found.files:
        assert (file.sha256 is None) is not (file.blob_id is None)
    old = await Client(hub.url).look("org/name", "v1")
    assert [file.path for file in old.files] == ["old.txt"]
    assert old.commit != found.commit
    assert (await Client(hub.url).look("org/name", old.commit)).commit == old.commit


async def test_a_token_opens_what_is_closed(hub: Hub) -> None:
    client = Client(hub.url, GOOD)
    gated = await client.look("org/gated", None)
    assert (gated.gated, gated.license) == (True, None)
    assert (await client.look("org/private", None)).private is True
    assert hub.authorizations("hub") == {f"Bearer {GOOD}"}


async def test_without_a_token_no_saved_one_is_used(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    await Client(hub.url).look("org/name", None)
    assert hub.authorizations("hub") == set()


@pytest.mark.parametrize(
    ("repo_id", "error", "says"),
    [
        ("org/missing", RepoNotFound, "private and needs HF_TOKEN"),
        ("org/private", RepoNotFound, "private and needs HF_TOKEN"),
        ("org/gated", RepoGated, "/org/gated; then set HF_TOKEN"),
    ],
)
async def test_strangers(hub: Hub, repo_id: str, error: type[GatewayError], says: str) -> None:
    caught = await refused(Client(hub.url), repo_id)
    assert type(caught) is error
    assert says in caught.message


async def test_no_such_revision(hub: Hub) -> None:
    caught = await refused(Client(hub.url), "org/name", "v9")
    assert type(caught) is RevisionNotFound
    assert "'v9'" in caught.message


async def test_a_token_that_nobody_knows(hub: Hub) -> None:
    for repo_id in ("org/name", "org/gated", "org/missing"):
        caught = await refused(Client(hub.url, "hf_bad"), repo_id)
        assert type(caught) is RepoForbidden
        assert "HF_TOKEN" in caught.message


@pytest.mark.parametrize(
    ("fault", "error", "says", "retry_after_s"),
    [
        (Refuse(500), HubUnreachable, "it answers 500", hub_module.RETRY_S),
        (Refuse(429, retry_after_s=7), HubUnreachable, "it answers 429", 7.0),
        (Refuse(403), RepoForbidden, "HF_TOKEN", None),
        (Refuse(400), InvalidRequest, "refuses", None),
    ],
)
async def test_a_hub_in_trouble(
    hub: Hub, fault: Any, error: type[GatewayError], says: str, retry_after_s: float | None
) -> None:
    hub.fault("api", fault)
    caught = await refused(Client(hub.url), "org/name")
    assert (type(caught), caught.retry_after_s) == (error, retry_after_s)
    assert says in caught.message
    assert len(hub.requests()) == 1  # nothing is tried again


async def test_a_hub_that_wants_to_be_left_alone_for_ever() -> None:
    with web(lambda call, _: call.say(429, **{"retry-after": "9" * 400})) as server:
        caught = await refused(Client(server.url), "o/n")
    assert (type(caught), caught.retry_after_s) == (HubUnreachable, hub_module.MAX_RETRY_S)


async def test_a_captive_portal() -> None:
    with web(lambda call, _: call.say(200, b"<!doctype html>", "text/html")) as portal:
        caught = await refused(Client(portal.url), "org/name")
    assert type(caught) is HubUnreachable
    assert "not answer as a hub" in caught.message


async def test_a_mirror_that_cannot_check_access(hub: Hub) -> None:
    hub.fault("api", Refuse(404))
    assert (await Client(hub.url).look("org/name", None)).repo_id == "org/name"


async def test_olah_says_not_found_of_the_call_itself(hub: Hub) -> None:
    hub.fault("api", Refuse(404, code="RepoNotFound"))
    assert (await Client(hub.url).look("org/name", None)).repo_id == "org/name"


async def test_a_mirror_that_tells_names_alone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = await Client(hub.url).look("org/name", None)
    hub.page_entries = 1
    monkeypatch.setattr(File, "sibling", lambda self, *, blobs: {"rfilename": self.path})
    told = await Client(hub.url).look("org/name", None)
    assert sorted(told.files, key=str) == sorted(whole.files, key=str)
    assert told.commit == whole.commit
    monkeypatch.setattr(hub_module, "MAX_FILES", 2)
    with pytest.raises(HubUnreachable, match="does not answer as a hub"):
        await Client(hub.url).look("org/name", None)


async def test_nobody_but_the_hub_is_asked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, look_up = set[object](), socket.getaddrinfo

    def getaddrinfo(host: str | None, *rest: Any, **options: Any) -> Any:
        asked.add(host)
        return look_up("127.0.0.1", *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr("huggingface_hub.utils._detect_agent._registry", None)
    await Client(hub.url).look("org/name", None)
    assert asked <= {"127.0.0.1"}


async def test_a_hub_that_is_down_and_up_again(hub: Hub) -> None:
    client = Client(hub.url)
    await client.look("org/name", None)
    hub.down()
    caught = await refused(client, "org/name")
    assert type(caught) is HubUnreachable
    assert hub.authority in caught.message
    hub.up()
    assert await client.look("org/name", None)


async def test_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    caught = await refused(Client(hub.url), "org/name")
    assert type(caught) is HubUnreachable
    assert "HF_HUB_OFFLINE" in caught.message
    assert hub.requests() == []


async def test_a_hub_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "LOOK_TIMEOUT_S", 0.2)
    with web(lambda call, _: call.until_left()) as silent:
        before = set(threading.enumerate())
        caught = await refused(Client(silent.url), "org/name")
        assert type(caught) is HubUnreachable
        assert "too slow" in caught.message
        # What still waits must not hold up the end of the process.
        left = [thread for thread in set(threading.enumerate()) - before if thread.name == "hub"]
        assert all(thread.daemon for thread in left)


SHA = "a" * 40
GOOD_FILE = {"rfilename": "a", "size": 1, "blobId": "b" * 40}


@pytest.mark.parametrize(
    "told",
    [
        [],
        {},
        {"id": "o/n"},
        {"id": "o/n", "sha": "short"},
        {"id": "o/n", "sha": SHA, "siblings": 5},
        {"id": "o/n", "sha": SHA, "siblings": [{}]},
        {"id": "o/n", "sha": SHA, "siblings": [{"rfilename": "a"}]},
        {"id": "o/n", "sha": SHA, "siblings": [GOOD_FILE | {"size": -1}]},
        {"id": "o/n", "sha": SHA, "siblings": [GOOD_FILE | {"size": 1 << 60}]},
        {"id": "o/n", "sha": SHA, "siblings": [GOOD_FILE | {"size": "large"}]},
        {"id": "o/n", "sha": SHA, "siblings": [GOOD_FILE | {"blobId": "../../x"}]},
        {"id": "o/n", "sha": SHA, "siblings": [GOOD_FILE | {"size": 1.5}]},
        {"id": "o/n", "sha": SHA, "siblings": [GOOD_FILE | {"lfs": {"sha256": "x", "size": 1}}]},
        {"id": 7, "sha": SHA, "siblings": [GOOD_FILE]},
    ],
)
async def test_an_answer_that_is_none(told: object) -> None:
    def answer(call: Call, asked: Asked) -> None:
        call.json({} if asked.path.endswith("auth-check") else told)

    with web(answer) as server:
        caught = await refused(Client(server.url), "o/n")
    assert type(caught) is HubUnreachable


async def test_an_answer_without_a_bottom() -> None:
    def answer(call: Call, asked: Asked) -> None:
        call.say(200, b"{}" if asked.path.endswith("auth-check") else b"[" * 100_000)

    with web(answer) as server:
        caught = await refused(Client(server.url), "o/n")
    assert type(caught) is HubUnreachable


async def test_a_name_that_is_none_is_not_believed() -> None:
    def answer(call: Call, _: Asked) -> None:
        call.json({"id": "../../etc", "sha": SHA, "siblings": [GOOD_FILE], "tags": ["license:mit"]})

    with web(answer) as server:
        found = await Client(server.url).look("o/n", None)
    assert (found.repo_id, found.license) == ("o/n", "mit")


async def test_many_at_once(hub: Hub) -> None:
    client = Client(hub.url)
    found = await asyncio.gather(*(client.look("org/name", None) for _ in range(20)))
    assert len({one.commit for one in found}) == 1


FORK_WHILE_ASKING = """
import asyncio, sys, threading
import httpx2, uvloop
from huggingface_hub.utils import get_session
from xandrouting.downloads.hub import Hub

async def main():
    await Hub(sys.argv[1]).look("org/name", None)
    url = httpx2.URL(sys.argv[1])
    lock = get_session()._transport_for_url(url)._pool._optional_thread_lock
    held, release = threading.Event(), threading.Event()

    def hold():
        with lock:
            held.set()
            release.wait(20)

    threading.Thread(target=hold, daemon=True).start()
    held.wait()
    child = await asyncio.create_subprocess_exec("true", start_new_session=True)
    print(await child.wait())
    release.set()  # the library closes its client at the end, too

uvloop.run(main())
"""


def test_processes_can_be_started_while_the_hub_is_asked(hub: Hub) -> None:
    # The library closes its client in every forked child, and uvloop lets it.
    asking = subprocess.Popen(
        [sys.executable, "-c", FORK_WHILE_ASKING, hub.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        told, complaints = asking.communicate(timeout=15)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(asking.pid, signal.SIGKILL)
    assert (told, asking.returncode) == (b"0\n", 0), complaints.decode()
