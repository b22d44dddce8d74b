"""What an engine's adapter tells: what to run, what it takes, what its words mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from xandrouting.core.errors import GatewayError
from xandrouting.core.model import (
    Backend,
    Cost,
    EngineSpec,
    LaunchPlan,
    Level,
    LoadOptions,
    Placement,
    StartFailure,
)

PerLayer = int | tuple[int, ...] | None
"""The same for every layer, or one number for each."""


@dataclass(frozen=True, slots=True)
class StateFacts:
    """The shape of layers that keep a state of fixed size instead of keys and values."""

    conv_kernel: int
    inner_size: int
    state_size: int
    group_count: int


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What an adapter may know of a model before it is loaded. None: the file does not say."""

    size_bytes: int
    context_length: int | None = None
    stretches: bool = False  # a context beyond that may do, which only the engine can tell
    layers: int | None = None
    pooling: bool = False  # the file says how to pool: a model made for embeddings or ranking
    architecture: str | None = None
    embedding_length: int | None = None
    feed_forward: int | None = None  # of what works on one token: the chosen experts together
    vocab_size: int | None = None
    head_count: PerLayer = None
    head_count_kv: PerLayer = None
    key_length: int | None = None
    value_length: int | None = None
    key_length_swa: int | None = None  # in layers that see a window
    value_length_swa: int | None = None
    keys_only: bool = False  # values are kept inside the keys (MLA)
    kv_values: int | None = None  # what one layer keeps of one token, where the parts are unknown
    full_layers: int = 0  # of a folder's model: layers that keep all tokens
    sliding_layers: int = 0  # and those that keep a window
    chat_template: str = ""
    sliding_window: int | None = None
    sliding_pattern: PerLayer = None  # one layer in so many is full; a tuple: 1 slides
    state: StateFacts | None = None  # some or all layers keep one
    recurrent_pattern: PerLayer = None  # one layer in so many has none; a tuple: 1 has one
    uncached_layers: int = 0  # the last ones, which keep nothing of their own
    tensor_bytes: int = 0  # the file without its header; 0: unknown
    type_bytes: tuple[tuple[str, int], ...] = ()  # of the tensors, by their type
    block_bytes: tuple[int, ...] = ()  # of each layer's tensors
    embedding_bytes: int = 0  # of the table that turns tokens into vectors
    embedding_type: str | None = None  # of the same
    output_bytes: int = 0  # of the one that turns vectors into tokens; 0: the same table
    mmproj_bytes: int = 0  # of the projector that gives it eyes


def visible_devices(placement: Placement, cards: Sequence[str]) -> str:
    """Return a placement as CUDA_VISIBLE_DEVICES; `cards` are their names there, by number.

    No names: CUDA counts as we do.
    """
    numbers = [int(card.removeprefix("cuda:")) for card in placement]
    return ",".join(cards[number] if cards else str(number) for number in numbers)


class Phase(StrEnum):
    """What a loading engine is at."""

    STARTING = "starting"  # its process begins
    READING = "loading_weights"
    WARMING = "warming_up"  # the model is in memory; a first run, then it listens


@dataclass(frozen=True, slots=True)
class SlotState:
    """One of an engine's slots: how much of a conversation it holds, and whether it works."""

    id: int
    tokens: int
    busy: bool


class Slots(Protocol):
    """How an engine's conversations are saved and read back, by its own HTTP calls.

    Reading an answer raises ValueError, KeyError or TypeError if it is another than expected.
    """

    @property
    def list_path(self) -> bytes:
        """What to GET for the slots' states."""

    def states(self, answer: bytes) -> list[SlotState]:
        """Read the answer."""

    def save(self, slot: int, name: str) -> tuple[bytes, bytes]:
        """Return path and body of the POST that writes a slot to a file of the slot folder."""

    def restore(self, slot: int, name: str) -> tuple[bytes, bytes]:
        """Return path and body of the POST that reads it back."""

    def saved_bytes(self, answer: bytes) -> int:
        """Return the file's size."""

    def restored_tokens(self, answer: bytes) -> int:
        """Return how many tokens were read."""


@dataclass(frozen=True, slots=True)
class Call:
    """A POST to an engine; `answer` is what its answer must hold at least."""

    path: bytes
    body: bytes = b""
    answer: Mapping[str, object] = field(default_factory=dict)


class SleepCalls(Protocol):
    """How an engine is put to sleep and woken by its own HTTP calls, in this order each.

    A call's answer is not believed: who calls looks whether the memory is free.
    """

    def levels_on(self, device: str) -> tuple[Level, ...]:
        """Return how engines on `device` can sleep, from light to deep; none: they cannot."""

    def suspend(self, level: Level, current: Level | None) -> Sequence[Call]:
        """Return the calls that bring one to `level` that sleeps at `current`; None: is awake."""

    def resume(self, level: Level) -> Sequence[Call]:
        """Return the calls after which one that sleeps at `level` takes requests."""


class EngineAdapter(Protocol):
    """One engine: from a spec to a plan. It starts nothing and opens nothing."""

    @property
    def backend(self) -> Backend:
        """The backend it serves."""

    @property
    def slots(self) -> Slots | None:
        """How its conversations are kept beyond its end; None: they are not."""

    @property
    def sleeper_bytes(self) -> int | None:
        """What its process takes while it rests by its plan's order; None: it cannot."""

    @property
    def sleep(self) -> SleepCalls | None:
        """How it sleeps by calls; None: it does not."""

    @property
    def spare_bytes(self) -> int:
        """What a spare takes of main memory."""

    def spare(self) -> LaunchPlan | None:
        """Return the plan of a process that waits for any model's order; None: there is none."""

    def settle(self, wants: LoadOptions, facts: ModelFacts, device: str) -> LoadOptions:
        """Return `wants` in the engine's own terms: "the model's own" as a number, and so on.

        Raises:
            InvalidRequest: no engine of this model can have them.
        """

    def defaults(self, facts: ModelFacts, device: str) -> LoadOptions:
        """Return what an engine is started with where nobody asked."""

    def cost(self, facts: ModelFacts, device: str) -> Cost:
        """Return what an engine of this model takes, for any options."""

    def plan(
        self,
        spec: EngineSpec,
        options: LoadOptions,
        *,
        placement: Placement,
        slot_folder: str = "",
    ) -> LaunchPlan:
        """Return what to run for `spec` with `options`, all of them settled, and where.

        `slot_folder` is where it may save conversations; empty: nowhere.
        """

    def flags(self, facts: ModelFacts) -> tuple[str, ...]:
        """Return what the model itself asks for on the engine's command line."""

    def phase(self, tail: Sequence[str]) -> Phase:
        """Tell from its last lines what a loading engine is at."""

    def classify(self, tail: Sequence[str], status: int | None) -> StartFailure:
        """Tell from its last lines and exit status why a start failed."""

    def progress(self, tail: Sequence[str]) -> float | None:
        """Return the share of the weights it has read, by its own words; None: it does not say."""

    def reason(self, tail: Sequence[str]) -> str:
        """Return its own words for why a start failed, as a client may read them, or nothing."""

    def shares(self, facts: ModelFacts, cards: int) -> Sequence[int]:
        """Return how many of so many cards an engine of this model may use, the fewest first."""

    def explain(self, status: int, error: Mapping[str, Any], path: str) -> GatewayError | None:
        """Return what an error answer of the engine means; None: what its status says."""
