"""llama.cpp, by its own HTTP server inside `xllamacpp`: one process per model."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

from xandrouting.core.errors import EngineRejected, GatewayError, UnsupportedByEngine
from xandrouting.core.model import (
    Backend,
    Cost,
    EngineSpec,
    LaunchPlan,
    LoadOptions,
    Placement,
    StartFailure,
)
from xandrouting.engines.base import ModelFacts, Phase, visible_devices
from xandrouting.engines.llamacpp_memory import CACHE_TYPE, DEFAULT_CTX, cost_of
from xandrouting.engines.llamacpp_slots import LlamaSlots

RUNNER: Final = (sys.executable, "-m", "xandrouting.engines.llamacpp_server")
LIST_DEVICES: Final = (*RUNNER, "--list-devices")

READY_LINE: Final = "xandrouting-engine ready"
WAITING_LINE: Final = "xandrouting-engine waiting"
REST_ORDER: Final = "rest"
KEY_VARIABLE: Final = "XANDROUTING_ENGINE_KEY"

SLOTS_CPU: Final = 2
SLOTS_GPU: Final = 4
MAX_SLOTS: Final = 256  # llama.cpp's LLAMA_MAX_SEQ
MIN_CTX: Final = 2  # llama.cpp aborts when its first trial run does not fit

# The same for every model, so that a runner that waits may take any of them.
_ENV: Final = (
    (KEY_VARIABLE, "{key}"),
    # With busy cores the default spins: 3.6 tokens/s instead of 34.
    ("OMP_WAIT_POLICY", "passive"),
    # When it aborts, its reason shall be its last words, not a debugger's report.
    ("GGML_NO_BACKTRACE", "1"),
    # By the numbers that NVML counts by.
    ("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),
)

# In this order: a file that is cut short also fails to allocate what its header promises.
_FAILURES: Final[tuple[tuple[StartFailure, re.Pattern[str]], ...]] = (
    (StartFailure.UNKNOWN_ARCHITECTURE, re.compile(r"unknown (model )?architecture")),
    (
        StartFailure.BAD_FILE,
        re.compile(
            r"corrupted or incomplete|invalid magic|failed to (read|open) (GGUF|file)"
            r"|gguf_init_from_(file|reader)|error loading model hyperparameters"
            r"|missing tensor|wrong (number|shape) of|failed to read key"
        ),
    ),
    (
        StartFailure.OUT_OF_MEMORY,
        re.compile(r"failed to allocate|out of memory|unable to allocate|bad_alloc|cudaMalloc"),
    ),
    (StartFailure.PORT_IN_USE, re.compile(r"couldn't bind|[Aa]ddress already in use")),
    (
        StartFailure.MISSING_LIBRARY,
        re.compile(r"cannot open shared object|No module named|ModuleNotFoundError|ImportError"),
    ),
)

# llama.cpp answers these with 500, and they are the request's fault.
_CLIENT_FAULTS: Final = re.compile(
    r"^Failed to parse|input is not supported|^Invalid |^Unknown reasoning format"
    r"|is not supported by this server|is too large to process|' is required$|_M_range_check"
)


@dataclass(frozen=True, slots=True)
class Order:
    """What a runner that waits is told: one line of its stdin.

    `env` is set before llama.cpp looks for devices. `embeddings` is how an input is pooled:
    `mean`, or `model` for one that says it itself; None: they are not answered. `port` is a
    number in digits.
    """

    model: str  # the GGUF file, or its first part
    alias: str  # the name the engine answers by
    n_ctx_total: int  # tokens, of all slots
    n_parallel: int  # slots
    n_gpu_layers: int  # -1: all
    cache_type_k: str = CACHE_TYPE
    cache_type_v: str = CACHE_TYPE
    mmproj: str | None = None
    embeddings: str | None = None
    slot_folder: str = ""
    warmup: bool = False
    port: str = "{port}"
    env: Mapping[str, str] | None = None

    def line(self) -> str:
        """Return the line, without its end."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, line: bytes) -> Self:
        """Read a line that `line` wrote."""
        return cls(**json.loads(line))


