"""Which accelerators this machine has, as an engine sees them."""

from __future__ import annotations

import asyncio
import logging
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Sequence
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

NVIDIA: Final = Path("/dev/nvidiactl")
ASK_TIMEOUT_S: Final = 30.0


async def cuda_devices(argv: Sequence[str], *, nvidia: Path = NVIDIA) -> int:
    """Return how many CUDA cards the engine can use; 0 without an NVIDIA driver.

    `argv` is the engine's own program, told to print one line `device NAME` for each device
    it sees: a card the driver knows is of no use to an engine that was built without CUDA.
    """
    if not nvidia.exists():  # noqa: ASYNC240 - a device node; asked once, at the start
        return 0
    process = await asyncio.create_subprocess_exec(*argv, stdin=DEVNULL, stdout=PIPE)
    try:
        async with asyncio.timeout(ASK_TIMEOUT_S):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        log.warning("engine did not list its devices timeout_s=%.0f", ASK_TIMEOUT_S)
        return 0
    return sum(line.startswith(b"device CUDA") for line in output.splitlines())
