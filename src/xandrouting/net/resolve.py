"""From a name to addresses, each name by a thread of its own.

The loop would look up all names in a few threads that it has for that: uvloop's are two, and two
names whose name server is silent would keep the connections to every other name from being made.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading

Found = list[str] | Exception


class Name:
    """One host by its name or address; it is looked up once for all who ask meanwhile."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._is_address = _is_address(host)
        self._asked: asyncio.Future[Found] | None = None

    async def addresses(self) -> list[str]:
        """Return its addresses, the best first. Cancelling leaves the look-up to the others.

        Raises:
            OSError: it has none, or nobody answers who would know.
        """
        if self._is_address:
            return [self._host]
        if self._asked is None:
            self._asked = self._ask()
        found = await asyncio.shield(self._asked)
        if isinstance(found, Exception):
            raise socket.gaierror(socket.EAI_NONAME, "no such name") from found
        return found

    def _ask(self) -> asyncio.Future[Found]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Found] = loop.create_future()

        def settle(found: Found) -> None:
            self._asked = None
            answer.set_result(found)

        def look_up() -> None:
            found = _look_up(self._host)
            try:
                loop.call_soon_threadsafe(settle, found)
            except RuntimeError:
                pass  # the loop has ended meanwhile, and with it all who asked

        # A daemon: a name server that is silent must not keep the process from ending.
        threading.Thread(target=look_up, name=f"look up {self._host}", daemon=True).start()
        return answer


def _look_up(host: str) -> Found:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # the latter: it can be no name
        return error
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
