"""The pipes that engines' words come by."""

from __future__ import annotations

import asyncio
import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvloop

from xandrouting.launch.pipe import Pipe

PIPES = 200


@contextmanager
def others_open_files() -> Iterator[list[OSError]]:
    """Have threads open and close files; yield what they find wrong with their own."""
    wrong: list[OSError] = []
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            try:
                fd = os.open("/proc/self/stat", os.O_RDONLY)
                os.read(fd, 10)
                os.close(fd)
            except OSError as error:
                wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield wrong
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_the_end_of_a_pipe_closes_nothing_of_others() -> None:
    async def end_some() -> None:
        for _ in range(PIPES):
            readable, writable = os.pipe()
            heard: list[bytes] = []
            pipe = Pipe(io.FileIO(readable, "rb"), heard.append)
            os.write(writable, b"last words")
            os.close(writable)
            async with asyncio.timeout(10):
                await pipe.closed.wait()
            assert b"".join(heard) == b"last words"

    with others_open_files() as wrong:
        uvloop.run(end_some())
    assert wrong == []


async def test_nothing_comes_after_it_is_closed() -> None:
    readable, writable = os.pipe()
    heard: list[bytes] = []
    file = io.FileIO(readable, "rb")
    pipe = Pipe(file, heard.append)
    os.write(writable, b"too late")
    pipe.close()
    pipe.close()
    os.close(writable)
    await asyncio.sleep(0)
    assert (heard, file.closed, pipe.closed.is_set()) == ([], True, True)
