"""One exchange: a request to an engine, its answer to the client as it comes.

The caller holds the lease from `ask` to the end of `relay`, and cancels both when the client
leaves; the connection to the engine is then cut at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from functools import partial
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from xandrouting.core.errors import (
    EngineError,
    EngineRejected,
    GatewayError,
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
from xandrouting.proxy.headers import EVENT_STREAM, STREAM_HEADERS, passed_on
from xandrouting.proxy.sse import DONE, spaced, split_error, split_events

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Explain = Callable[[int, Mapping[str, Any]], GatewayError | None]

ERROR_BYTES: Final = 1 << 20  # an error's body is read up to this size
END_WAIT_S: Final = 1.0  # after [DONE]: how long the end of the engine's answer is waited for


class Answer:
    """What the client has got so far."""

    __slots__ = ("_loop", "_send", "events", "finished", "first_byte", "headers", "started")

    def __init__(self, send: Send, headers: Headers) -> None:
        self._send = send
        self._loop = asyncio.get_running_loop()
        self.headers = headers  # the gateway's own, to be sent with the status line
        self.started = False
        self.finished = False  # the last byte was handed to the server
        self.events = False  # it is an event stream
        self.first_byte: float | None = None  # when the body began, by the loop's clock

    async def start(self, status: int, headers: Headers) -> None:
        """Send the status line and the headers."""
        self.started = True
        await self._send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": headers + self.headers,
            }
        )

    async def body(self, data: bytes, *, last: bool = False) -> None:
        """Send a piece of the body in one write."""
        if self.first_byte is None and data:
            self.first_byte = self._loop.time()
        self.finished = last
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})


async def ask(
    client: Client,
    path: bytes,
    body: bytes,
    *,
    method: bytes = b"POST",
    headers: bytes,
    name: str,
    explain: Explain | None,
    silence_s: float | None = None,
) -> Response:
    """Send `body` to the engine and return its answer once that has begun.

    `name` is what errors call the engine. `headers` are whole lines for the engine. Without
    `explain` a refusal is an answer like any other. For longer than `silence_s` it may not be
    silent, to the end of its answer. End the answer with `relay`.

    Raises:
        UpstreamUnreachable: nobody listens there; the engine never saw the request.
        GatewayError: it broke off, or refused; the error says what it said.
    """
    try:
        response = await client.request(method, path, body, headers, silence_s=silence_s)
    except ConnectError as error:
        raise UpstreamUnreachable(
            f"{name} cannot be reached: {error}. Check that it runs and that its address is "
            "right, then ask again."
        ) from error
    except UpstreamError as error:
        raise _died(name, error) from error
    if response.status < 400 or explain is None:
        return response
    try:
        raise await _rejection(response, name, explain)
    except UpstreamError as error:
        raise _died(name, error) from error
    finally:
        response.close()


def check_foreign(response: Response, *, name: str) -> None:
    """Make sure that the answer of somebody else's server is one of an API; close it if not.

    Raises:
        UpstreamRedirects: it sends us elsewhere.
        UpstreamNotAnApi: it is a web page, or what else has no place here.
    """
    error = _not_ours(response, name)
    if error is not None:
        response.close()
        raise error


def _not_ours(response: Response, name: str) -> GatewayError | None:
    if 300 <= response.status < 400:
        return UpstreamRedirects(
            f"{name} redirects to another address, which is not followed. Set the address it "
            "answers at in the server's settings; the server's log names the host.",
            detail=f"location={_host(response.header(b'location') or b'')}",
        )
    kind = (response.header(b"content-type") or b"").lower()
    if kind and b"json" not in kind and not kind.startswith(EVENT_STREAM):
        shown = kind.partition(b";")[0].strip()[:60].decode("latin-1")
        return UpstreamNotAnApi(
            f"{name} answers with {shown!r}, as no API of this kind does. Check its address in "
            "the server's settings."
        )
    return None


def _host(location: bytes) -> str:
    """Return the host of a redirect's target, fit for a log line; the rest may hold secrets."""
    try:
        return repr(urlsplit(location.decode("latin-1")).hostname or "the same")
    except ValueError:
        return "unreadable"


