"""Which cards engines get, what they are told of them, and what the ledger charges.

The machines are invented: catalog, planner and ledger are the real ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pytest

from tests.fakes.gguf_writer import write_gguf
from tests.fakes.safetensors_writer import write_folder
from tests.unit.scheduling import gib, reading
from xandrouting.core.errors import DeviceUnavailable, InsufficientMemory, InvalidRequest
from xandrouting.core.events import (
    Acquire,
    EngineExited,
    EngineReady,
    Grant,
    Refuse,
    Release,
    Start,
    Stop,
)
from xandrouting.core.ledger import Ledger
from xandrouting.core.model import HOST, Backend, EngineSpec, LaunchPlan, Placement, Ticket
from xandrouting.core.planner import Decision
from xandrouting.core.scheduler import Scheduler
from xandrouting.engines.llamacpp import LlamaCpp
from xandrouting.engines.vllm import Vllm, VllmSetup
from xandrouting.inventory.model_file import ModelFile, Snapshot
from xandrouting.inventory.scan import HeaderCache, scan
from xandrouting.proxy.request import Routing
from xandrouting.routing.catalog import Catalog, Devices, Route

CARD_GIB = 24
BOTH = pytest.mark.parametrize("model", ["file", "folder"])


def weighing(file: ModelFile, size_gib: float, heads: int = 32) -> ModelFile:
    """Return a folder as if its weights had this size."""
    assert file.safetensors is not None
    shape = replace(
        file.safetensors.shape,
        type_bytes=(("BF16", gib(size_gib)),),
        num_attention_heads=heads,
    )
    return replace(file, safetensors=replace(file.safetensors, shape=shape))


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    root = tmp_path_factory.mktemp("models")
    write_gguf(root / "file.gguf")
    write_gguf(root / "large-Q4_1.gguf")
    for name in ("folder", "large", "huge", "odd", "vast"):
        write_folder(root / name, README__md="x" * 9999)
    found = scan(root, HeaderCache())
    sizes = {
        "folder": (1, 32),
        "large": (30, 32),
        "huge": (60, 32),
        "odd": (30, 9),
        "vast": (200, 32),
    }
    return Snapshot(
        tuple(
            weighing(file, *sizes[file.stem]) if file.safetensors is not None else file
            for file in found.models
        )
    )


@dataclass(frozen=True, slots=True)
class Started:
    """An engine that was started, or a request that was refused."""

    route: Route
    effect: Start
    launch: LaunchPlan
    charged_gib: Mapping[str, float]

    @property
    def placement(self) -> Placement:
        return self.effect.placement

    @property
    def visible(self) -> str:
        """CUDA_VISIBLE_DEVICES as the engine gets it."""
        env = dict(self.launch.env)
        if self.launch.order:
            env |= json.loads(self.launch.order)["env"]
        return env["CUDA_VISIBLE_DEVICES"]

    @property
    def on(self) -> list[str]:
        """The devices the ledger charges for it, besides main memory."""
        return [device for device, size in self.charged_gib.items() if device != HOST and size]


class Machine:
    """A machine with so many cards; `vllm_cards` are those that its vLLM can use.

    `vllm_cpu`: whether it can do without.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        cards: int,
        *,
        vllm_cards: int | None = None,
        vllm_cpu: bool = True,
        names: Sequence[str] = (),
        fallback: bool = True,
        free_gib: Sequence[float] = (),
    ) -> None:
        free = [*free_gib, *[CARD_GIB] * (cards - len(free_gib))]
        devices = [reading(f"cuda:{n}", CARD_GIB, free[n]) for n in range(cards)]
        self.ledger = Ledger()
        self.ledger.read([reading(HOST, 256, 256), *devices], {})
        self.scheduler = Scheduler(self.ledger)
        setup = VllmSetup(
            "vllm",
            None,
            cache_folder="/data",
            drain_s=10,
            card_bytes=gib(CARD_GIB) if cards else 0,
            cards=tuple(names),
        )
        self.adapters = {
            Backend.LLAMACPP: LlamaCpp(names),
            Backend.VLLM: Vllm(setup),
            Backend.TRANSFORMERS: Vllm(setup, Backend.TRANSFORMERS),
        }
        self.catalog = Catalog(
            lambda: snapshot,
            self.adapters,
            upstreams={},
            unavailable={},
            devices=Devices(cards, cards if vllm_cards is None else vllm_cards, vllm_cpu),
            device_fallback=fallback,
        )
        self._tickets = 0

    def route(self, model: str, **fields: object) -> Route:
        return self.catalog.route(Routing(model=model, **fields))  # type: ignore[arg-type]

    def ask(self, spec: EngineSpec) -> list[object]:
        self._tickets += 1
        return list(self.scheduler.handle(Acquire(Ticket(self._tickets), spec), now=0.0))

    def start(self, model: str, **fields: object) -> Started:
        route = self.route(model, **fields)
        [effect] = self.ask(route.spec)
        assert isinstance(effect, Start), effect
        return self._started(route, effect)

    def _started(self, route: Route, effect: Start) -> Started:
        adapter = self.adapters[route.spec.key.backend]
        launch = adapter.plan(effect.spec, effect.options, placement=effect.placement)
        charge = self.ledger.charge_of(effect.engine)
        charged = {name: size / 2**30 for name, size in charge.items() if name != "engines"}
        return Started(route, effect, launch, charged)

    def refusal(self, model: str, **fields: object) -> InsufficientMemory:
        [effect] = self.ask(self.route(model, **fields).spec)
        assert isinstance(effect, Refuse), effect
        assert isinstance(effect.error, InsufficientMemory)
        return effect.error

    def decision(self, model: str, **fields: object) -> Decision:
        return self.scheduler.plan(self.route(model, **fields).spec, now=0.0)


