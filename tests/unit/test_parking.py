"""Conversations on disk: saved, checked, restored and deleted, with an engine that is a folder."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest

from tests.fakes.loop import virtual_time
from tests.unit.scheduling import LLAMA, MISTRAL, QWEN, nth
from xandrouting.core.events import Start
from xandrouting.core.model import EngineSpec, FixedCost, Footprint, LoadOptions, Terms
from xandrouting.core.planner import Decision, Verdict
from xandrouting.engines.llamacpp_slots import LlamaSlots
from xandrouting.net.client import Client, UpstreamError
from xandrouting.pool.parking import CALL_S, KEPT_S, MIN_FREE_BYTES, MIN_TOKENS, Parking, SavedSlot

T = TypeVar("T")

SLOTS = LlamaSlots()
TOKEN_BYTES = 10
OPTIONS = LoadOptions(n_ctx=1000, n_parallel=2, cache_type_k="f16", cache_type_v="f16")
CACHE = 2 * 1000 * TOKEN_BYTES  # of both slots
PLENTY = 10 * CACHE


class Answer:
    """What `Client.request` returns, as far as parking looks at it."""

    def __init__(self, status: int, body: object) -> None:
        self.status = status
        self.closed = False
        self._body = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def read(self, limit: int) -> bytes:
        return self._body[:limit]

    def close(self) -> None:
        self.closed = True


class FakeEngine:
    """A client of an engine with slots: it writes and reads files as llama.cpp does.

    `fails` is what an action is answered with: a status, or an exception; `hangs` are those
    that are never answered. Either leaves half a file behind, if it is to write one.
    """

    def __init__(self, folder: Path, *tokens: int, busy: tuple[int, ...] = ()) -> None:
        self.folder = folder
        self.tokens = dict(enumerate(tokens))
        self.unused: set[int] = set()  # slots that were restored and saw no request
        self.busy = busy
        self.asked: list[str] = []
        self.answers: list[Answer] = []
        self.fails: dict[str, int | Exception] = {}
        self.hangs: set[str] = set()
        self.takes_s = 0.0
        self.before: Callable[[str], object] = lambda _: None  # called with each action

    async def request(
        self, method: bytes, path: bytes, body: bytes = b"", headers: bytes = b""
    ) -> Answer:
        await asyncio.sleep(self.takes_s)
        answer = await self._answer(method, path.decode(), body, headers)
        self.answers.append(answer)
        return answer

    async def _answer(self, method: bytes, path: str, body: bytes, headers: bytes) -> Answer:
        if path == "/slots":
            assert method == b"GET"
            action, slot, name = "list", 0, ""
        else:
            assert method == b"POST"
            assert headers == b"content-type: application/json\r\n"
            where, _, action = path.partition("?action=")
            slot, name = int(where.removeprefix("/slots/")), json.loads(body)["filename"]
        self.asked.append(action if action == "list" else f"{action} {slot}")
        self.before(action)
        failure = self.fails.get(action)
        if action == "save":
            size = self.tokens[slot] * TOKEN_BYTES
            bad = failure is not None or action in self.hangs
            data = bytes([slot + 1]) * (size // 2 if bad else size)
            (self.folder / name).write_bytes(data)
        if action in self.hangs:
            await asyncio.Event().wait()
        if isinstance(failure, Exception):
            raise failure
        if failure is not None:
            return Answer(failure, {"error": {"message": "no"}})
        if action == "save":
            return Answer(200, {"n_written": size})
        if action == "restore":
            self.tokens[slot] = (self.folder / name).stat().st_size // TOKEN_BYTES
            self.unused.add(slot)
            return Answer(200, {"n_restored": self.tokens[slot]})
        return Answer(200, self._states())

    def _states(self) -> list[dict[str, Any]]:
        return [
            {"id": slot, "is_processing": slot in self.busy}
            | ({} if slot in self.unused else {"n_prompt_tokens": count})
            for slot, count in self.tokens.items()
        ]


def start_of(spec: EngineSpec = QWEN, incarnation: int = 1, **changes: Any) -> Start:
    options = replace(OPTIONS, **changes)
    footprint = Footprint(host=Terms(kv_cache=CACHE))
    spec = replace(spec, cost=FixedCost(footprint), learned_as=f"{spec.source}|1.0", revision="r1")
    decision = Decision(Verdict.LOAD, spec.key.model, options, (), footprint, 1.0, False, ())
    return Start(nth(spec, incarnation), spec, options, decision=decision)


def respecified(start: Start, **changes: Any) -> Start:
    return replace(start, spec=replace(start.spec, **changes))


class Threads:
    """`asyncio.to_thread` on the virtual clock.

    Functions named in `takes_s` do their work after so many seconds; of those in `told_s` the
    end is told so much later.
    """

    def __init__(self) -> None:
        self.takes_s: dict[str, float] = {}
        self.told_s: dict[str, float] = {}

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        await asyncio.sleep(self.takes_s.get(function.__name__, 0.0))
        result = function(*arguments)
        await asyncio.sleep(self.told_s.get(function.__name__, 0.0))
        return result


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> Threads:
    threads = Threads()
    monkeypatch.setattr("asyncio.to_thread", threads.run)
    return threads


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "parked"


@contextmanager
def time_passes(monkeypatch: pytest.MonkeyPatch, seconds: float) -> Iterator[None]:
    now = time.time()
    with monkeypatch.context() as patched:
        patched.setattr("time.time", lambda: now + seconds)
        yield


async def opened(folder: Path, quota_bytes: int = PLENTY) -> Parking:
    parking = Parking(folder, quota_bytes)
    await parking.open()
    return parking


async def park(parking: Parking, start: Start, engine: FakeEngine) -> None:
    await parking.park(start, cast("Client", engine), SLOTS)


async def restore(
    parking: Parking, start: Start, whole: tuple[SavedSlot, ...], engine: FakeEngine
) -> None:
    await parking.restore(start, whole, cast("Client", engine), SLOTS)


async def parked(folder: Path, start: Start, *tokens: int, quota_bytes: int = PLENTY) -> Parking:
    """A parking with these conversations of one engine, all written down."""
    parking = await opened(folder, quota_bytes)
    await park(parking, start, FakeEngine(folder, *tokens))
    await parking.aclose()
    return parking


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def suffixes(folder: Path) -> list[str]:
    return [name.partition(".")[2] for name in names(folder)]


def the(folder: Path, suffix: str) -> Path:
    [path] = folder.glob(f"*.{suffix}")
    return path


def sizes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.slot"))


# There and back.


@virtual_time
async def test_a_conversation_comes_back_to_the_next_engine_of_its_model(folder: Path) -> None:
    parking = await parked(folder, start_of(), 500, 900)
    assert (parking.count, parking.size_bytes) == (2, 1400 * TOKEN_BYTES)
    again, engine = start_of(incarnation=2), FakeEngine(folder, 0, 0)
    whole = await parking.fetch(again)
    await restore(parking, again, whole, engine)
    assert engine.tokens == {0: 900, 1: 500}  # the longest first
    assert engine.asked == ["restore 0", "restore 1"]
    assert all(answer.closed for answer in engine.answers)


@virtual_time
async def test_what_was_restored_is_kept_no_longer(folder: Path) -> None:
    parking = await parked(folder, start_of(), 500)
    await restore(parking, start_of(), await parking.fetch(start_of()), FakeEngine(folder, 0))
    assert (names(folder), parking.count, parking.size_bytes) == ([], 0, 0)
    assert await parking.fetch(start_of()) == ()


@virtual_time
async def test_what_was_parked_outlives_the_server(folder: Path) -> None:
    await parked(folder, start_of(), 500)
    parking = await opened(folder)
    assert (parking.count, parking.size_bytes) == (1, 500 * TOKEN_BYTES)
    engine = FakeEngine(folder, 0, 0)
    await restore(parking, start_of(), await parking.fetch(start_of()), engine)
    assert engine.tokens == {0: 500, 1: 0}


@virtual_time
async def test_what_was_restored_and_not_used_is_parked_again(folder: Path) -> None:
    """llama.cpp does not list it: two clients, and only one came back this time."""
    parking = await parked(folder, start_of(), 500, 900)
    for _ in range(2):
        engine = FakeEngine(folder, 0, 0)
        await restore(parking, start_of(), await parking.fetch(start_of()), engine)
        engine.tokens[1] = 600
        engine.unused.discard(1)
        await park(parking, start_of(), engine)
    await parking.aclose()
    assert [slot.tokens for slot in await parking.fetch(start_of())] == [900, 600]


@virtual_time
async def test_what_an_earlier_engine_was_given_is_not_the_next_one_s(folder: Path) -> None:
    parking = await parked(folder, start_of(), 500)
    await restore(parking, start_of(), await parking.fetch(start_of()), FakeEngine(folder, 0))
    assert await parking.fetch(start_of(incarnation=2)) == ()  # the first has crashed
    engine = FakeEngine(folder, 0)
    engine.unused = {0}
    await park(parking, start_of(incarnation=2), engine)
    assert engine.asked == ["list"]


@virtual_time
async def test_each_engine_has_its_own(folder: Path) -> None:
    parking = await opened(folder)
    for spec, tokens in ((QWEN, 500), (LLAMA, 700)):
        await park(parking, start_of(spec), FakeEngine(folder, tokens))
    await parking.aclose()
    [slot] = await parking.fetch(start_of(LLAMA))
    assert (slot.tokens, parking.count) == (700, 2)
    assert await parking.fetch(start_of(MISTRAL)) == ()


@virtual_time
async def test_nobody_else_can_look_at_what_is_parked(folder: Path) -> None:
    await parked(folder, start_of(), 500)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert the(folder, "json").stat().st_mode & 0o777 == 0o600
    assert QWEN.key.model not in "".join(names(folder))


@virtual_time
async def test_a_later_parking_takes_the_place_of_the_earlier(folder: Path) -> None:
    parking = await parked(folder, start_of(), 500, 900)
    await park(parking, start_of(incarnation=2), FakeEngine(folder, 600))
    await parking.aclose()
    assert [slot.tokens for slot in await parking.fetch(start_of())] == [600]
    assert suffixes(folder) == ["slot", "json"]


# What is not parked.


@pytest.mark.parametrize("tokens", [0, MIN_TOKENS - 1])
@virtual_time
async def test_a_small_conversation_is_read_again_sooner(folder: Path, tokens: int) -> None:
    parking = await parked(folder, start_of(), tokens)
    assert (names(folder), parking.count) == ([], 0)


@virtual_time
async def test_a_slot_that_works_is_left_alone(folder: Path) -> None:
    engine = FakeEngine(folder, 500, 600, busy=(0,))
    parking = await opened(folder)
    await park(parking, start_of(), engine)
    await parking.aclose()
    assert engine.asked == ["list", "save 1"]


@virtual_time
async def test_what_a_model_with_eyes_saw_cannot_be_saved(folder: Path) -> None:
    engine = FakeEngine(folder, 500)
    parking = await opened(folder)
    await park(parking, respecified(start_of(), mmproj="/models/eyes.gguf"), engine)
    assert engine.asked == []


@virtual_time
async def test_too_large_for_the_quota_is_skipped_and_nobody_leaves_for_it(folder: Path) -> None:
    parking = await parked(folder, start_of(LLAMA), 200, quota_bytes=500 * TOKEN_BYTES)
    engine = FakeEngine(folder, 501, 250)
    await park(parking, start_of(), engine)
    await parking.aclose()
    assert engine.asked == ["list", "save 1"]  # the shorter one fits
    assert [slot.tokens for slot in await parking.fetch(start_of(LLAMA))] == [200]


@virtual_time
async def test_the_oldest_leave_for_the_newest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quota = 1000 * TOKEN_BYTES
    parking = await opened(folder, quota)
    for age, spec in enumerate((LLAMA, MISTRAL, QWEN)):
        with time_passes(monkeypatch, age * 60.0):
            await park(parking, start_of(spec), FakeEngine(folder, 400))
            await parking.aclose()
            assert parking.size_bytes == sizes(folder) <= quota
    with time_passes(monkeypatch, 180.0):
        left = [len(await parking.fetch(start_of(spec))) for spec in (LLAMA, MISTRAL, QWEN)]
    assert left == [0, 1, 1]
    assert suffixes(folder).count("slot") == 2


@virtual_time
async def test_two_that_park_at_once_share_the_quota(folder: Path) -> None:
    parking = await opened(folder, 1000 * TOKEN_BYTES)
    engines = {spec: FakeEngine(folder, 600) for spec in (QWEN, LLAMA)}
    for engine in engines.values():
        engine.takes_s = 1.0
    await asyncio.gather(*(park(parking, start_of(s), engine) for s, engine in engines.items()))
    await parking.aclose()
    assert parking.count == 1
    assert sizes(folder) == 600 * TOKEN_BYTES


@virtual_time
async def test_a_disk_that_is_almost_full_is_left_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=MIN_FREE_BYTES + 500 * TOKEN_BYTES - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    parking = await parked(folder, start_of(), 500)
    assert parking.count == 0
    await park(parking, start_of(), FakeEngine(folder, 499))
    await parking.aclose()
    assert parking.count == 1


@virtual_time
async def test_quota_0_keeps_nothing_and_deletes_what_there_is(folder: Path) -> None:
    await parked(folder, start_of(), 500)
    engine = FakeEngine(folder, 500)
    parking = await opened(folder, 0)
    assert (names(folder), parking.folder, parking.count) == ([], "", 0)
    await park(parking, start_of(), engine)
    assert (engine.asked, await parking.fetch(start_of())) == ([], ())


@virtual_time
async def test_a_quota_that_became_smaller_holds_for_what_is_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await parked(folder, start_of(LLAMA), 400)
    with time_passes(monkeypatch, 60.0):
        await parked(folder, start_of(QWEN), 400)
        parking = await opened(folder, 500 * TOKEN_BYTES)
        assert (parking.count, len(await parking.fetch(start_of(QWEN)))) == (1, 1)
        assert sizes(folder) == 400 * TOKEN_BYTES


@virtual_time
async def test_engines_save_where_parking_looks(folder: Path) -> None:
    assert (await opened(folder)).folder == f"{folder}/"


# What has become useless.


def cut(folder: Path) -> None:
    path = the(folder, "slot")
    path.write_bytes(path.read_bytes()[:-1])


def longer(folder: Path) -> None:
    path = the(folder, "slot")
    path.write_bytes(path.read_bytes() + b"\0")


def turn_a_bit(folder: Path) -> None:
    path = the(folder, "slot")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def take_away(folder: Path) -> None:
    the(folder, "slot").unlink()


def make_it_a_folder(folder: Path) -> None:
    path = the(folder, "slot")
    path.unlink()
    path.mkdir()


DAMAGES = [cut, longer, turn_a_bit, take_away]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("reopened", [False, True])
@virtual_time
async def test_a_damaged_file_is_logged_deleted_and_shown_to_no_engine(
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
    reopened: bool,
) -> None:
    parking = await parked(folder, start_of(), 500)
    damage(folder)
    if reopened:
        parking = await opened(folder)
    assert await parking.fetch(start_of()) == ()
    assert "parked file damaged" in caplog.text
    assert (names(folder), parking.count) == ([], 0)
    caplog.clear()
    assert await parking.fetch(start_of()) == ()
    assert caplog.text == ""


@virtual_time
async def test_a_folder_in_a_file_s_place_is_no_conversation(folder: Path) -> None:
    parking = await parked(folder, start_of(), 500)
    make_it_a_folder(folder)
    assert await parking.fetch(start_of()) == ()


@virtual_time
async def test_beside_a_damaged_file_a_whole_one_is_restored(folder: Path) -> None:
    parking = await parked(folder, start_of(), 500, 900)
    for path in folder.glob("*-1.slot"):
        path.write_bytes(b"")
    engine = FakeEngine(folder, 0, 0)
    await restore(parking, start_of(), await parking.fetch(start_of()), engine)
    assert engine.asked == ["restore 0"]
    assert engine.tokens[0] == 500
    assert names(folder) == []


OTHERS: dict[str, Callable[[Start], Start]] = {
    "another file": lambda start: respecified(start, revision="r2"),
    "another engine version": lambda start: respecified(start, learned_as="qwen|2.0"),
    "another context": lambda start: replace(start, options=replace(OPTIONS, n_ctx=999)),
    "other slots": lambda start: replace(start, options=replace(OPTIONS, n_parallel=3)),
    "another cache": lambda start: replace(start, options=replace(OPTIONS, cache_type_k="q8_0")),
    "vectors": lambda start: replace(start, options=replace(OPTIONS, embeddings=True)),
}


@pytest.mark.parametrize("other", OTHERS)
@virtual_time
async def test_of_another_it_is_deleted(
    folder: Path, caplog: pytest.LogCaptureFixture, other: str
) -> None:
    caplog.set_level("INFO")
    parking = await parked(folder, start_of(), 500)
    assert await parking.fetch(OTHERS[other](start_of())) == ()
    assert "of no use any more" in caplog.text
    assert (names(folder), parking.count) == ([], 0)


@virtual_time
async def test_after_a_day_it_is_deleted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parking = await parked(folder, start_of(), 500)
    with time_passes(monkeypatch, KEPT_S - 60.0):
        await parking.drop_old()
        assert len(await parking.fetch(start_of())) == 1
    with time_passes(monkeypatch, KEPT_S):
        await parking.drop_old()
        assert (names(folder), parking.count) == ([], 0)


@virtual_time
async def test_after_a_day_it_is_not_restored_even_if_nobody_looked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parking = await parked(folder, start_of(), 500)
    with time_passes(monkeypatch, KEPT_S):
        assert await parking.fetch(start_of()) == ()
        assert names(folder) == []


@pytest.mark.parametrize("seconds", [KEPT_S, -3600.0])
@virtual_time
async def test_what_is_old_or_of_the_future_is_deleted_at_the_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    await parked(folder, start_of(), 500)
    with time_passes(monkeypatch, seconds):
        assert (await opened(folder)).count == 0
        assert names(folder) == []


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b"\xff\xfe",
        b'{"good_for": "x", "parked_at": "noon", "slots": []}',
        b'{"good_for": "x", "parked_at": 1, "slots": [{"name": "a.slot"}]}',
        b'{"good_for": "x", "parked_at": 1, "slots": [7]}',
    ],
)
@virtual_time
async def test_a_manifest_nobody_can_read_is_logged_and_deleted_with_its_files(
    folder: Path, caplog: pytest.LogCaptureFixture, text: bytes
) -> None:
    await parked(folder, start_of(), 500)
    the(folder, "json").write_bytes(text)
    parking = await opened(folder)
    assert "parked manifest unreadable" in caplog.text
    assert (names(folder), parking.count) == ([], 0)


@virtual_time
async def test_a_manifest_names_no_file_of_another_folder(folder: Path) -> None:
    await parked(folder, start_of(), 500)
    treasure = folder.parent / "figures.db"
    treasure.write_text("figures")
    manifest = the(folder, "json")
    manifest.write_text(manifest.read_text().replace(the(folder, "slot").name, "../figures.db"))
    parking = await opened(folder)
    assert (await parking.fetch(start_of()), names(folder)) == ((), [])
    assert treasure.exists()


@virtual_time
async def test_files_without_a_manifest_are_deleted_at_the_start(folder: Path) -> None:
    await parked(folder, start_of(), 500)
    kept = names(folder)
    for name in ("half.slot", "half.new", "core", ".hidden"):
        (folder / name).write_bytes(b"x")
    await opened(folder)
    assert names(folder) == kept


@virtual_time
async def test_there_need_not_be_a_folder(folder: Path) -> None:
    parking = await opened(folder)
    assert (parking.count, folder.exists()) == (0, False)
    assert await parking.fetch(start_of()) == ()


# An engine or a disk that fails.


@virtual_time
async def test_a_full_disk_leaves_no_half_file(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine(folder, 500)
    engine.fails["save"] = 500
    parking = await opened(folder)
    await park(parking, start_of(), engine)
    assert "conversation not parked" in caplog.text
    assert "status 500" in caplog.text
    assert (names(folder), parking.count) == ([], 0)


@virtual_time
async def test_what_was_saved_before_the_disk_was_full_is_kept(folder: Path) -> None:
    engine = FakeEngine(folder, 500, 400)
    parking = await opened(folder)

    def fill(action: str) -> None:
        if "save 1" in engine.asked:
            engine.fails["save"] = 500

    engine.before = fill
    await park(parking, start_of(), engine)
    await parking.aclose()
    assert engine.asked == ["list", "save 0", "save 1"]
    assert [slot.tokens for slot in await parking.fetch(start_of())] == [500]
    assert suffixes(folder) == ["slot", "json"]


@pytest.mark.parametrize(
    "failure", [404, 501, UpstreamError("gone", began=False), UpstreamError("gone", began=True)]
)
@virtual_time
async def test_an_engine_that_tells_nothing_of_its_slots_is_let_go(
    folder: Path, failure: int | Exception
) -> None:
    engine = FakeEngine(folder, 500)
    engine.fails["list"] = failure
    parking = await opened(folder)
    await park(parking, start_of(), engine)
    assert (engine.asked, names(folder)) == (["list"], [])


@pytest.mark.parametrize("body", [b"", b"null", b'{"error": 1}', b"[7]", b'[{"id": 1}]'])
@virtual_time
async def test_an_answer_of_another_kind_is_no_slot(
    folder: Path, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine(folder, 500)
    monkeypatch.setattr(FakeEngine, "_states", lambda _: body)
    parking = await opened(folder)
    await park(parking, start_of(), engine)
    assert engine.asked == ["list"]


@pytest.mark.parametrize("action", ["list", "save"])
@virtual_time
async def test_an_engine_that_hangs_is_waited_for_in_bounds(
    folder: Path, caplog: pytest.LogCaptureFixture, action: str
) -> None:
    engine = FakeEngine(folder, 500)
    engine.hangs.add(action)
    parking = await opened(folder)
    await park(parking, start_of(), engine)
    assert asyncio.get_running_loop().time() == pytest.approx(CALL_S)
    assert "TimeoutError" in caplog.text
    assert (names(folder), parking.count) == ([], 0)


@virtual_time
async def test_all_slots_together_have_one_time_limit(folder: Path) -> None:
    engine = FakeEngine(folder, *range(200, 220))
    engine.takes_s = 3.0
    parking = await opened(folder)
    await park(parking, start_of(n_parallel=20), engine)
    await parking.aclose()
    assert asyncio.get_running_loop().time() == pytest.approx(CALL_S)
    assert parking.count == 2


@virtual_time
async def test_a_parking_that_is_broken_off_leaves_nothing(folder: Path) -> None:
    engine = FakeEngine(folder, 500, 600)
    parking = await opened(folder)
    engine.before = lambda action: engine.hangs.add("save") if "save 1" in engine.asked else None
    engine.takes_s = 1.0
    parks = asyncio.create_task(park(parking, start_of(), engine))
    await asyncio.sleep(3.5)
    assert suffixes(folder) == ["slot"]
    parks.cancel()
    await asyncio.wait({parks})
    assert parks.cancelled()
    assert (names(folder), parking.count) == ([], 0)
    engine.hangs.clear()
    engine.before = lambda action: None
    await park(parking, start_of(), engine)
    await parking.aclose()
    assert parking.count == 2


@virtual_time
async def test_where_no_folder_can_be_made_nothing_is_parked(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.parent.mkdir()
    folder.write_text("in the way")
    engine = FakeEngine(folder, 500)
    parking = await opened(folder)
    await park(parking, start_of(), engine)
    assert engine.asked == ["list"]
    assert "conversation not parked" in caplog.text


@virtual_time
async def test_a_manifest_that_cannot_be_written_ends_the_parking(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    parking = await parked(folder, start_of(), 500)
    assert "No space left on device" in caplog.text
    assert (names(folder), parking.count) == ([], 0)


@pytest.mark.parametrize("failure", [400, 500, UpstreamError("gone", began=False)])
@virtual_time
async def test_an_engine_that_cannot_restore_begins_empty(
    folder: Path, caplog: pytest.LogCaptureFixture, failure: int | Exception
) -> None:
    parking = await parked(folder, start_of(), 500, 600)
    engine = FakeEngine(folder, 0, 0)
    engine.fails["restore"] = failure
    await restore(parking, start_of(), await parking.fetch(start_of()), engine)
    assert engine.asked == ["restore 0"]
    assert "conversation not restored" in caplog.text
    assert (names(folder), parking.count) == ([], 0)


@virtual_time
async def test_an_engine_that_hangs_over_a_file_is_waited_for_in_bounds(folder: Path) -> None:
    parking = await parked(folder, start_of(), 500)
    engine = FakeEngine(folder, 0)
    engine.hangs.add("restore")
    whole = await parking.fetch(start_of())
    before = asyncio.get_running_loop().time()
    await restore(parking, start_of(), whole, engine)
    assert asyncio.get_running_loop().time() - before == pytest.approx(CALL_S)
    assert names(folder) == []


@virtual_time
async def test_a_file_that_ends_its_engine_ends_no_second_one(folder: Path) -> None:
    """The server may die with the engine: its next life must not find the manifest."""
    parking = await parked(folder, start_of(), 500)
    engine = FakeEngine(folder, 0)
    found: list[list[str]] = []
    engine.before = lambda action: found.append(suffixes(folder))
    await restore(parking, start_of(), await parking.fetch(start_of()), engine)
    assert found == [["slot"]]


# While the checksums are reckoned.


@virtual_time
async def test_an_engine_does_not_wait_for_checksums(folder: Path, threads: Threads) -> None:
    threads.takes_s["_sealed"] = 3.0
    parking = await opened(folder)
    await park(parking, start_of(), FakeEngine(folder, 500))
    assert asyncio.get_running_loop().time() == 0.0
    assert (suffixes(folder), parking.count) == (["slot"], 1)
    await parking.aclose()
    assert asyncio.get_running_loop().time() == pytest.approx(3.0)
    assert suffixes(folder) == ["slot", "json"]


@virtual_time
async def test_the_next_engine_waits_for_them(folder: Path, threads: Threads) -> None:
    threads.takes_s["_sealed"] = 3.0
    parking = await opened(folder)
    await park(parking, start_of(), FakeEngine(folder, 500))
    assert [slot.tokens for slot in await parking.fetch(start_of())] == [500]
    assert asyncio.get_running_loop().time() == pytest.approx(3.0)


@virtual_time
async def test_a_second_parking_waits_for_them_too(folder: Path, threads: Threads) -> None:
    threads.takes_s["_sealed"] = 3.0
    parking = await opened(folder)
    await park(parking, start_of(), FakeEngine(folder, 500, 700))
    await park(parking, start_of(incarnation=2), FakeEngine(folder, 600))
    await parking.aclose()
    assert [slot.tokens for slot in await parking.fetch(start_of())] == [600]
    assert suffixes(folder) == ["slot", "json"]
    assert (await opened(folder)).count == 1


@pytest.mark.parametrize("moment", ["before", "between", "after"])
@virtual_time
async def test_one_that_leaves_while_they_are_reckoned_leaves_nothing(
    folder: Path, threads: Threads, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another takes its room: before its files are read, when they are, or all is written."""
    (threads.told_s if moment == "after" else threads.takes_s)["_sealed"] = 3.0
    if moment == "between":
        monkeypatch.setattr(Parking, "_sum", lambda *_: (4000, 1))
    parking = await opened(folder, 500 * TOKEN_BYTES)
    await park(parking, start_of(LLAMA), FakeEngine(folder, 400))
    await asyncio.sleep(1.0)
    await park(parking, start_of(QWEN), FakeEngine(folder, 450))
    await parking.aclose()
    assert suffixes(folder) == ["slot", "json"]
    assert (parking.count, (await opened(folder)).count) == (1, 1)
