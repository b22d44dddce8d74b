"""How this process takes its turns on a core that others want too."""

from __future__ import annotations

import contextlib
import os


def come_in_batches(*, on: bool) -> None:
    """Have this thread put nobody off when it wakes up, or be as any other again.

    Where engines run on all cores, each token woke the gateway, and each time an engine's
    thread was put off and the others waited for it: with 8 streams of vLLM on two cores that
    cost 4 % of its speed. In batches several tokens are passed on in one turn. Where a core is
    free nothing changes. A download's mover would not be put off either, though, for up to
    0.3 s: while one runs it has to be off. What this process starts inherits it; engines put it
    off themselves.
    """
    if hasattr(os, "SCHED_BATCH"):  # Linux
        policy = os.SCHED_BATCH if on else os.SCHED_OTHER
        with contextlib.suppress(OSError):  # a sandbox that does not allow it
            os.sched_setscheduler(0, policy, os.sched_param(0))