# One device.


@BOTH
@pytest.mark.parametrize(
    ("cards", "device", "resolved", "visible"),
    [
        (0, "auto", "cpu", ""),
        (0, "cpu", "cpu", ""),
        (1, "auto", "cuda", "0"),
        (1, "cuda", "cuda", "0"),
        (1, "cuda:0", "cuda:0", "0"),
        (1, "cpu", "cpu", ""),
        (2, None, "cuda", "0"),
        (2, "cuda:1", "cuda:1", "1"),
        (4, "auto", "cuda", "0"),
        (4, "cuda:0", "cuda:0", "0"),
        (4, "cuda:3", "cuda:3", "3"),
        (4, "cpu", "cpu", ""),
    ],
)
def test_the_device_decides(
    snapshot: Snapshot, model: str, cards: int, device: str | None, resolved: str, visible: str
) -> None:
    started = Machine(snapshot, cards).start(model, device=device)
    placement = (f"cuda:{visible}",) if visible else ()
    assert started.route.spec.key.device == resolved
    assert started.route.device_fallback is None
    assert started.placement == placement
    assert started.visible == visible
    assert started.on == list(placement)
    assert started.charged_gib[HOST] > 0


@BOTH
@pytest.mark.parametrize(
    ("cards", "device"), [(0, "cuda"), (0, "cuda:0"), (1, "cuda:1"), (4, "cuda:4")]
)
def test_a_card_that_is_not_there_is_the_processor_or_refused(
    snapshot: Snapshot, model: str, cards: int, device: str
) -> None:
    started = Machine(snapshot, cards).start(model, device=device)
    assert (started.route.spec.key.device, started.route.device_fallback) == ("cpu", device)
    assert (started.placement, started.visible, started.on) == ((), "", [])
    with pytest.raises(DeviceUnavailable):
        Machine(snapshot, cards, fallback=False).route(model, device=device)


def test_a_vllm_that_was_built_for_the_processor_uses_no_card(snapshot: Snapshot) -> None:
    machine = Machine(snapshot, 2, vllm_cards=0)
    assert machine.start("folder").placement == ()
    assert machine.start("file").placement == ("cuda:0",)
    asked = machine.route("folder", device="cuda:1")
    assert (asked.spec.key.device, asked.device_fallback) == ("cpu", "cuda:1")
    assert machine.route("file", device="cuda:1").spec.key.device == "cuda:1"


def test_a_vllm_that_was_built_for_cards_has_none_but_those(snapshot: Snapshot) -> None:
    machine = Machine(snapshot, 1, vllm_cpu=False)
    assert machine.start("folder").placement == ("cuda:0",)
    for device in ("cpu", "cuda:1"):  # the other would fall back
        with pytest.raises(DeviceUnavailable) as caught:
            machine.route("large", device=device)
        assert caught.value.message == (
            "The vLLM on this machine is built for GPUs and cannot run '/models/large' on the "
            "cpu: ask for the device cuda. Or ask for '/models/large-Q4_1.gguf', a GGUF of the "
            "same model."
        )
        assert machine.route("file", device=device).spec.key.device == "cpu"


@BOTH
@pytest.mark.parametrize(
    ("names", "device", "visible"),
    [
        (("3", "1"), "auto", "3"),
        (("3", "1"), "cuda:0", "3"),
        (("3", "1"), "cuda:1", "1"),
        (("GPU-ab", "GPU-cd"), "cuda:1", "GPU-cd"),
        (("3", "1"), "cpu", ""),
    ],
)
def test_a_gateway_that_was_given_cards_gives_none_but_those(
    snapshot: Snapshot, model: str, names: tuple[str, ...], device: str, visible: str
) -> None:
    assert Machine(snapshot, 2, names=names).start(model, device=device).visible == visible