class LlamaCpp:
    """The adapter of the `llamacpp` backend, for GGUF files."""

    backend: Final = Backend.LLAMACPP
    slots: Final = LlamaSlots()
    sleeper_bytes: Final = 32 << 20
    spare_bytes: Final = sleeper_bytes
    sleep: Final = None

    def __init__(self, cards: Sequence[str] = ()) -> None:
        """`cards` are the names CUDA_VISIBLE_DEVICES knows them by; none: their numbers."""
        self._cards = cards

    def spare(self) -> LaunchPlan | None:
        """Return the plan of a runner that waits; its order is never given."""
        return _launch_plan("none")

    def settle(self, wants: LoadOptions, facts: ModelFacts, device: str) -> LoadOptions:
        """Return `wants` with 0 as the model's own context, and no layers where there is no GPU.

        What is asked beyond the model's own context and llama.cpp's slots is cut: it would do
        no good, and llama.cpp takes memory for every token of a context, however absurd.
        """
        n_ctx = wants.n_ctx
        if n_ctx == 0:
            n_ctx = facts.context_length or DEFAULT_CTX
        elif n_ctx is not None and facts.context_length:
            n_ctx = min(n_ctx, facts.context_length)
        slots = wants.n_parallel
        layers = wants.n_gpu_layers
        if layers is not None and device == "cpu":
            layers = 0
        return LoadOptions(
            n_ctx=n_ctx,
            n_gpu_layers=layers,
            n_parallel=None if slots is None else min(slots, MAX_SLOTS),
            embeddings=wants.embeddings,
            cache_type_k=wants.cache_type_k,
            cache_type_v=wants.cache_type_v,
        )

    def defaults(self, facts: ModelFacts, device: str) -> LoadOptions:
        """Return 4,096 tokens per request or what the model was trained for, if that is less."""
        on_cpu = device == "cpu"
        return LoadOptions(
            n_ctx=min(DEFAULT_CTX, facts.context_length or DEFAULT_CTX),
            n_gpu_layers=0 if on_cpu else -1,
            n_parallel=SLOTS_CPU if on_cpu else SLOTS_GPU,
            embeddings=facts.pooling,
            cache_type_k=CACHE_TYPE,
            cache_type_v=CACHE_TYPE,
        )

    def cost(self, facts: ModelFacts, device: str) -> Cost:
        """Return what an engine of this model takes, by its header."""
        return cost_of(facts, on_cpu=device == "cpu")

    def plan(
        self,
        spec: EngineSpec,
        options: LoadOptions,
        *,
        placement: Placement,
        slot_folder: str = "",
    ) -> LaunchPlan:
        """Return the runner and its order; `options` must be settled and filled."""
        slots = options.n_parallel or 1
        layers = options.n_gpu_layers or 0
        # A card without a layer would only lose memory to CUDA's context.
        cards = placement if layers else ()
        pooling = None
        if options.embeddings:
            # A chat model's file does not say how to make one vector of many.
            pooling = "model" if spec.defaults.embeddings else "mean"
        order = Order(
            model=spec.source,
            alias=spec.key.model,
            n_ctx_total=max(MIN_CTX, (options.n_ctx or DEFAULT_CTX) * slots),
            n_parallel=slots,
            n_gpu_layers=layers,
            cache_type_k=options.cache_type_k or CACHE_TYPE,
            cache_type_v=options.cache_type_v or CACHE_TYPE,
            mmproj=spec.mmproj,
            embeddings=pooling,
            slot_folder=slot_folder,
            warmup=bool(cards),  # on a CPU it costs what it saves
            env={"CUDA_VISIBLE_DEVICES": visible_devices(cards, self._cards)},
        )
        return _launch_plan(order.line())

    def flags(self, facts: ModelFacts) -> tuple[str, ...]:  # noqa: ARG002
        """Return none: llama.cpp reads the model's own template."""
        return ()

    def phase(self, tail: Sequence[str]) -> Phase:
        """Tell by the lines llama.cpp prints at its usual verbosity."""
        text = _since_its_order(tail)
        if "threadpool init" in text:
            return Phase.WARMING
        return Phase.READING if "loading model" in text else Phase.STARTING

    def classify(self, tail: Sequence[str], status: int | None) -> StartFailure:
        """Tell from llama.cpp's error lines why a start failed."""
        text = _since_its_order(tail)
        for failure, pattern in _FAILURES:
            if pattern.search(text):
                return failure
        killed = status in (-signal.SIGKILL, -signal.SIGTERM)  # it aborts by other signals
        return StartFailure.KILLED if killed else StartFailure.EXITED

    def progress(self, tail: Sequence[str]) -> float | None:  # noqa: ARG002
        """Return None: it maps the file, and its memory tells how far it is."""
        return None

    def reason(self, tail: Sequence[str]) -> str:  # noqa: ARG002
        """Return nothing: llama.cpp's error lines are for its developers."""
        return ""

    def shares(self, facts: ModelFacts, cards: int) -> Sequence[int]:  # noqa: ARG002
        """Return one card, or all of them: it deals its layers out."""
        return (1,) if cards == 1 else (1, cards)

    def explain(self, status: int, error: Mapping[str, Any], path: str) -> GatewayError | None:
        """Return the request's fault where llama.cpp's status hides it."""
        message = str(error.get("message", ""))
        if status in (404, 501):
            return UnsupportedByEngine(f"llama.cpp does not serve {path} for this model: {message}")
        if status == 500 and _CLIENT_FAULTS.search(message):
            return EngineRejected(message, error={**error, "code": None, "type": None})
        return None


def _launch_plan(order: str) -> LaunchPlan:
    return LaunchPlan(
        argv=RUNNER,
        env=_ENV,
        ready_line=READY_LINE,
        order=order,
        rest_order=REST_ORDER,
        waiting_line=WAITING_LINE,
    )


def _since_its_order(tail: Sequence[str]) -> str:
    """Return what it printed for the model it has now, as one text."""
    begins = max((n for n, line in enumerate(tail) if line.startswith(WAITING_LINE)), default=0)
    return "\n".join(tail[begins:])
