"""From what a request says to the engine it needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.gguf_writer import write_gguf
from xandrouting.core.errors import (
    DeviceUnavailable,
    InvalidModelPath,
    InvalidRequest,
    ModelNotFound,
)
from xandrouting.core.model import Backend, FixedCost, Footprint, LoadOptions, ModelKey
from xandrouting.engines.base import ModelFacts
from xandrouting.engines.llamacpp import LlamaCpp
from xandrouting.inventory.model_file import MAX_NAME_LENGTH, ModelFile, Snapshot
from xandrouting.inventory.scan import HeaderCache, scan
from xandrouting.proxy.request import Routing
from xandrouting.routing import catalog as module
from xandrouting.routing.catalog import Catalog, Devices, Lack, Route
from xandrouting.routing.facts import facts_of

ADAPTERS = {Backend.LLAMACPP: LlamaCpp()}
UPSTREAMS = {"ollama": "http://127.0.0.1:11434", "big": "https://big.example/api"}
NOT_HERE = {
    backend: Lack("vLLM is not installed", "xandrouting engines install vllm")
    for backend in (Backend.VLLM, Backend.TRANSFORMERS)
}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    root = tmp_path_factory.mktemp("models")
    write_gguf(root / "qwen" / "qwen-Q4_1.gguf", metadata={"llama.context_length": 32_768})
    write_gguf(root / "small.gguf")  # 2,048 tokens
    write_gguf(root / "vectors.gguf", metadata={"llama.pooling_type": 1})
    write_gguf(root / "cut.gguf", truncate=40)
    return scan(root, HeaderCache())


class World:
    """A catalog and what it is told; `snapshot` may be changed."""

    def __init__(self, snapshot: Snapshot, *, cards: int = 0, fallback: bool = True) -> None:
        self.snapshot = snapshot
        self.catalog = Catalog(
            lambda: self.snapshot,
            ADAPTERS,
            upstreams=UPSTREAMS,
            unavailable=NOT_HERE,
            devices=Devices(cards),
            device_fallback=fallback,
        )

    def route(self, model: str, *, embeddings: bool = False, **fields: Any) -> Route:
        return self.catalog.route(Routing(model=model, **fields), embeddings=embeddings)

    def options(self, model: str, **fields: Any) -> tuple[LoadOptions, LoadOptions]:
        spec = self.route(model, **fields).spec
        return spec.wants, spec.defaults


@pytest.fixture
def world(snapshot: Snapshot) -> World:
    return World(snapshot)


def key(model: str, device: str = "cpu") -> ModelKey:
    return ModelKey(f"/models/{model}", Backend.LLAMACPP, device)


# Files.


def test_a_file_is_served_by_llamacpp(world: World, snapshot: Snapshot) -> None:
    route = world.route("small", ttl=7)
    [file] = [file for file in snapshot.models if file.id == "/models/small.gguf"]
    assert route.spec.key == key("small.gguf")
    assert route.spec.source == str(file.path)
    assert route.spec.revision == file.revision
    assert route.spec.cost == LlamaCpp().cost(facts_of(file), "cpu")
    assert route.spec.placements == ((),)
    assert route.spec.mmproj is None
    assert (route.asked_model, route.ttl_s, route.device_fallback) == (file.id, 7, None)
    assert route.file is file


@pytest.mark.parametrize(
    "name", ["/models/qwen/qwen-Q4_1.gguf", "qwen/qwen-Q4_1.gguf", "qwen", "/models/qwen", "QWEN"]
)
def test_every_spelling_is_one_model(world: World, name: str) -> None:
    assert world.route(name).spec == world.route("qwen-Q4_1").spec
    assert world.route(name).spec.key == key("qwen/qwen-Q4_1.gguf")


def test_a_damaged_file_has_a_route(world: World) -> None:
    # The last look before the load says what is wrong with it.
    route = world.route("cut")
    assert route.file is not None
    assert route.file.problem is not None
    assert route.spec.defaults.n_ctx == 4096


def test_a_projector_goes_along(world: World, snapshot: Snapshot) -> None:
    eyes = Path("/srv/mmproj.gguf")
    world.snapshot = Snapshot(tuple(replace(file, mmproj=eyes) for file in snapshot.models))
    assert world.route("small").spec.mmproj == str(eyes)


@pytest.mark.parametrize("name", ["nothing", "/models/nothing.gguf", "nowhere/qwen", "ollama"])
def test_no_such_model(world: World, name: str) -> None:
    with pytest.raises(ModelNotFound):
        world.route(name)


def test_no_way_out_of_the_root(world: World) -> None:
    with pytest.raises(InvalidModelPath):
        world.route("../small.gguf")


# Options.


def test_what_is_asked_and_what_is_left_open(world: World) -> None:
    wants, defaults = world.options("qwen", n_ctx=8192, n_parallel=1)
    assert wants == LoadOptions(n_ctx=8192, n_parallel=1)
    assert defaults == LlamaCpp().defaults(ModelFacts(1, 32_768), "cpu")


def test_the_default_context_is_no_larger_than_the_model_s(world: World) -> None:
    assert world.options("small")[1].n_ctx == 2048
    assert world.options("small", n_ctx=1000)[0].n_ctx == 1000


def test_context_0_is_the_model_s_own(world: World) -> None:
    assert world.options("qwen", n_ctx=0)[0].n_ctx == 32_768
    assert world.options("small", n_ctx=0)[0].n_ctx == 2048
    assert world.options("cut", n_ctx=0)[0].n_ctx == 4096


def test_on_the_processor_no_layer_is_offloaded(world: World, snapshot: Snapshot) -> None:
    assert world.options("qwen", n_gpu_layers=20)[0].n_gpu_layers == 0
    cards = World(snapshot, cards=1)
    assert cards.options("qwen", n_gpu_layers=20)[0].n_gpu_layers == 20
    assert cards.options("qwen", n_gpu_layers=0)[0].n_gpu_layers == 0
    assert cards.options("qwen", n_gpu_layers=20, device="cpu")[0].n_gpu_layers == 0
    assert cards.options("qwen")[1].n_gpu_layers == -1


def test_vectors_are_asked_for_by_the_call(world: World) -> None:
    assert world.options("qwen", embeddings=True)[0].embeddings is True
    assert world.options("qwen", embeddings=False)[0].embeddings is None
    assert world.options("vectors")[1].embeddings is True


# Backends.


@pytest.mark.parametrize("backend", [None, "auto", "llamacpp"])
def test_gguf_is_llamacpp_s(world: World, backend: str | None) -> None:
    assert world.route("small", backend=backend).spec.key.backend is Backend.LLAMACPP


# Devices.


@pytest.mark.parametrize(
    ("cards", "asked", "device"),
    [
        (0, None, "cpu"),
        (0, "auto", "cpu"),
        (0, "cpu", "cpu"),
        (2, None, "cuda"),
        (2, "auto", "cuda"),
        (2, "cpu", "cpu"),
        (2, "cuda", "cuda"),
        (2, "cuda:0", "cuda:0"),
        (2, "cuda:1", "cuda:1"),
    ],
)
@pytest.mark.parametrize("fallback", [True, False])
def test_a_device_that_is_here(
    snapshot: Snapshot, cards: int, asked: str | None, device: str, fallback: bool
) -> None:
    route = World(snapshot, cards=cards, fallback=fallback).route("small", device=asked)
    assert (route.spec.key, route.device_fallback) == (key("small.gguf", device), None)


@pytest.mark.parametrize(("cards", "asked"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2")])
def test_a_device_that_is_not_here(snapshot: Snapshot, cards: int, asked: str) -> None:
    route = World(snapshot, cards=cards).route("small", device=asked, n_gpu_layers=-1)
    assert (route.spec.key, route.device_fallback) == (key("small.gguf"), asked)
    assert route.spec.wants.n_gpu_layers == 0

    with pytest.raises(DeviceUnavailable, match=asked) as caught:
        World(snapshot, cards=cards, fallback=False).route("small", device=asked)
    assert caught.value.param == "device"
    assert "cpu" in caught.value.message
    assert ("cuda:0 to cuda:1" in caught.value.message) is (cards == 2)


def test_which_devices_an_unload_means(snapshot: Snapshot) -> None:
    without, with_cards = World(snapshot).catalog, World(snapshot, cards=1).catalog
    assert without.devices_meant(None) is None
    assert without.devices_meant("auto") is None
    assert without.devices_meant("cpu") == {"cpu"}
    assert without.devices_meant("cuda") == {"cuda", "cpu"}  # there it fell back to
    assert with_cards.devices_meant("cuda") == {"cuda"}
    assert with_cards.devices_meant("cuda:0") == {"cuda:0"}
    assert with_cards.devices_meant("cuda:3") == {"cuda:3", "cpu"}


# Upstreams.


@pytest.mark.parametrize(
    ("model", "fields", "name", "asked"),
    [
        ("ollama/llama3:8b", {}, "ollama", "llama3:8b"),
        ("ollama/library/llama3", {}, "ollama", "library/llama3"),
        ("ollama/llama3", {"backend": "ollama"}, "ollama", "llama3"),
        ("llama3", {"backend": "ollama"}, "ollama", "llama3"),
        ("big/gpt", {"backend": "auto", "device": "cuda", "ttl": 5, "n_ctx": 9}, "big", "gpt"),
    ],
)
def test_an_upstream_s_model(
    world: World, model: str, fields: dict[str, Any], name: str, asked: str
) -> None:
    route = world.route(model, **fields)
    backend = Backend.OLLAMA if name == "ollama" else Backend.UPSTREAM
    assert route.spec.key == ModelKey(name, backend, "remote")
    assert route.spec.source == UPSTREAMS[name]
    assert route.spec.cost == FixedCost(Footprint(engines=0))
    assert route.spec.wants == route.spec.defaults == LoadOptions()
    assert (route.asked_model, route.ttl_s, route.file) == (asked, 0, None)


def test_an_upstream_s_model_has_no_endless_name(world: World) -> None:
    """It would be remembered with its route."""
    assert world.route("big/" + "a" * MAX_NAME_LENGTH)
    with pytest.raises(InvalidRequest, match="at most 1024 characters"):
        world.route("big/" + "a" * (MAX_NAME_LENGTH + 1))


def test_all_models_of_an_upstream_are_one_engine(world: World) -> None:
    assert world.route("big/a").spec == world.route("big/b").spec


@pytest.mark.parametrize("model", ["big", "big/", "/big/gpt", "Big/gpt", "huge/gpt"])
def test_what_is_no_upstream_is_a_model_s_name(world: World, model: str) -> None:
    with pytest.raises((ModelNotFound, InvalidModelPath)):
        world.route(model)


# Remembered answers.


def test_the_same_question_gets_the_same_route(world: World) -> None:
    first = world.route("small", n_ctx=5, ttl=1)
    assert world.route("small", n_ctx=5, ttl=1) is first
    assert world.route("small", n_ctx=5, ttl=0) is not first
    assert world.route("small", n_ctx=6, ttl=1) is not first
    assert world.route("small", n_ctx=5, ttl=1, embeddings=True) is not first


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("backend", "llamacpp"),
        ("device", "cpu"),
        ("gpu_memory_utilization", 0.5),
        ("max_model_len", 1),
        ("tensor_parallel_size", 1),
        ("cache_type_k", "q8_0"),
        ("cache_type_v", "q8_0"),
        ("n_gpu_layers", 1),
        ("n_ctx", 1),
        ("n_parallel", 1),
        ("ttl", 1),
    ],
)
def test_every_field_is_part_of_the_question(world: World, name: str, value: object) -> None:
    assert name in Routing.__struct_fields__
    assert world.route("small", **{name: value}) is not world.route("small")


def test_a_new_scan_is_asked_anew(world: World, snapshot: Snapshot) -> None:
    first = world.route("small")

    def changed(file: ModelFile) -> ModelFile:
        return replace(file, revision="new")

    world.snapshot = Snapshot(tuple(map(changed, snapshot.models)))
    second = world.route("small")
    assert (first.spec.revision, second.spec.revision) != ("new", "new")
    assert second.spec.revision == "new"
    world.snapshot = Snapshot()
    with pytest.raises(ModelNotFound):
        world.route("small")


def test_what_is_remembered_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ROUTES", 10)
    for number in range(1, 100):
        world.route("small", ttl=number)
    assert len(world.catalog._routes) <= 10


def test_an_error_is_not_remembered(world: World, snapshot: Snapshot) -> None:
    world.snapshot = Snapshot()
    with pytest.raises(ModelNotFound):
        world.route("small")
    world.snapshot = snapshot
    assert world.route("small").spec.key == key("small.gguf")


def test_what_an_adapter_may_know(snapshot: Snapshot) -> None:
    facts = {file.stem: facts_of(file) for file in snapshot.models}
    assert facts["small"].context_length == 2048
    assert facts["small"].layers == 2
    assert (facts["small"].pooling, facts["vectors"].pooling) == (False, True)
    assert facts["cut"].context_length is None
    assert facts["cut"].size_bytes == 40
