"""One exchange between a client and an engine, on a clock that jumps."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, cast

import pytest

from tests.fakes.loop import virtual_time
from xandrouting.core.errors import (
    EngineDied,
    EngineError,
    EngineRejected,
    GatewayError,
    UnsupportedByEngine,
    UpstreamEmpty,
    UpstreamNotAnApi,
    UpstreamRedirects,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from xandrouting.net.client import (
    Client,
    ConnectError,
    Headers,
    Response,
    SilentError,
    UpstreamError,
)
from xandrouting.proxy.forward import END_WAIT_S, ERROR_BYTES, Answer, ask, check_foreign, relay
from xandrouting.proxy.headers import EVENT_STREAM_HEADERS, forwarded

END = None  # the answer is complete
CUT = UpstreamError("cut", began=True)
Step = bytes | float | UpstreamError | None
"""A piece of the body, a pause in seconds, a broken connection, or the end."""

EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")
JSON = (b"content-type", b"application/json")


class Wire:
    """Stands in for a connection: each wake-up brings the next steps, up to a pause."""

    def __init__(self, *wakeups: Step | Sequence[Step]) -> None:
        self.response = Response(cast("Any", self))
        self.finished = 0
        self._wakeups = [w if isinstance(w, tuple) else (w,) for w in wakeups]

    async def wait(self) -> None:
        if not self._wakeups:
            await asyncio.Event().wait()
        for step in self._wakeups.pop(0):
            match step:
                case bytes():
                    self.response.feed(step)
                case UpstreamError():
                    self.response.error = step
                case float():
                    await asyncio.sleep(step)
                case _:
                    self.response.complete = True

    def finish(self, response: Response) -> None:
        assert response is self.response
        self.finished += 1

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Upstream:
    """Stands in for the client: one answer to one request."""

    def __init__(
        self, *wakeups: Step | Sequence[Step], status: int = 200, headers: Headers | None = None
    ) -> None:
        self.wire = Wire(*wakeups)
        self.wire.response.status = status
        self.wire.response.headers = [EVENTS] if headers is None else headers
        self.error: Exception | None = None
        self.requests: list[tuple[bytes, bytes, bytes, bytes]] = []
        self.silence_s: float | None = None

    async def request(
        self,
        method: bytes,
        path: bytes,
        body: bytes,
        headers: bytes,
        *,
        silence_s: float | None,
    ) -> Response:
        self.requests.append((method, path, body, headers))
        self.silence_s = silence_s
        if self.error is not None:
            raise self.error
        return self.wire.response


class Got:
    """What the client got, message by message."""

    def __init__(self) -> None:
        self.messages: list[MutableMapping[str, Any]] = []
        self.times: list[float] = []

    async def send(self, message: MutableMapping[str, Any]) -> None:
        self.messages.append(message)
        self.times.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0)

    @property
    def status(self) -> int | None:
        return self.messages[0]["status"] if self.messages else None

    @property
    def headers(self) -> Headers:
        return self.messages[0]["headers"]

    @property
    def pieces(self) -> list[bytes]:
        return [m["body"] for m in self.messages if m["type"] == "http.response.body"]

    @property
    def ended(self) -> bool:
        return bool(self.messages) and self.messages[-1].get("more_body") is False


def no_words(status: int, error: Mapping[str, Any]) -> GatewayError | None:
    return None


async def forward(
    upstream: Upstream, got: Got, *, answer: Answer | None = None, **more: Any
) -> None:
    """Forward one request; the response is given up whatever happens."""
    answer = answer or Answer(got.send, [(b"x-request-id", b"1")])
    explain = more.get("explain", no_words)
    try:
        response = await ask(
            cast("Client", upstream),
            b"/v1/chat/completions",
            b"{}",
            method=more.get("method", b"POST"),
            headers=b"content-type: application/json\r\n",
            name="The engine of qwen",
            explain=explain,
        )
        on_whole = more.get("on_whole", lambda: None)
        name = "The engine of qwen"
        may_be_empty = more.get("may_be_empty", True)
        await relay(
            response,
            answer,
            name=name,
            explain=explain,
            on_whole=on_whole,
            may_be_empty=may_be_empty,
        )
    finally:
        assert upstream.wire.finished == (upstream.error is None)
        assert [m.get("more_body", True) for m in got.messages[:-1]] == [True] * len(
            got.messages[:-1]
        )


@virtual_time
async def test_the_request_goes_out_as_it_was_given() -> None:
    upstream = Upstream(END)
    await forward(upstream, Got())
    assert upstream.requests == [
        (b"POST", b"/v1/chat/completions", b"{}", b"content-type: application/json\r\n")
    ]


@virtual_time
async def test_any_method_goes_out() -> None:
    upstream = Upstream(END)
    await forward(upstream, Got(), method=b"DELETE")
    assert upstream.requests[0][0] == b"DELETE"


@virtual_time
async def test_unexplained_a_refusal_is_an_answer_like_any_other() -> None:
    body = b'{"error":{"code":404,"message":"File Not Found"}}'
    upstream = Upstream(body, END, status=404, headers=[(b"content-type", b"application/json")])
    got = Got()
    await forward(upstream, got, explain=None)
    assert (got.status, b"".join(got.pieces), got.ended) == (404, body, True)


def test_what_an_engine_gets_of_a_clients_headers() -> None:
    kept = [(b"accept", b"text/html"), (b"x-tag", b"1"), (b"x-tag", b"2")]
    secret = [
        (name, b"secret")
        for name in (b"authorization", b"x-api-key", b"cookie", b"proxy-authorization")
    ]
    between = [(b"host", b"h"), (b"content-length", b"2"), (b"transfer-encoding", b"chunked")]
    assert forwarded([*secret, *kept, *between]) == b"accept: text/html\r\nx-tag: 1\r\nx-tag: 2\r\n"


# Streams.


@virtual_time
async def test_each_event_is_sent_whole_and_as_soon_as_it_is_there() -> None:
    got = Got()
    await forward(
        Upstream(
            (1.0, b"data: a\n\n"),
            (1.0, b"data: b"),
            (1.0, b"b\n"),
            (1.0, b"\ndata: c"),
            (1.0, b"\n\ndata: d\n\n", b"data: e\n\n"),
            (1.0, b"data: [DONE]\n\n"),
        ),
        got,
    )
    assert got.pieces == [
        b"data: a\n\n",
        b"data: bb\n\n",
        b"data: c\n\ndata: d\n\ndata: e\n\n",
        b"data: [DONE]\n\n",
    ]
    assert got.times[1:] == [1.0, 4.0, 5.0, 6.0]
    assert got.ended


@virtual_time
async def test_headers_are_sent_before_the_first_event_comes() -> None:
    got = Got()
    await forward(Upstream((5.0, b"data: a\n\n"), END), got)
    assert (got.status, got.times[0]) == (200, 0.0)


@virtual_time
async def test_a_stream_s_headers() -> None:
    got = Got()
    upstream = Upstream(
        END,
        headers=[
            EVENTS,
            (b"connection", b"close"),
            (b"transfer-encoding", b"chunked"),
            (b"keep-alive", b"timeout=5"),
            (b"server", b"llama.cpp"),
            (b"date", b"now"),
            (b"cache-control", b"public"),
            (b"x-accel-buffering", b"yes"),
            (b"access-control-allow-origin", b"*"),
            (b"set-cookie", b"a=b"),
            (b"clear-site-data", b'"*"'),
            (b"strict-transport-security", b"max-age=9"),
            (b"alt-svc", b'h3=":1"'),
            (b"www-authenticate", b"Basic"),
            (b"x-request-id", b"theirs"),
            (b"content-length", b"7"),
            (b"openai-model", b"qwen"),
        ],
    )
    await forward(upstream, got)
    assert got.headers == [
        EVENTS,
        (b"openai-model", b"qwen"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
        (b"x-request-id", b"1"),
    ]


@virtual_time
async def test_done_ends_the_answer_even_if_the_engine_lingers() -> None:
    got, upstream = Got(), Upstream(b"data: a\n\ndata: [DONE]\n\n", (0.5, END))
    await forward(upstream, got)
    assert got.times[-1] == 0.0
    assert got.ended
    assert upstream.wire.response.complete  # so the connection can be kept
    assert asyncio.get_running_loop().time() == 0.5


@pytest.mark.parametrize(
    ("rest", "lasts_s"), [((), END_WAIT_S), ((b"more",), END_WAIT_S), ((CUT,), 0.0)]
)
@virtual_time
async def test_an_engine_that_does_not_end_after_done_is_waited_for_a_while(
    rest: tuple[Step, ...], lasts_s: float
) -> None:
    got = Got()
    await forward(Upstream(b"data: [DONE]\n\n", *rest), got)
    assert got.pieces == [b"data: [DONE]\n\n"]
    assert asyncio.get_running_loop().time() == pytest.approx(lasts_s)


@virtual_time
async def test_who_holds_the_lease_learns_that_the_client_has_its_answer() -> None:
    """The client may ask for another model at once, however late the engine ends its answer."""
    got, whole = Got(), []
    await forward(
        Upstream(b"data: a\n\n", (1.0, b"data: [DONE]\n\n"), (0.5, END)),
        got,
        on_whole=lambda: whole.append((asyncio.get_running_loop().time(), got.ended)),
    )
    assert whole == [(1.0, True)]


@virtual_time
async def test_done_in_crlf_is_done() -> None:
    got, done = Got(), b"data: [DONE]\r\n\r\n"
    await forward(Upstream(b"data: a\r\n\r\n", (1.0, done)), got)
    assert got.pieces == [b"data: a\r\n\r\n", done]
    assert (got.times[-1], got.ended) == (1.0, True)


@virtual_time
async def test_events_without_a_blank_get_one() -> None:
    """XandAI reads no others."""
    got = Got()
    text = b'data:{"content":"data:x\\ndata:y"}\n\n'
    await forward(Upstream(b"data:a\n\n" + text, b"data:[DO", (1.0, b"NE]\n\n")), got)
    assert b"".join(got.pieces) == (
        b'data: a\n\ndata: {"content":"data:x\\ndata:y"}\n\ndata: [DONE]\n\n'
    )
    assert got.ended


@virtual_time
async def test_a_stream_is_one_however_its_kind_is_written() -> None:
    got = Got()
    headers = [(b"content-type", b"Text/Event-Stream")]
    await forward(Upstream(b"data: a\n\nda", b"ta: [DONE]\n\n", headers=headers), got)
    assert got.pieces == [b"data: a\n\n", b"data: [DONE]\n\n"]


@virtual_time
async def test_a_stream_that_is_compressed_passes_as_it_is() -> None:
    got = Got()
    headers = [EVENTS, (b"content-encoding", b"gzip")]
    await forward(Upstream(b"\x1f\x8b\n\n", (b"rest", END), headers=headers), got)
    assert b"".join(got.pieces) == b"\x1f\x8b\n\nrest"
    assert (b"content-encoding", b"gzip") in got.headers


@virtual_time
async def test_done_in_pieces_is_done() -> None:
    got = Got()
    await forward(Upstream(b"data: [DO", b"NE]\n", (b"\n", END)), got)
    assert got.pieces == [b"data: [DONE]\n\n"]


@pytest.mark.parametrize("together", [True, False])
@virtual_time
async def test_done_after_an_error_is_no_success(together: bool) -> None:
    """As vLLM ends its streams when it is told to end."""
    failure = b'data: {"error":{"message":"EngineCore gave up","code":500}}\n\n'
    done = b"data: [DONE]\n\n"
    rest: list[Step | Sequence[Step]] = [failure + done] if together else [failure, (1.0, done)]
    upstream, got = Upstream(b"data: a\n\n", *rest), Got()
    with pytest.raises(EngineError, match="EngineCore gave up"):
        await forward(upstream, got)
    assert got.pieces == [b"data: a\n\n"]
    assert upstream.wire.finished == 1


@virtual_time
async def test_done_inside_a_text_is_not_the_end() -> None:
    got = Got()
    event = b'data: {"content":"data: [DONE]\\n\\n"}\n\n'
    await forward(Upstream(event, (event, END)), got)
    assert got.pieces == [event, event]


@pytest.mark.parametrize("last", [b"data: z", b"data: z\n"])
@pytest.mark.parametrize("together", [True, False])
@virtual_time
async def test_a_last_event_without_its_empty_line_is_completed(
    last: bytes, together: bool
) -> None:
    got = Got()
    rest: list[Any] = [(b"data: y\n\n" + last, END)] if together else [b"data: y\n\n" + last, END]
    await forward(Upstream(*rest), got)
    assert got.pieces == [b"data: y\n\n", last + b"\n\n"]
    assert got.ended


@virtual_time
async def test_crlf_streams_pass_too() -> None:
    got = Got()
    await forward(Upstream(b"data: a\r\n\r\ndata: b\r", b"\n\r\n", (b"x: y\r\n\r\n", END)), got)
    assert got.pieces == [b"data: a\r\n\r\n", b"data: b\r\n\r\n", b"x: y\r\n\r\n"]
    assert got.ended


@virtual_time
async def test_a_stream_that_breaks_off_is_an_error() -> None:
    got = Got()
    with pytest.raises(EngineError, match="The engine of qwen broke off"):
        await forward(Upstream(b"data: a\n\ndata: hal", CUT), got)
    assert got.pieces == [b"data: a\n\n"]  # half an event is worth nothing
    assert not got.ended


@virtual_time
async def test_what_came_before_the_break_is_sent() -> None:
    got = Got()
    with pytest.raises(EngineError):
        await forward(Upstream((b"data: a\n\n", CUT)), got)
    assert got.pieces == [b"data: a\n\n"]


@virtual_time
async def test_an_answer_that_began_with_comments_goes_on() -> None:
    got = Got()
    answer = Answer(got.send, [])
    await answer.start(200, EVENT_STREAM_HEADERS)
    answer.events = True
    await answer.body(b": loading\n\n")
    await forward(Upstream((b"data: a\n\n", END)), got, answer=answer)
    assert [m["type"] for m in got.messages] == ["http.response.start"] + ["http.response.body"] * 2
    assert got.pieces == [b": loading\n\n", b"data: a\n\n"]
    assert got.ended


@virtual_time
async def test_a_cancel_gives_the_response_up() -> None:
    upstream, got = Upstream(b"data: a\n\n"), Got()
    relaying = asyncio.create_task(forward(upstream, got))
    await asyncio.sleep(10.0)
    relaying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await relaying
    assert upstream.wire.finished == 1
    assert not got.ended


# Plain answers.


@virtual_time
async def test_a_plain_answer_passes_as_it_came() -> None:
    got = Got()
    headers = [JSON, (b"content-length", b"11")]
    await forward(Upstream(b'{"a":1}\n\n', (b"{}", END), headers=headers), got)
    assert got.headers == [*headers, (b"x-request-id", b"1")]
    assert got.pieces == [b'{"a":1}\n\n', b"{}"]
    assert got.ended


@pytest.mark.parametrize("wakeups", [(END,), (b"", END)])
@virtual_time
async def test_an_empty_answer_ends(wakeups: tuple[Step, ...]) -> None:
    got = Got()
    await forward(Upstream(*wakeups, status=204, headers=[]), got)
    assert (got.status, b"".join(got.pieces), got.ended) == (204, b"", True)


@virtual_time
async def test_a_body_whose_end_comes_later_ends() -> None:
    got = Got()
    await forward(Upstream(b"{}", (1.0, END), headers=[JSON]), got)
    assert (b"".join(got.pieces), got.ended) == (b"{}", True)


@virtual_time
async def test_the_answer_knows_how_far_it_is() -> None:
    got = Got()
    answer = Answer(got.send, [])
    assert (answer.started, answer.finished, answer.first_byte) == (False, False, None)
    with pytest.raises(EngineError):
        await forward(Upstream((2.0, b"data: a\n\n"), CUT), got, answer=answer)
    assert (answer.started, answer.events, answer.finished) == (True, True, False)
    assert answer.first_byte == 2.0
    await answer.body(b"data: b\n\n", last=True)
    assert (answer.finished, answer.first_byte) == (True, 2.0)


# Refusals and failures.


@pytest.mark.parametrize("status", [400, 404, 413, 422, 429, 499])
@virtual_time
async def test_the_engine_s_refusal_keeps_status_and_words(status: int) -> None:
    said = {"message": "the prompt is too long", "type": "t", "n_ctx": 4096}
    body = json.dumps({"error": said}).encode()
    got = Got()
    upstream = Upstream(body[:9], (body[9:], END), status=status, headers=[JSON])
    with pytest.raises(EngineRejected) as caught:
        await forward(upstream, got)
    error = caught.value
    assert (error.status, error.message, error.error) == (status, said["message"], said)
    assert got.messages == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error":"model not found"}', "model not found"),  # Ollama
        (b'{"object":"error","message":"bad"}', "bad"),  # older vLLM
        (b'{"error":{"message":""}}', "The engine of qwen refused the request with status 400."),
        (b'{"detail":"No"}', "The engine of qwen refused the request with status 400: No"),
        (b'{"detail":[{}]}', "The engine of qwen refused the request with status 400."),
        (b'[{"error":{"message":"no such model"}}]', "no such model"),  # Google's
        (b"<html>no</html>", "The engine of qwen refused the request with status 400."),
        (b"", "The engine of qwen refused the request with status 400."),
        (b"[1]", "The engine of qwen refused the request with status 400."),
        (b"\xff\xfe", "The engine of qwen refused the request with status 400."),
        (b"[" * 100_000, "The engine of qwen refused the request with status 400."),
    ],
    ids=lambda value: str(value[:20]),
)
@virtual_time
async def test_a_refusal_of_any_shape_has_words(body: bytes, message: str) -> None:
    with pytest.raises(EngineRejected) as caught:
        await forward(Upstream((body, END), status=400, headers=[]), Got())
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(b"7", 7.0), (b"9" * 400, 999_999_999.0), (b"soon", None), (b"-1", None), (b"", None)],
)
@virtual_time
async def test_retry_after_passes_if_it_is_a_number(value: bytes, seconds: float | None) -> None:
    upstream = Upstream(END, status=429, headers=[(b"retry-after", value)])
    with pytest.raises(EngineRejected) as caught:
        await forward(upstream, Got())
    assert caught.value.retry_after_s == seconds


@pytest.mark.parametrize("status", [500, 502, 503, 599])
@virtual_time
async def test_the_engine_s_failure_is_a_bad_gateway(status: int) -> None:
    body = b'{"error":{"message":"slot is broken","code":500}}'
    with pytest.raises(EngineError, match=f"status {status}: slot is broken") as caught:
        await forward(Upstream((body, END), status=status, headers=[JSON]), Got())
    assert caught.value.status == 502


@virtual_time
async def test_the_adapter_may_know_better() -> None:
    asked: list[tuple[int, Mapping[str, Any]]] = []

    def explain(status: int, error: Mapping[str, Any]) -> GatewayError | None:
        asked.append((status, error))
        return UnsupportedByEngine("no embeddings")

    upstream = Upstream((b'{"error":{"message":"m"}}', END), status=501, headers=[JSON])
    with pytest.raises(UnsupportedByEngine):
        await forward(upstream, Got(), explain=explain)
    assert asked == [(501, {"message": "m"})]


@virtual_time
async def test_only_so_much_of_an_error_is_read() -> None:
    upstream = Upstream(*[b"x" * (ERROR_BYTES // 2)] * 3, status=500, headers=[])
    with pytest.raises(EngineError):
        await forward(upstream, Got())


@virtual_time
async def test_an_error_that_breaks_off_is_a_failure() -> None:
    with pytest.raises(EngineError, match="broke off"):
        await forward(Upstream(b'{"err', CUT, status=400, headers=[JSON]), Got())


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (ConnectError("refused"), UpstreamUnreachable),
        (UpstreamError("cut", began=False), EngineError),
        (UpstreamError("cut", began=True), EngineError),
    ],
)
@virtual_time
async def test_no_answer_at_all(raised: UpstreamError, kind: type[GatewayError]) -> None:
    upstream, got = Upstream(), Got()
    upstream.error = raised
    with pytest.raises(kind, match="The engine of qwen") as caught:
        await forward(upstream, got)
    assert caught.value.__cause__ is raised
    assert got.messages == []


# Somebody else's server.


@pytest.mark.parametrize(
    ("status", "headers", "error"),
    [
        (200, [JSON], None),
        (200, [EVENTS], None),
        (200, [(b"content-type", b"application/x-ndjson")], None),
        (201, [], None),
        (200, [(b"content-type", b"text/html; charset=utf-8")], UpstreamNotAnApi),
        (200, [(b"content-type", b"TEXT/HTML")], UpstreamNotAnApi),
        (200, [(b"content-type", b"image/png\xff")], UpstreamNotAnApi),
        (301, [JSON, (b"location", b"http://elsewhere:1/?t=secret")], UpstreamRedirects),
        (304, [], UpstreamRedirects),
        (307, [(b"location", b"http://[::")], UpstreamRedirects),
    ],
)
def test_what_is_an_answer_of_an_api(
    status: int, headers: Headers, error: type[GatewayError] | None
) -> None:
    wire = Upstream(status=status, headers=headers).wire
    if error is None:
        check_foreign(wire.response, name="The upstream big")
        assert wire.finished == 0
        return
    with pytest.raises(error, match=r"^The upstream big ") as caught:
        check_foreign(wire.response, name="The upstream big")
    assert wire.finished == 1
    assert "secret" not in caught.value.message + caught.value.detail
    assert "elsewhere" not in caught.value.message


@virtual_time
async def test_one_that_falls_silent() -> None:
    upstream = Upstream(b"data: a\n\n", SilentError("nothing came for 9 s", began=True))
    got = Got()
    with pytest.raises(UpstreamTimeout, match=r"^The engine of qwen was given up: nothing came"):
        await forward(upstream, got)
    assert got.pieces == [b"data: a\n\n"]


@virtual_time
async def test_an_error_in_a_stream_is_told_in_the_adapter_s_words() -> None:
    def explain(status: int, error: Mapping[str, Any]) -> GatewayError | None:
        assert (status, error["message"]) == (500, "EngineDeadError")
        return EngineDied("gone")

    failure = b'data: {"error":{"message":"EngineDeadError"}}\n\n'
    with pytest.raises(EngineDied):
        await forward(Upstream(b"data: a\n\n", failure), Got(), explain=explain)


@virtual_time
async def test_an_answer_that_is_passed_on_raw_keeps_its_errors() -> None:
    failure, got = b'data: {"error":{"message":"x"}}\n\n', Got()
    await forward(Upstream(failure, (0.5, END)), got, explain=None)
    assert b"".join(got.pieces) == failure


# Answers without a byte.


@virtual_time
async def test_an_answer_of_nothing_passes_where_it_may() -> None:
    for headers in ([JSON], [EVENTS]):
        got = Got()
        await forward(Upstream(END, headers=headers), got)
        assert (got.status, b"".join(got.pieces).strip(), got.ended) == (200, b"", True)


@virtual_time
@pytest.mark.parametrize("status", [200, 204])
async def test_an_answer_of_nothing_is_told_before_the_status_line(status: int) -> None:
    got = Got()
    with pytest.raises(UpstreamEmpty, match="The engine of qwen answered with nothing at all"):
        await forward(Upstream(1.0, END, status=status, headers=[JSON]), got, may_be_empty=False)
    assert got.messages == []


@virtual_time
async def test_a_stream_of_nothing_is_told_as_soon_as_that_is_known() -> None:
    """Its headers go out as they come, for a client that waits for them."""
    got, ended = Got(), Upstream()
    with pytest.raises(UpstreamEmpty):
        await forward(Upstream(1.0, END), got, may_be_empty=False)
    assert got.times == [0.0]
    ended.wire.response.complete = True
    with pytest.raises(UpstreamEmpty):
        await forward(ended, got := Got(), may_be_empty=False)
    assert got.messages == []


@virtual_time
async def test_what_is_something_passes_as_ever() -> None:
    event = b'data: {"choices":[]}\n\n'
    got = Got()
    await forward(Upstream(1.0, event, END), got, may_be_empty=False)
    assert (got.pieces[0], got.ended, got.times[:2]) == (event, True, [0.0, 1.0])
    got = Got()
    await forward(Upstream(b"{", 1.0, (b"}", END), headers=[JSON]), got, may_be_empty=False)
    assert (got.pieces, got.times) == ([b"{", b"}"], [1.0, 1.0, 2.0])


@virtual_time
async def test_one_that_breaks_off_before_its_first_byte_is_told_as_such() -> None:
    got = Got()
    with pytest.raises(EngineError, match="broke off"):
        await forward(Upstream(CUT, headers=[JSON]), got, may_be_empty=False)
    assert got.messages == []