async def relay(
    response: Response,
    answer: Answer,
    *,
    name: str,
    explain: Explain | None,
    on_whole: Callable[[], None],
    may_be_empty: bool = True,
) -> None:
    """Send the engine's answer on to the client, and close it however this ends.

    `on_whole` is called when the client has all of an event stream, whose end the engine has
    still to tell: the client may ask for something else already.

    Raises:
        UpstreamEmpty: it ended without a byte, which `may_be_empty` would have let pass.
        EngineError: the engine broke off or told of an error, before or after `answer`
            started; the caller tells the client.
        UpstreamTimeout: it was silent for longer than it may be.
    """
    try:
        await _relay(
            response,
            answer,
            None if explain is None else partial(_failed, name, explain),
            on_whole,
            None if may_be_empty else partial(_empty, name),
        )
    except UpstreamError as error:
        raise _died(name, error) from error
    finally:
        response.close()


async def _relay(
    response: Response,
    answer: Answer,
    failed: Callable[[bytes], GatewayError] | None,
    on_whole: Callable[[], None],
    empty: Callable[[], GatewayError] | None,
) -> None:
    """Send the answer on, events whole and each as soon as it is there."""
    kind = (response.header(b"content-type") or b"").lower()
    # One that is compressed, which nobody asked for, cannot be read here and passes as it is.
    events = kind.startswith(EVENT_STREAM) and response.header(b"content-encoding") is None
    # A stream's headers do not wait for its first event, unless it has ended already.
    if empty is not None and (not events or response.ended) and not await response.more():
        raise empty()
    if not answer.started:
        headers = passed_on(response.headers)
        if events:  # [DONE] may end it early, a missing empty line late: no length holds
            headers = [pair for pair in headers if pair[0] != b"content-length"] + STREAM_HEADERS
        await answer.start(response.status, headers)
        answer.events = events
    held = b""
    while await response.more():
        data = response.take()
        empty = None
        if events:
            data, held = split_events(held + data if held else data)
            data = spaced(data)
            data, failure = (data, b"") if failed is None else split_error(data)
            if failed is not None and failure:
                if data:
                    await answer.body(data)
                raise failed(failure)
            if data.endswith(DONE):
                await answer.body(data, last=True)
                on_whole()
                await _finish(response)
                return
        if data:
            last = response.ended and not held
            await answer.body(data, last=last)
            if last:
                return
    if empty is not None:
        raise empty()
    # The last event may lack the empty line that ends it: a client would wait for it.
    await answer.body(held + b"\n\n" if held else b"", last=True)


def _empty(name: str) -> UpstreamEmpty:
    return UpstreamEmpty(f"{name} answered with nothing at all. Ask again, or see its own log.")


def _failed(name: str, explain: Explain, events: bytes) -> GatewayError:
    """Return the error of a stream that goes on to its end after it, and even says [DONE]."""
    event = events.partition(b"\n")[0].removeprefix(b"data:")
    error = _error_object(event)
    known = explain(500, error)
    return known or EngineError(f"{name} failed: {error.get('message') or 'it did not say why'}")


async def _finish(response: Response) -> None:
    """Let the engine end an answer the client has whole, so that its connection can be kept."""
    if response.complete:
        return
    try:
        async with asyncio.timeout(END_WAIT_S):
            while await response.more():
                response.take()
    except (TimeoutError, UpstreamError):
        pass  # closing the response cuts the connection


async def _rejection(response: Response, name: str, explain: Explain) -> GatewayError:
    """Return the engine's error answer as one of ours."""
    status = response.status
    error = _error_object(await response.read(ERROR_BYTES))
    known = explain(status, error)
    if known is not None:
        return known
    detail = error.get("detail")  # where FastAPI itself says why
    why = f": {detail}" if isinstance(detail, str) and detail else "."
    message = str(error.get("message") or f"{name} refused the request with status {status}{why}")
    if status < 500:
        retry_after = response.header(b"retry-after") or b""
        return EngineRejected(
            message,
            status=status,
            error=error,
            retry_after_s=float(retry_after[:9]) if retry_after.isdigit() else None,
        )
    return EngineError(f"{name} failed with status {status}: {message}")


def _error_object(body: bytes) -> Mapping[str, Any]:
    """Return what an engine said under `error`, whatever shape it has."""
    try:
        answer = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    if isinstance(answer, list) and answer:  # as Google's servers answer
        answer = answer[0]
    if not isinstance(answer, dict):
        return {}
    error = answer.get("error", answer)
    return error if isinstance(error, dict) else {"message": str(error)}


def _died(name: str, error: UpstreamError) -> GatewayError:
    if isinstance(error, SilentError):
        return UpstreamTimeout(
            f"{name} was given up: {error}. Ask for less, or raise upstream_timeout_s in the "
            "server's settings."
        )
    return EngineError(f"{name} broke off before the end of its answer. Ask again.")