@BOTH
def test_the_roomiest_card_is_taken(snapshot: Snapshot, model: str) -> None:
    started = Machine(snapshot, 4, free_gib=[9, 12, 20, 15]).start(model)
    assert started.placement == ("cuda:2",)
    assert started.visible == "2"


def test_engines_of_both_kinds_lie_on_cards_of_their_own(snapshot: Snapshot) -> None:
    machine = Machine(snapshot, 2)
    assert machine.start("folder").placement == ("cuda:0",)
    assert machine.start("file").placement == ("cuda:1",)


def test_no_layers_on_the_card_is_no_card(snapshot: Snapshot) -> None:
    # A card without a layer would only lose memory to CUDA's context.
    started = Machine(snapshot, 1).start("file", n_gpu_layers=0)
    assert started.visible == ""
    assert started.on == []


# Several cards.


@pytest.mark.parametrize(
    ("model", "cards", "placement"),
    [
        ("folder", 1, 1),
        ("folder", 2, 1),
        ("folder", 4, 1),
        ("large", 2, 2),
        ("large", 4, 2),
        ("huge", 4, 4),
    ],
)
def test_as_few_cards_share_a_folder_as_will_do(
    snapshot: Snapshot, model: str, cards: int, placement: int
) -> None:
    started = Machine(snapshot, cards).start(model)
    devices = tuple(f"cuda:{number}" for number in range(placement))
    assert started.placement == devices
    assert started.visible == ",".join(str(number) for number in range(placement))
    assert f"--tensor-parallel-size={placement}" in started.launch.argv
    assert started.on == list(devices)
    shares = {started.charged_gib[device] for device in devices}
    [on_each] = shares
    footprint = started.route.spec.cost.footprint(started.effect.options, placement)
    assert on_each == pytest.approx(footprint.device_bytes / placement / 2**30)
    decision = started.effect.decision
    assert decision is not None
    shared = f"it is shared by {', '.join(devices)}: it does not fit on one of them"
    assert (shared in decision.reasons) is (placement > 1)


def test_neighbours_share_where_they_have_most_room(snapshot: Snapshot) -> None:
    started = Machine(snapshot, 4, free_gib=[20, 22, 24, 23]).start("large")
    assert started.placement == ("cuda:2", "cuda:3")
    assert started.visible == "2,3"


def test_given_cards_are_shared_by_their_names(snapshot: Snapshot) -> None:
    assert Machine(snapshot, 2, names=("5", "GPU-ab")).start("large").visible == "5,GPU-ab"


@pytest.mark.parametrize(
    ("cards", "asked", "placement"),
    [
        (1, 1, ("cuda:0",)),
        (2, 1, ("cuda:0",)),
        (2, 2, ("cuda:0", "cuda:1")),
        (4, 2, ("cuda:0", "cuda:1")),
        (4, 4, ("cuda:0", "cuda:1", "cuda:2", "cuda:3")),
    ],
)
def test_as_many_cards_as_are_asked_for(
    snapshot: Snapshot, cards: int, asked: int, placement: Placement
) -> None:
    started = Machine(snapshot, cards).start("folder", tensor_parallel_size=asked)
    assert started.placement == placement
    assert f"--tensor-parallel-size={asked}" in started.launch.argv
    assert started.on == list(placement)
    assert started.effect.decision is not None
    assert not any("shared" in reason for reason in started.effect.decision.reasons)


