"""Why a load failed, in words that help the one who asked for it."""

from __future__ import annotations

from collections.abc import Sequence

from xandrouting.core.errors import (
    EngineStartFailed,
    GatewayError,
    InsufficientMemory,
    InvalidModelFile,
    InvalidRequest,
    LoadingTimeout,
)
from xandrouting.core.model import StartFailure

_FACES: dict[StartFailure, tuple[type[GatewayError], str]] = {
    StartFailure.OUT_OF_MEMORY: (
        InsufficientMemory,
        (
            "There is not enough memory to load {model}. Unload other models, ask for a smaller "
            "n_ctx or max_model_len, or use a smaller quantization. {reason}"
        ),
    ),
    StartFailure.BAD_FILE: (
        InvalidModelFile,
        "{model} cannot be loaded: its file is damaged or incomplete. Download it again.",
    ),
    StartFailure.UNKNOWN_ARCHITECTURE: (
        InvalidModelFile,
        (
            "{model} cannot be loaded: this version of the engine does not know its architecture. "
            "Update the engine or choose another model. {reason}"
        ),
    ),
    StartFailure.BAD_OPTION: (
        InvalidRequest,
        "{model} cannot be loaded with these options. {reason}",
    ),
    StartFailure.MISSING_LIBRARY: (
        EngineStartFailed,
        (
            "The engine for {model} is not fully installed: a library is missing. "
            "Install it again; the server's log names the library."
        ),
    ),
    StartFailure.PORT_IN_USE: (
        EngineStartFailed,
        "The engine for {model} found its port taken. Ask again.",
    ),
    StartFailure.KILLED: (
        EngineStartFailed,
        (
            "The engine was killed while it loaded {model}, most often for want of memory. "
            "Unload other models or ask for a smaller n_ctx or max_model_len."
        ),
    ),
    StartFailure.STALLED: (
        LoadingTimeout,
        (
            "Loading {model} stalled: nothing moved for {stall_s:.0f} s, so it was ended. "
            "The server's log has the engine's last lines."
        ),
    ),
    StartFailure.EXITED: (
        EngineStartFailed,
        "The engine ended before {model} was ready. The server's log has its last lines.",
    ),
}


def start_error(
    model: str,
    failure: StartFailure,
    tail: Sequence[str],
    *,
    reason: str,
    stall_s: float,
    status: int | None,
) -> GatewayError:
    """Return the error those who wait for `model` get; the last 20 lines go to `detail`.

    `reason` is what the engine said of it, for a client's eyes; empty: nothing. `status` is
    the engine's exit status; None: it did not end by itself.
    """
    kind, text = _FACES[failure]
    return kind(
        text.format(model=model, stall_s=stall_s, reason=reason).rstrip(),
        detail="\n".join(tail[-20:]),
        details={"reason": str(failure), "exit_code": status},
        retry_after_s=5.0 if kind.status == 503 else None,
    )
