"""What is known of other servers, and when they are asked, on a clock that jumps."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import msgspec
import pytest

from tests.fakes.loop import virtual_time
from xandrouting.core.errors import EngineRejected, UpstreamUnreachable
from xandrouting.core.model import Backend
from xandrouting.engines.upstream import root_of
from xandrouting.net.client import Client, ConnectError, UpstreamError
from xandrouting.upstreams import ollama, openai
from xandrouting.upstreams.circuit import FIRST_S, MAX_S, REFUSE_S, Circuit, pause_s
from xandrouting.upstreams.line import ANSWER_S, LOOK_EVERY_S, Line
from xandrouting.upstreams.openai import MAX_BYTES, Unusable
from xandrouting.upstreams.upstreams import AGAIN_S, Upstreams, split_name
from xandrouting.upstreams.values import Address, Listing, RemoteModel, RunningModel

REFUSED = ConnectError("connection refused")
EMPTY = b'{"data": []}'


class There:
    """Stands in for a client: answers by path, or fails, and notes when it was asked."""

    def __init__(self, **answers: object) -> None:
        self.answers: dict[str, Any] = {f"/{p.replace('__', '/')}": a for p, a in answers.items()}
        self.error: Exception | None = None
        self.hangs = False
        self.takes_s = 0.0
        self.times: list[float] = []
        self.paths: list[str] = []
        self.limits: set[int] = set()

    async def get(self, path: bytes, *, limit: int) -> tuple[int, bytes]:
        self.times.append(asyncio.get_running_loop().time())
        self.paths.append(path.decode())
        self.limits.add(limit)
        if self.hangs:
            await asyncio.Event().wait()
        await asyncio.sleep(self.takes_s)
        if self.error is not None:
            raise self.error
        answer = self.answers.get(path.decode(), 404)
        if isinstance(answer, int):
            return answer, b""
        body = answer if isinstance(answer, bytes) else msgspec.json.encode(answer)
        return 200, body[:limit]

    def close(self) -> None: ...


def client(**answers: object) -> Client:
    return cast("Client", There(**answers))


# Names and addresses.


@pytest.mark.parametrize(
    ("model", "backend", "meant"),
    [
        ("big/gpt", None, ("big", "gpt")),
        ("big/org/gpt", "auto", ("big", "org/gpt")),
        ("ollama/llama3.2", None, ("ollama", "llama3.2")),
        ("ollama/llama3.2", "ollama", ("ollama", "llama3.2")),
        ("llama3.2:latest", "ollama", ("ollama", "llama3.2:latest")),
        ("user/tiny", "ollama", ("ollama", "user/tiny")),
        ("/models/a.gguf", "ollama", None),
        ("llama3.2", None, None),
        ("big", None, None),
        ("big/", None, None),
        ("ollama/", "ollama", None),
        ("huge/gpt", None, None),
        ("big/gpt", "ollama", ("ollama", "big/gpt")),
    ],
)
def test_who_is_meant(model: str, backend: str | None, meant: tuple[str, str] | None) -> None:
    assert split_name(model, backend, {"big", "ollama"}) == meant


def test_without_an_ollama_none_is_meant() -> None:
    assert split_name("llama3.2", "ollama", {"big"}) is None


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("llama3.2", "llama3.2:latest"),
        ("llama3.2:1b", "llama3.2:1b"),
        ("user/tiny", "user/tiny:latest"),
        ("host:5000/user/tiny", "host:5000/user/tiny:latest"),
    ],
)
def test_a_model_s_whole_name(model: str, name: str) -> None:
    assert ollama.canonical(model) == name


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_an_address_is_written_with_and_without_v1(url: str) -> None:
    assert root_of(url) == "http://h:1"
    assert root_of("https://h/api/v1") == "https://h/api"


# Lists.


async def test_what_openai_lists() -> None:
    there = There(
        v1__models={
            "object": "list",
            "data": [
                {"id": "a", "created": 1_700_000_000, "max_model_len": 4096, "more": [1]},
                {"id": "b", "created": None},
                {"id": "c", "created": -62_135_596_800},
            ],
        }
    )
    assert await openai.look(cast("Client", there)) == Listing(
        (RemoteModel("a", 1_700_000_000, 4096), RemoteModel("b"), RemoteModel("c"))
    )
    assert there.limits == {MAX_BYTES + 1}


@pytest.mark.parametrize(
    ("answer", "ids"),
    [
        ({"data": None}, []),  # an Ollama that has none
        ([{"id": "a"}, {"id": "b"}], ["a", "b"]),
        ({"data": [{"id": "a"}, {"id": "b"}, {"id": "a"}]}, ["a", "b"]),
        ({"data": [{"id": "a", "created": "2024-01-01", "max_model_len": "4k"}]}, ["a"]),
    ],
)
async def test_lists_of_other_shapes(answer: object, ids: list[str]) -> None:
    listing = await openai.look(client(v1__models=answer))
    assert listing.models == tuple(RemoteModel(id_) for id_ in ids)


@pytest.mark.parametrize("status", [404, 405, 501])
async def test_who_has_no_list_has_none(status: int) -> None:
    assert await openai.look(client(v1__models=status)) == Listing()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"<html>", "are no models"),
        (b"", "are no models"),
        (b"\xff", "are no models"),
        (b"[" * 100_000, "are no models"),
        ({}, "are no models"),
        ([{"name": "a"}], "are no models"),
        ({"data": [{"name": "a"}]}, "are no models"),
        ({"data": [{"id": ""}]}, "are no models"),
        ({"data": [{"id": "a" * 513}]}, "are no models"),
        ({"data": [{"id": "a"}] * 10_001}, "are no models"),
        (b" " * MAX_BYTES + EMPTY, "larger than 4 MiB"),
        (401, "status 401"),
        (403, "status 403"),
        (307, "redirects to another address"),
        (500, "answers /v1/models with status 500"),
        (204, "answers /v1/models with status 204"),
    ],
)
async def test_what_is_no_list(answer: object, reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        await openai.look(client(v1__models=answer))


TAG = {
    "name": "llama3.2:latest",
    "model": "llama3.2:latest",
    "modified_at": "2023-12-07T09:32:18.757212583-08:00",
    "size": 3_825_819_519,
    "digest": "fe93",
    "details": {"format": "gguf", "families": None, "quantization_level": "Q4_0"},
}
PROCESS = {
    "name": "llama3.2:latest",
    "size": 5_137_025_024,
    "size_vram": 4_000_000_000,
    "expires_at": "2024-06-04T14:38:31.83753-07:00",
}


async def test_what_an_ollama_tells() -> None:
    for_ever = PROCESS | {"name": "b:1", "expires_at": "2318-11-01T10:00:00Z", "context_length": 9}
    there = client(
        api__tags={"models": [TAG, {"name": "b:1", "modified_at": "0001-01-01T00:00:00Z"}]},
        api__ps={"models": [PROCESS, for_ever]},
        api__version={"version": "0.12.6"},
    )
    assert await ollama.look(there) == Listing(
        (
            RemoteModel("llama3.2:latest", 1_701_970_338, None, 3_825_819_519, "Q4_0"),
            RemoteModel("b:1"),
        ),
        (
            RunningModel("llama3.2:latest", 5_137_025_024, 4_000_000_000, 1717537111.83753, None),
            RunningModel("b:1", 5_137_025_024, 4_000_000_000, None, 9),
        ),
        "0.12.6",
    )


async def test_an_ollama_that_is_old_and_empty() -> None:
    assert await ollama.look(client(api__tags={"models": None})) == Listing()


@pytest.mark.parametrize(
    "answers",
    [
        {},
        {"api__tags": {}},
        {"api__tags": {"models": {"a": 1}}},
        {"api__tags": {"models": []}, "api__ps": {"models": 1}},
        {"api__tags": {"models": []}, "api__ps": {}},
        {"api__tags": b'{"models": [' + b"[" * 100_000},
        {"api__tags": {"models": []}, "api__ps": 500},
        {"api__tags": {"models": []}, "api__version": b"1"},
    ],
)
async def test_what_is_no_ollama(answers: dict[str, Any]) -> None:
    with pytest.raises(Unusable):
        await ollama.look(client(**answers))


async def test_an_entry_that_cannot_be_read_is_passed_over() -> None:
    tags = [TAG, {"name": "a", "size": -1}, {"size": 1}, 7, TAG | {"name": "b:1"}]
    processes = [PROCESS | {"size_vram": "all"}, {"name": "x\n" * 200}, PROCESS]
    listing = await ollama.look(
        client(
            api__tags={"models": tags}, api__ps={"models": processes}, api__version={"version": "1"}
        )
    )
    assert [model.id for model in listing.models] == ["llama3.2:latest", "b:1"]
    assert [running.id for running in listing.running] == ["llama3.2:latest"]
    assert listing.version == "1"
    why = [entry.partition(": ") for entry in listing.odd]
    assert [which for which, _, _ in why] == [
        "/api/tags 'a'",
        "/api/tags None",
        "/api/tags one without a name",
        "/api/ps 'llama3.2:latest'",
        "/api/ps '" + "x\\n" * 33,
    ]
    assert why[3][2] == "Expected `int`, got `str` - at `$.size_vram`"


# Watching.


@asynccontextmanager
async def watched(name: str = "big", there: There | None = None, *, expected: bool = True) -> Any:
    line = Line(name, Address("http://h:1", expected=expected))
    line.client = cast("Client", there or There(v1__models=EMPTY))
    task = asyncio.create_task(line.watch())
    try:
        yield line
    finally:
        task.cancel()
        await asyncio.wait({task})


@virtual_time
async def test_one_that_is_up_is_asked_at_a_steady_pace() -> None:
    there = There(v1__models=EMPTY)
    async with watched(there=there) as line:
        await asyncio.sleep(0.5)
        assert (line.state.available, line.state.reason) == (True, None)
        await asyncio.sleep(3 * LOOK_EVERY_S)
    assert there.times == [0.0, 10.0, 20.0, 30.0]


@virtual_time
async def test_one_that_is_down_is_asked_more_and_more_seldom() -> None:
    there = There()
    there.error = REFUSED
    async with watched(there=there) as line:
        await asyncio.sleep(200.0)
        assert (line.state.available, line.state.reason) == (False, "connection refused")
    assert there.times == [0.0, 1.0, 3.0, 7.0, 15.0, 31.0, 63.0, 123.0, 183.0]


@virtual_time
async def test_one_that_hangs_is_down() -> None:
    there = There()
    there.hangs = True
    async with watched(there=there) as line:
        await asyncio.sleep(ANSWER_S + FIRST_S + 0.5)
        assert line.state.reason == "it does not answer within 5 s"
    assert there.times == [0.0, 6.0]


@virtual_time
async def test_a_change_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    there = There(v1__models={"data": [{"id": "a"}]})
    async with watched(there=there) as line:
        await asyncio.sleep(25.0)
        there.error = UpstreamError("cut", began=True)
        await asyncio.sleep(100.0)
        assert line.state.models_count == 1  # what it had
        assert line.state.reason == "cut"
        there.error = None
        await asyncio.sleep(60.0)
    assert [record.getMessage() for record in caplog.records] == [
        "upstream up upstream=big models=1 version=unknown",
        "upstream down upstream=big reason='cut'",
        "upstream up upstream=big models=1 version=unknown",
    ]


@virtual_time
async def test_one_that_nobody_configured_is_not_missed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    there = There()
    there.error = REFUSED
    async with watched("ollama", there, expected=False) as line:
        assert line.state.backend is Backend.OLLAMA
        assert line.state.reason == "it was not asked yet"
        await asyncio.sleep(100.0)
        assert line.state.since is not None
        assert caplog.records == []
        there.error, there.answers = None, {"/api/tags": {"models": []}}
        await asyncio.sleep(60.0)
        there.error = REFUSED
        await asyncio.sleep(60.0)
    assert [record.getMessage().split()[1] for record in caplog.records] == ["up", "down"]


def an_ollama(*, running: int = 0, odd: int = 0) -> There:
    processes = [PROCESS | {"name": f"m{number}"} for number in range(running)]
    processes += [{"name": f"odd{number}"} for number in range(odd)]
    return There(api__tags={"models": [TAG]}, api__ps={"models": processes})


def asked(there: There, path: str) -> list[float]:
    return [at for at, to in zip(there.times, there.paths, strict=True) if to == path]


@virtual_time
async def test_entries_that_are_passed_over_are_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    there = an_ollama(running=1, odd=1)
    async with watched("ollama", there) as line:
        await asyncio.sleep(3 * LOOK_EVERY_S)
        assert line.state.available
        assert [one.id for one in line.state.listing.running] == ["m0"]
        there.answers |= an_ollama(odd=9).answers
        await asyncio.sleep(3 * LOOK_EVERY_S)
    first, *others = [record.getMessage() for record in caplog.records]
    assert first.startswith(
        "upstream entry passed over upstream=ollama entry=/api/ps 'odd0': Object missing"
    )
    assert [message.partition("entry=")[2][:14] for message in others] == [
        *(f"/api/ps 'odd{number}'" for number in range(1, 6)),
        "",
    ]
    assert others[-1] == "upstream entries passed over upstream=ollama more=3"


@virtual_time
async def test_a_request_has_an_ollama_s_memory_looked_at_soon() -> None:
    there = an_ollama()
    async with watched("ollama", there) as line:
        await asyncio.sleep(5.0)
        there.answers |= an_ollama(running=1).answers
        line.used()
        await asyncio.sleep(0.01)
        assert [one.id for one in line.state.listing.running] == ["m0"]
        for _ in range(30):
            line.used()
            await asyncio.sleep(0.1)
        await asyncio.sleep(20.0)
    assert asked(there, "/api/ps") == [0.0, 5.0, 6.0, 7.0, 8.0, 10.0, 20.0]
    assert asked(there, "/api/tags") == [0.0, 10.0, 20.0]


@virtual_time
async def test_a_request_during_a_look_is_not_forgotten() -> None:
    there = an_ollama()
    async with watched("ollama", there) as line:
        await asyncio.sleep(1.0)
        there.takes_s = 2.0
        line.used()
        await asyncio.sleep(1.0)
        line.used()
        await asyncio.sleep(5.0)
    assert asked(there, "/api/ps") == [0.0, 1.0, 4.0]  # a second after the last had ended


@virtual_time
async def test_a_look_at_the_memory_that_hangs_is_followed_by_a_whole_one() -> None:
    there = an_ollama()
    async with watched("ollama", there) as line:
        await asyncio.sleep(1.0)
        there.takes_s = 60.0
        line.used()
        await asyncio.sleep(ANSWER_S - 0.5)
        assert line.state.available  # one call that hangs says nothing yet
        there.takes_s = 0.0
        await asyncio.sleep(1.0)
        assert line.state.available
    assert asked(there, "/api/ps") == [0.0, 1.0, 6.0]
    assert asked(there, "/api/tags") == [0.0, 6.0]


@virtual_time
async def test_a_fault_in_a_look_at_the_memory_does_not_end_the_watching() -> None:
    there = an_ollama()
    async with watched("ollama", there) as line:
        await asyncio.sleep(2.0)
        there.error = ArithmeticError("nobody thought of it")
        line.used()
        await asyncio.sleep(0.1)
        assert line.state.reason == "its answer could not be read: the server's log has more"
        there.error = None
        await asyncio.sleep(FIRST_S)
        assert line.state.available


@virtual_time
async def test_an_ollama_that_has_gone_is_known_with_the_next_request() -> None:
    there = an_ollama()
    async with watched("ollama", there) as line:
        await asyncio.sleep(2.0)
        there.error = REFUSED
        line.used()
        await asyncio.sleep(0.1)
        assert (line.state.available, line.state.reason) == (False, "connection refused")


@virtual_time
async def test_others_have_no_memory_to_look_at() -> None:
    there = There(v1__models=EMPTY)
    async with watched(there=there) as line:
        await asyncio.sleep(5.0)
        line.used()
        await asyncio.sleep(4.0)
    assert there.times == [0.0]


@virtual_time
async def test_a_fault_of_ours_does_not_end_the_watching() -> None:
    there = There(v1__models=EMPTY)
    there.error = ArithmeticError("nobody thought of it")
    async with watched(there=there) as line:
        await asyncio.sleep(0.1)
        assert line.state.reason == "its answer could not be read: the server's log has more"
        there.error = None
        await asyncio.sleep(FIRST_S)
        assert line.state.available


@virtual_time
async def test_one_whose_list_is_of_no_use_is_not_asked_with_every_request() -> None:
    there = There(v1__models=401)
    async with watched(there=there) as line:
        for _ in range(100):
            line.reached()
            await asyncio.sleep(0.1)
        assert len(there.times) <= 5  # at 0, 1, 3, 7 s


@virtual_time
async def test_a_request_that_gets_through_has_it_asked_at_once() -> None:
    there = There(v1__models=EMPTY)
    there.error = REFUSED
    async with watched(there=there) as line:
        await asyncio.sleep(70.0)
        there.error = None
        line.reached()
        await asyncio.sleep(0)
        await asyncio.sleep(0.1)
        assert line.state.available
        line.reached()
        await asyncio.sleep(1.0)
    assert there.times[-2:] == [63.0, 70.0]  # and not again: it was no news


# Requests.


def test_the_circuit_opens_for_longer_each_time() -> None:
    circuit = Circuit()
    assert circuit.open_s(0.0) == 0.0
    now = 100.0
    for opens_s in (1.0, 2.0, 4.0, REFUSE_S, REFUSE_S):
        circuit.failed("refused", now)
        assert circuit.open_s(now) == opens_s
        now += opens_s
        assert circuit.open_s(now) == 0.0
    assert circuit.reason == "refused"
    circuit.reached()
    assert circuit.open_s(100.0) == 0.0
    circuit.failed("refused", 200.0)
    assert circuit.open_s(200.0) == FIRST_S


def test_those_who_fail_together_are_one_failure() -> None:
    circuit = Circuit()
    for number in range(50):
        circuit.failed("refused", 100.0 + number / 1000)
    assert circuit.open_s(100.0) == FIRST_S


def test_a_pause_has_its_limit() -> None:
    assert [pause_s(n) for n in (1, 2, 6, 7, 10_000)] == [1.0, 2.0, 32.0, MAX_S, MAX_S]


def asking(*outcomes: object) -> Callable[[], Awaitable[object]]:
    rest = list(outcomes)

    async def send() -> object:
        outcome = rest.pop(0)
        if isinstance(outcome, ConnectError):
            raise UpstreamUnreachable("big is away") from outcome
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return send


@asynccontextmanager
async def reaching() -> Any:
    there = There()
    there.hangs = True
    upstreams = Upstreams({"big": Address("http://h:1")})
    async with upstreams:
        upstreams._lines["big"].client = cast("Client", there)
        yield upstreams


@virtual_time
async def test_a_failed_connection_is_tried_once_more() -> None:
    async with reaching() as upstreams:
        assert await upstreams.reach("big", asking(REFUSED, "answer")) == "answer"
        assert asyncio.get_running_loop().time() == AGAIN_S


@virtual_time
async def test_whoever_asked_has_the_memory_looked_at() -> None:
    """As soon as the answer begins, and after a refusal too; those who load look by themselves."""
    there = an_ollama()
    upstreams = Upstreams({"ollama": Address("http://h:1")})
    async with upstreams:
        upstreams._lines["ollama"].client = cast("Client", there)
        await asyncio.sleep(2.0)
        await upstreams.reach("ollama", asking("answer"))
        await asyncio.sleep(2.0)
        with pytest.raises(EngineRejected):
            await upstreams.reach("ollama", asking(EngineRejected("no")))
        await asyncio.sleep(2.0)
    assert asked(there, "/api/ps") == [0.0, 2.0, 4.0]


@virtual_time
async def test_nothing_else_is_tried_again() -> None:
    async with reaching() as upstreams:
        with pytest.raises(EngineRejected):
            await upstreams.reach("big", asking(EngineRejected("no"), "answer"))
        assert asyncio.get_running_loop().time() == 0.0


@virtual_time
async def test_who_comes_after_a_failure_is_refused_unasked_for_a_while() -> None:
    async with reaching() as upstreams:
        with pytest.raises(UpstreamUnreachable, match="big cannot be reached: connection refused"):
            await upstreams.reach("big", asking(REFUSED, REFUSED))
        with pytest.raises(UpstreamUnreachable, match="connection refused") as caught:
            await upstreams.reach("big", asking())
        assert caught.value.retry_after_s == FIRST_S
        await asyncio.sleep(FIRST_S)
        assert await upstreams.reach("big", asking("answer")) == "answer"
        assert await upstreams.reach("big", asking("answer")) == "answer"


@virtual_time
async def test_a_refusal_of_its_own_shows_that_it_is_there() -> None:
    async with reaching() as upstreams:
        with pytest.raises(UpstreamUnreachable):
            await upstreams.reach("big", asking(REFUSED, REFUSED))
        await asyncio.sleep(FIRST_S)
        with pytest.raises(EngineRejected):
            await upstreams.reach("big", asking(EngineRejected("no")))
        with pytest.raises(UpstreamUnreachable) as caught:
            await upstreams.reach("big", asking(REFUSED, REFUSED))
        assert caught.value.retry_after_s == FIRST_S