@pytest.mark.parametrize(
    ("model", "cards", "asked", "sizes"),
    [
        ("folder", 1, 2, "1"),
        ("folder", 2, 3, "1, 2"),
        ("folder", 2, 4, "1, 2"),
        ("folder", 4, 3, "1, 2, 4"),
        ("odd", 4, 2, "1"),  # nine heads
    ],
)
def test_as_many_cards_as_cannot_be_had(
    snapshot: Snapshot, model: str, cards: int, asked: int, sizes: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Machine(snapshot, cards).route(model, tensor_parallel_size=asked)
    assert caught.value.param == "tensor_parallel_size"
    assert caught.value.message == (
        f"tensor_parallel_size {asked} cannot be had for this model on {cards} cards. "
        f"It may be {sizes}."
    )


def test_one_card_by_name_cannot_be_two(snapshot: Snapshot) -> None:
    machine = Machine(snapshot, 2)
    with pytest.raises(InvalidRequest, match="ask for the device cuda instead of cuda:1"):
        machine.route("folder", device="cuda:1", tensor_parallel_size=2)
    assert machine.start("folder", device="cuda:1", tensor_parallel_size=1).placement == ("cuda:1",)


def test_on_the_processor_cards_mean_nothing(snapshot: Snapshot) -> None:
    for machine, device in ((Machine(snapshot, 0), "auto"), (Machine(snapshot, 2), "cpu")):
        started = machine.start("folder", device=device, tensor_parallel_size=2)
        assert started.placement == ()
        assert started.effect.options.tensor_parallel_size is None


def test_llamacpp_deals_its_layers_out_itself(snapshot: Snapshot) -> None:
    started = Machine(snapshot, 2).start("file", tensor_parallel_size=2)
    assert started.placement == ("cuda:0",)


@pytest.mark.parametrize(
    ("model", "cards", "fields"),
    [
        ("large", 1, {}),
        ("large", 2, {"tensor_parallel_size": 1}),
        ("large", 2, {"device": "cuda:0"}),
        ("odd", 4, {}),
        ("vast", 4, {}),
        ("huge", 4, {"tensor_parallel_size": 2}),
    ],
)
def test_what_cannot_be_shared_is_refused(
    snapshot: Snapshot, model: str, cards: int, fields: dict[str, object]
) -> None:
    error = Machine(snapshot, cards).refusal(model, **fields)
    assert error.details is not None
    assert any(device.startswith("cuda") for device in error.details["lacking_bytes"])


def test_who_is_refused_is_offered_a_gguf_of_the_same_model(snapshot: Snapshot) -> None:
    error = Machine(snapshot, 1).refusal("large")
    assert error.details is not None
    offers = [offer for offer in error.details["alternatives"] if offer["change"] == "model"]
    assert [offer["model"] for offer in offers] == ["/models/large-Q4_1.gguf"]


# An engine that runs already.


def test_cards_that_were_not_asked_for_do_for_who_asks_for_as_many(snapshot: Snapshot) -> None:
    machine = Machine(snapshot, 2)
    for model, cards in (("folder", 1), ("large", 2)):
        machine = Machine(snapshot, 2)
        engine = machine.start(model).effect.engine
        [granted] = machine.scheduler.handle(EngineReady(engine), now=1.0)
        assert isinstance(granted, Grant)
        same = machine.route(model, tensor_parallel_size=cards)
        assert machine.decision(model, tensor_parallel_size=cards).verdict == "hit"
        assert isinstance(machine.ask(same.spec)[0], Grant)


def test_who_asks_for_more_cards_has_it_loaded_anew_and_the_rest_go_along(
    snapshot: Snapshot,
) -> None:
    machine = Machine(snapshot, 2)
    first = machine.start("folder", max_model_len=1024).effect
    machine.scheduler.handle(EngineReady(first.engine), now=1.0)
    machine.scheduler.handle(Release(Ticket(1)), now=1.0)
    both = machine.route("folder", tensor_parallel_size=2).spec
    assert machine.decision("folder", tensor_parallel_size=2).verdict == "reload"
    assert machine.ask(both) == [Stop(first.engine, "options")]
    [again] = machine.scheduler.handle(EngineExited(first.engine), now=2.0)
    assert isinstance(again, Start)
    assert again.placement == ("cuda:0", "cuda:1")
    machine.scheduler.handle(EngineReady(again.engine), now=3.0)
    # Who asks nothing takes what there is; who asks for more context keeps the cards.
    assert isinstance(machine.ask(machine.route("folder").spec)[0], Grant)
    longer = machine.decision("folder", max_model_len=2048)
    assert (longer.verdict, longer.placement) == ("reload", ("cuda:0", "cuda:1"))


# A share of the card.


def test_a_share_of_the_card_is_charged_whole(snapshot: Snapshot) -> None:
    started = Machine(snapshot, 2).start("folder", gpu_memory_utilization=0.5)
    assert started.charged_gib["cuda:0"] == pytest.approx(CARD_GIB / 2)
    assert "--gpu-memory-utilization=0.5" in started.launch.argv
    shared = Machine(snapshot, 2).start(
        "folder", gpu_memory_utilization=0.5, tensor_parallel_size=2
    )
    assert shared.charged_gib["cuda:0"] == pytest.approx(CARD_GIB / 2)
    assert shared.charged_gib["cuda:1"] == pytest.approx(CARD_GIB / 2)


def test_a_share_that_others_leave_no_room_for_names_one_that_fits(snapshot: Snapshot) -> None:
    error = Machine(snapshot, 1, free_gib=[12.5]).refusal("folder", gpu_memory_utilization=0.9)
    assert error.details is not None
    [offer] = [o for o in error.details["alternatives"] if o["change"] == "gpu_memory_utilization"]
    assert offer["gpu_memory_utilization"] == 0.5
