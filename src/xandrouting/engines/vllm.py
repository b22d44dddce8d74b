"""vLLM, by its own `vllm serve` from an environment of its own: one server per model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from xandrouting.core.errors import EngineDied, GatewayError, InvalidRequest, UnsupportedByEngine
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
from xandrouting.engines.vllm_memory import VllmCost, batch_tokens, run_bytes
from xandrouting.engines.vllm_sleep import ENV as SLEEP_ENV
from xandrouting.engines.vllm_sleep import FLAG as SLEEP_FLAG
from xandrouting.engines.vllm_sleep import VllmSleep
from xandrouting.engines.vllm_tools import tool_parser
from xandrouting.engines.vllm_words import failure_of, phase_of, progress_of, reason_of

GATE_FOLDER: Final = Path(__file__).parent / "vllm_path"
GATE: Final = "xandrouting_gate.Gate"
WAITER: Final = GATE_FOLDER / "xandrouting_vllm.py"

SEQUENCES_CPU: Final = 8
SEQUENCES_GPU: Final = 16
LONGEST_CPU: Final = 8192  # tokens, where nobody asks: the KV cache is taken whole at the start
LONGEST_GPU: Final = 32_768
# What `VllmCost` reckons with. A batch that has begun is not broken off: on a CPU one of 2,048
# tokens kept an engine busy for 2.8 s after its client had left, and 512 read as fast.
BATCHED_CPU: Final = 512
BATCHED_GPU: Final = 2048
# Its own choice for them, said so that it is ours too: they make vectors or scores of texts.
POOLING: Final = "--runner=pooling"
EAGER: Final = "--enforce-eager"
# It compiles what makes logprobs all the same: 1.5 s of the first request for some, on a machine
# with nothing else to do.
EAGER_ENV: Final = (("TORCHDYNAMO_DISABLE", "1"),)
# How long a thread of the CPU's waits for the others before it sleeps. Beside one busy process on
# two cores the default gave 5 and 8 tokens/s, this 20 and 25.
SPIN: Final = ("GOMP_SPINCOUNT", "1000")
# Once drained it has nothing to lose, and takes 3 s to end by itself; killed it is gone at once,
# and the guard sees to what it leaves.
STOP_GRACE_S: Final = 0.0
# It tells by itself that its engine core or a worker has died, and then takes 2 s to end.
HEALTH_EVERY_S: Final = 0.5
LAST_WORDS_S: Final = 5.0  # from the end of its drain to its own
_SHARE_STEP: Final = 1000  # the share of the card is told in thousandths, rounded up
_DEAD: Final = ("EngineDeadError", "EngineCore", "engine is dead")

_ENV: Final = (
    ("VLLM_API_KEY", "{key}"),
    ("PYTHONPATH", str(GATE_FOLDER)),
    # Nothing of a model comes from the net, nothing of its use goes there.
    ("HF_HUB_OFFLINE", "1"),
    ("TRANSFORMERS_OFFLINE", "1"),
    ("VLLM_NO_USAGE_STATS", "1"),
    ("DO_NOT_TRACK", "1"),
    ("PYTHONUNBUFFERED", "1"),
    # It leaves its sockets behind however it ends; here nobody else can reach them either.
    ("TMPDIR", "{scratch}"),
)


@dataclass(frozen=True, slots=True)
class VllmSetup:
    """What is the same for all models.

    `waiter` is the Python for processes that wait for their model; None: each is started with
    it. `drain_s`: how long a SIGTERM lets streams run on. `fast_start`: nothing is compiled, so
    it starts in seconds and answers slower; None: so on the CPU, not on a card. `card_bytes`
    is the size of the smallest card. `sleeps`: an idle engine may be put to sleep, where its
    device can.
    """

    program: str
    waiter: str | None
    cache_folder: str
    drain_s: float
    fast_start: bool | None = None
    sleeps: bool = False
    card_bytes: int = 0
    cards: tuple[str, ...] = ()  # as CUDA_VISIBLE_DEVICES names them; none: by number


class Vllm:
    """The adapter of the `vllm` backend, for folders of safetensors.

    As `transformers` it is the same server with the model code of that library, which knows
    more architectures and is slower.
    """

    slots: Final = None
    sleeper_bytes: Final = None
    sleep: Final = VllmSleep()

    def __init__(self, setup: VllmSetup, backend: Backend = Backend.VLLM) -> None:
        self.backend: Final = backend
        self._setup = setup

    @property
    def spare_bytes(self) -> int:
        """What a process takes that has imported vLLM: 388 MiB of its own on a CPU."""
        return 400 << 20

    def spare(self) -> LaunchPlan | None:
        """Return the plan of a process that has imported vLLM and waits; None: none is wanted."""
        return self._launch_plan([], []) if self._setup.waiter else None

    def settle(self, wants: LoadOptions, facts: ModelFacts, device: str) -> LoadOptions:
        """Return what vLLM knows of `wants`; of a card only where there is one.

        A model answers for vectors or for text, as it was made: nobody can ask for that.

        Raises:
            InvalidRequest: the context is longer than the model's own. vLLM would say so too,
                but the engine that runs would have been ended for it.
        """
        asked, own = wants.max_model_len, facts.context_length
        if asked is not None and own is not None and asked > own and not facts.stretches:
            raise InvalidRequest(
                f"max_model_len {asked} is more than the model's own context of {own} tokens. "
                "Ask for at most that.",
                param="max_model_len",
            )
        on_cpu = device == "cpu"
        return LoadOptions(
            n_parallel=wants.n_parallel,
            max_model_len=wants.max_model_len,
            gpu_memory_utilization=None if on_cpu else wants.gpu_memory_utilization,
            tensor_parallel_size=None if on_cpu else wants.tensor_parallel_size,
        )

    def defaults(self, facts: ModelFacts, device: str) -> LoadOptions:
        """Return the model's own context up to a length that costs no fortune."""
        on_cpu = device == "cpu"
        longest = LONGEST_CPU if on_cpu or _pools(facts) else LONGEST_GPU
        return LoadOptions(
            n_parallel=SEQUENCES_CPU if on_cpu else SEQUENCES_GPU,
            max_model_len=min(longest, facts.context_length or longest),
        )

    def cost(self, facts: ModelFacts, device: str) -> Cost:
        """Return what an engine of this model takes, by its config and its files' headers."""
        on_cpu = device == "cpu"
        return VllmCost(
            weights_bytes=run_bytes(facts.type_bytes),
            kv_values=facts.kv_values or 0,
            full_layers=facts.full_layers,
            sliding_layers=facts.sliding_layers,
            sliding_window=facts.sliding_window or 0,
            hidden_size=facts.embedding_length or 0,
            intermediate_size=facts.feed_forward or 0,
            vocab_size=facts.vocab_size or 0,
            context_length=facts.context_length or LONGEST_CPU,
            on_cpu=on_cpu,
            eager=self._is_eager(on_cpu=on_cpu),
            batched_tokens=BATCHED_CPU if on_cpu else BATCHED_GPU,
            reads_whole=_pools(facts),
            card_bytes=self._setup.card_bytes,
        )

    def plan(
        self,
        spec: EngineSpec,
        options: LoadOptions,
        *,
        placement: Placement,
        slot_folder: str = "",  # noqa: ARG002 - vLLM keeps no conversations
    ) -> LaunchPlan:
        """Return `vllm serve` with these options; `options` must be settled and filled."""
        on_cpu, length = not placement, options.max_model_len
        eager = self._is_eager(on_cpu=on_cpu)
        sleeps = bool(self.sleep.levels_on(spec.key.device)) and self._setup.sleeps
        usual = BATCHED_CPU if on_cpu else BATCHED_GPU
        batched = batch_tokens(usual, length or 0, whole=POOLING in spec.flags)
        argv = [
            self._setup.program,
            "serve",
            spec.source,
            "--host=127.0.0.1",
            "--port={port}",
            f"--served-model-name={spec.key.model}",
            f"--middleware={GATE}",
            "--disable-uvicorn-access-log",
            f"--shutdown-timeout={math.ceil(self._setup.drain_s)}",
            f"--max-num-seqs={options.n_parallel}",
            f"--max-num-batched-tokens={batched}",
            *([] if length is None else [f"--max-model-len={length}"]),
            *self._memory(spec, options, placement),
            *([EAGER] if eager else []),
            *([SLEEP_FLAG] if sleeps else []),
            *(["--model-impl=transformers"] if self.backend is Backend.TRANSFORMERS else []),
            *spec.flags,
        ]
        env = [
            *(SLEEP_ENV if sleeps else ()),
            *(EAGER_ENV if eager and on_cpu else ()),
            *self._devices(placement),
        ]
        return self._launch_plan(argv, env)

    def flags(self, facts: ModelFacts) -> tuple[str, ...]:
        """Return the flags that the model itself asks for; one that pools calls no tools."""
        if _pools(facts):
            return (POOLING,)
        if not facts.chat_template:
            return ()
        return "--enable-auto-tool-choice", f"--tool-call-parser={tool_parser(facts)}"

    def phase(self, tail: Sequence[str]) -> Phase:
        """Tell by the lines vLLM prints."""
        return phase_of(tail)

    def progress(self, tail: Sequence[str]) -> float | None:
        """Tell by its progress bar."""
        return progress_of(tail)

    def classify(self, tail: Sequence[str], status: int | None) -> StartFailure:
        """Tell from vLLM's traceback why a start failed."""
        return failure_of(tail, status)

    def reason(self, tail: Sequence[str]) -> str:
        """Tell it in words."""
        return reason_of(tail)

    def shares(self, facts: ModelFacts, cards: int) -> Sequence[int]:
        """Return the powers of two that its attention heads can be dealt out to."""
        heads = facts.head_count if isinstance(facts.head_count, int) else 1
        sizes = [1 << power for power in range(cards.bit_length())]
        return [size for size in sizes if size <= cards and heads % size == 0]

    def explain(self, status: int, error: Mapping[str, Any], path: str) -> GatewayError | None:
        """Return what vLLM's web framework, or its end, hides."""
        message = str(error.get("message") or error.get("detail") or "")
        if status in (404, 405, 501):
            return UnsupportedByEngine(f"vLLM does not serve {path} for this model: {message}")
        if status >= 500 and any(word in message for word in _DEAD):
            return EngineDied("The engine has just died.")
        return None

    def _launch_plan(self, argv: Sequence[str], env: Sequence[tuple[str, str]]) -> LaunchPlan:
        """Return how to run this command line: by itself, or as the order of one that waits."""
        cache = self._setup.cache_folder
        always = (
            *_ENV,
            ("VLLM_CACHE_ROOT", cache),
            ("TORCHINDUCTOR_CACHE_DIR", f"{cache}/inductor"),
        )
        waiter = self._setup.waiter
        return LaunchPlan(
            argv=tuple(argv) if waiter is None else (waiter, str(WAITER)),
            env=always if waiter is not None else (*always, *env),
            order="" if waiter is None else json.dumps({"argv": argv, "env": dict(env)}),
            stop_grace_s=STOP_GRACE_S,
            health_every_s=HEALTH_EVERY_S,
            drain_s=self._setup.drain_s + LAST_WORDS_S,
        )

    def _is_eager(self, *, on_cpu: bool) -> bool:
        return on_cpu if self._setup.fast_start is None else self._setup.fast_start

    def _memory(
        self, spec: EngineSpec, options: LoadOptions, placement: Placement
    ) -> Sequence[str]:
        """Return how much it may take: what the ledger was told it would."""
        cards = max(1, len(placement))
        footprint = spec.cost.footprint(options, cards)
        if not placement:
            return [f"--kv-cache-memory-bytes={footprint.host.kv_cache}"]
        flags = [f"--tensor-parallel-size={cards}"]
        share = options.gpu_memory_utilization
        if share is not None:
            return [*flags, f"--gpu-memory-utilization={share}"]
        kv_bytes = footprint.device.kv_cache // cards
        if self._setup.card_bytes:
            part = footprint.device_bytes / cards / self._setup.card_bytes
            share = min(1.0, math.ceil(part * _SHARE_STEP) / _SHARE_STEP)
            # It refuses to start where less than this is free.
            flags.append(f"--gpu-memory-utilization={share}")
        return [*flags, f"--kv-cache-memory-bytes={kv_bytes}"]

    def _devices(self, placement: Placement) -> Sequence[tuple[str, str]]:
        if not placement:
            return [("CUDA_VISIBLE_DEVICES", ""), ("VLLM_CPU_OMP_THREADS_BIND", "{cores}"), SPIN]
        return [("CUDA_VISIBLE_DEVICES", visible_devices(placement, self._setup.cards))]


def _pools(facts: ModelFacts) -> bool:
    """Whether vLLM makes vectors or scores with this model, and no text."""
    architecture = facts.architecture or ""
    return (
        facts.pooling
        or architecture.endswith(("Classification", "ForMaskedLM"))
        or "bert" in architecture.lower()
    )
