"""Who serves a model: by its format, by what is installed, by what was asked."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from tests.fakes.gguf_writer import write_gguf
from tests.fakes.safetensors_writer import write_folder
from xandrouting.core.errors import (
    AmbiguousModel,
    BackendUnavailable,
    EngineNotInstalled,
    GatewayError,
    ModelNotFound,
)
from xandrouting.core.model import Backend, Level
from xandrouting.engines.llamacpp import LlamaCpp
from xandrouting.engines.vllm import Vllm, VllmSetup
from xandrouting.inventory.model_file import Snapshot
from xandrouting.inventory.scan import HeaderCache, scan
from xandrouting.proxy.request import Routing
from xandrouting.routing.catalog import Catalog, Devices, Lack, Route
from xandrouting.routing.facts import facts_of

SETUP = VllmSetup("vllm", None, cache_folder="/data/vllm", drain_s=10)
ADAPTERS = {
    Backend.LLAMACPP: LlamaCpp(),
    Backend.VLLM: Vllm(SETUP),
    Backend.TRANSFORMERS: Vllm(SETUP, Backend.TRANSFORMERS),
}
VLLM, LLAMACPP = (Backend.VLLM, Backend.TRANSFORMERS), (Backend.LLAMACPP,)
LACKS = {
    Backend.LLAMACPP: Lack("llama.cpp is not installed", "pip install 'xandrouting[llamacpp]'"),
    Backend.VLLM: Lack("vLLM is not installed", "xandrouting engines install vllm"),
    Backend.TRANSFORMERS: Lack("vLLM is not installed", "xandrouting engines install vllm"),
}
INSTALL_VLLM = "Install it with `xandrouting engines install vllm`."


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    root = tmp_path_factory.mktemp("models")
    write_gguf(root / "file-Q4_1.gguf")
    write_gguf(root / "cut.gguf", truncate=40)
    write_folder(root / "alone")
    write_folder(root / "named")
    write_gguf(root / "elsewhere" / "named-Q4_1.gguf")
    write_gguf(root / "elsewhere" / "named-Q8_0.gguf", tensors=[("x", (64, 300), "Q8_0")])
    write_gguf(root / "elsewhere" / "named-Q2_K.gguf", truncate=40)
    write_folder(
        root / "both", modules__json="[]", chat_template__jinja="<tool_call>", README__md="x" * 9999
    )
    write_gguf(root / "both" / "another name.gguf")
    write_folder(root / "many")
    write_gguf(root / "many" / "one.gguf")
    write_gguf(root / "many" / "two.gguf")
    (write_folder(root / "damaged") / "config.json").unlink()
    (write_folder(root / "stray") / "config.json").unlink()
    write_gguf(root / "stray" / "whole.gguf")
    return scan(root, HeaderCache())


class Machine:
    """A catalog of a machine without these backends."""

    def __init__(self, snapshot: Snapshot, without: Collection[Backend] = ()) -> None:
        self.catalog = Catalog(
            lambda: snapshot,
            ADAPTERS,
            upstreams={},
            unavailable={backend: LACKS[backend] for backend in without},
            devices=Devices(),
            device_fallback=True,
            versions={Backend.VLLM: "vllm 0.32"},
        )

    def route(self, model: str, backend: str | None = None) -> Route:
        return self.catalog.route(Routing(model=model, backend=backend))

    def serves(self, model: str, backend: str | None = None) -> tuple[str, str]:
        key = self.route(model, backend).spec.key
        return key.model.removeprefix("/models/"), key.backend

    def refusal(self, kind: type[GatewayError], model: str, backend: str | None = None) -> str:
        with pytest.raises(kind) as caught:
            self.route(model, backend)
        assert type(caught.value) is kind
        assert caught.value.param == ("backend" if kind is not AmbiguousModel else "model")
        assert "JSON" not in caught.value.message
        return caught.value.message


@pytest.fixture
def whole(snapshot: Snapshot) -> Machine:
    return Machine(snapshot)


@pytest.fixture
def no_vllm(snapshot: Snapshot) -> Machine:
    return Machine(snapshot, VLLM)


@pytest.fixture
def no_llamacpp(snapshot: Snapshot) -> Machine:
    return Machine(snapshot, LLAMACPP)


# Nobody says which.


def test_a_damaged_folder_does_not_hide_the_gguf_in_it(whole: Machine, no_vllm: Machine) -> None:
    for machine in (whole, no_vllm):
        assert machine.serves("stray") == ("stray/whole.gguf", "llamacpp")
    assert whole.serves("damaged") == ("damaged", "vllm")
    assert whole.serves("stray", "vllm") == ("stray", "vllm")


@pytest.mark.parametrize("backend", [None, "auto"])
@pytest.mark.parametrize(
    ("model", "served", "by"),
    [
        ("file", "file-Q4_1.gguf", "llamacpp"),
        ("alone", "alone", "vllm"),
        ("alone/model.safetensors", "alone", "vllm"),
        ("both", "both", "vllm"),
        ("both/another name.gguf", "both/another name.gguf", "llamacpp"),
        ("many", "many", "vllm"),
        ("named", "named", "vllm"),
        ("elsewhere/named-Q8_0.gguf", "elsewhere/named-Q8_0.gguf", "llamacpp"),
        ("damaged", "damaged", "vllm"),
        ("cut", "cut.gguf", "llamacpp"),
    ],
)
def test_the_format_decides(
    whole: Machine, model: str, backend: str | None, served: str, by: str
) -> None:
    assert whole.serves(model, backend) == (served, by)


def test_why_is_told_where_nobody_asked(whole: Machine) -> None:
    gguf, folder = whole.route("file"), whole.route("alone", "auto")
    assert (gguf.chosen_by, folder.chosen_by) == ("", "safetensors")
    assert gguf.spec.chosen == "backend llamacpp: it serves GGUF files"
    assert folder.spec.chosen == "backend vllm: it serves folders of safetensors"
    asked = whole.route("alone", "vllm")
    assert (asked.chosen_by, asked.spec.chosen) == ("", "")


def test_without_vllm_a_folder_of_both_is_its_gguf(no_vllm: Machine) -> None:
    assert no_vllm.serves("both") == ("both/another name.gguf", "llamacpp")


def test_without_vllm_the_command_is_told(no_vllm: Machine) -> None:
    assert no_vllm.refusal(EngineNotInstalled, "alone") == (
        "'/models/alone' needs vLLM, which cannot be used here: vLLM is not installed. "
        f"{INSTALL_VLLM}"
    )


def test_without_vllm_the_largest_whole_gguf_of_the_model_is_named(no_vllm: Machine) -> None:
    assert no_vllm.refusal(EngineNotInstalled, "named").endswith(
        f"{INSTALL_VLLM} Or ask for '/models/elsewhere/named-Q8_0.gguf', a GGUF of the same model."
    )


def test_without_vllm_several_ggufs_in_the_folder_are_choices(no_vllm: Machine) -> None:
    message = no_vllm.refusal(AmbiguousModel, "many")
    assert "'/models/many/one.gguf' and '/models/many/two.gguf'" in message


def test_without_llamacpp_the_command_is_told(no_llamacpp: Machine) -> None:
    for backend in (None, "llamacpp"):
        assert no_llamacpp.refusal(EngineNotInstalled, "file", backend) == (
            "'/models/file-Q4_1.gguf' needs llama.cpp, which cannot be used here: llama.cpp is "
            "not installed. Install it with `pip install 'xandrouting[llamacpp]'`."
        )


def test_a_reason_without_a_command(snapshot: Snapshot) -> None:
    catalog = Catalog(
        lambda: snapshot,
        ADAPTERS,
        upstreams={},
        unavailable={Backend.VLLM: Lack("its environment is gone")},
        devices=Devices(),
        device_fallback=True,
    )
    with pytest.raises(EngineNotInstalled, match=r"environment is gone\.$"):
        catalog.route(Routing(model="alone"))


def test_what_is_damaged_is_told_of_as_such(no_vllm: Machine, no_llamacpp: Machine) -> None:
    # The last look before the load says what is wrong with it, installed or not.
    for backend in (None, "vllm", "transformers"):
        route = no_vllm.route("damaged", backend)
        assert route.file is not None
        assert route.file.problem == "config.json is missing"
    assert no_llamacpp.route("cut").spec.defaults.n_ctx == 4096


# Somebody says which.


@pytest.mark.parametrize(
    ("model", "backend", "served"),
    [
        ("file", "llamacpp", "file-Q4_1.gguf"),
        ("alone", "vllm", "alone"),
        ("alone", "transformers", "alone"),
        ("both", "vllm", "both"),
        ("both", "llamacpp", "both/another name.gguf"),
        ("named-Q4_1", "llamacpp", "elsewhere/named-Q4_1.gguf"),
    ],
)
def test_who_is_asked_serves_its_format(
    whole: Machine, model: str, backend: str, served: str
) -> None:
    assert whole.serves(model, backend) == (served, backend)


@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_a_gguf_given_to_vllm_names_llamacpp(
    whole: Machine, no_vllm: Machine, backend: str
) -> None:
    for machine in (whole, no_vllm):
        assert machine.refusal(BackendUnavailable, "file", backend) == (
            f"The backend {backend} does not serve GGUF files such as '/models/file-Q4_1.gguf': "
            "ask with the backend llamacpp, or leave `backend` out."
        )


def test_a_folder_given_to_llamacpp_names_vllm_and_a_gguf(
    whole: Machine, no_llamacpp: Machine
) -> None:
    for machine in (whole, no_llamacpp):
        wrong = "The backend llamacpp does not serve folders of safetensors such as "
        right = "ask with the backend vllm, or leave `backend` out."
        assert machine.refusal(BackendUnavailable, "alone", "llamacpp") == (
            f"{wrong}'/models/alone': {right}"
        )
        assert machine.refusal(BackendUnavailable, "named", "llamacpp") == (
            f"{wrong}'/models/named': {right} Or ask for '/models/elsewhere/named-Q8_0.gguf', "
            "a GGUF of the same model."
        )


def test_several_ggufs_in_a_folder_are_choices_for_llamacpp(whole: Machine) -> None:
    assert "fits 2 models" in whole.refusal(AmbiguousModel, "many", "llamacpp")


@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_a_backend_that_is_asked_for_and_not_here(no_vllm: Machine, backend: str) -> None:
    message = no_vllm.refusal(EngineNotInstalled, "alone", backend)
    assert message.startswith("'/models/alone' needs vLLM")
    assert INSTALL_VLLM in message


# Whom an unload means.


@pytest.mark.parametrize(
    ("model", "backend", "meant"),
    [
        ("both", None, ["both", "both/another name.gguf"]),
        ("both", "auto", ["both", "both/another name.gguf"]),
        ("both", "vllm", ["both"]),
        ("both", "llamacpp", ["both/another name.gguf"]),
        ("file", None, ["file-Q4_1.gguf"]),
        ("file", "vllm", ["file-Q4_1.gguf"]),
        ("file", "ollama", ["file-Q4_1.gguf"]),
        ("many", None, ["many"]),  # no request could have loaded its files by that name
    ],
)
def test_which_models_an_unload_means(
    whole: Machine, model: str, backend: str | None, meant: list[str]
) -> None:
    found = whole.catalog.models_meant(model, backend)
    assert sorted(found) == [f"/models/{name}" for name in meant]


def test_an_unload_of_what_is_no_model(whole: Machine) -> None:
    with pytest.raises(AmbiguousModel):
        whole.catalog.models_meant("elsewhere", None)
    with pytest.raises(AmbiguousModel):
        whole.catalog.models_meant("many", "llamacpp")
    with pytest.raises(ModelNotFound):
        whole.catalog.models_meant("nothing", None)


@pytest.mark.parametrize("model", ["both", "/models/both", "file", "stray", "named", "cut"])
def test_a_name_means_the_model_that_a_request_by_it_gets(whole: Machine, model: str) -> None:
    assert whole.catalog.model_meant(model).id == whole.route(model).spec.key.model


def test_who_is_not_installed_is_not_meant_where_another_can_serve(no_vllm: Machine) -> None:
    for model, backend in (("both", None), ("both", "auto"), ("/models/both", None)):
        meant = no_vllm.catalog.model_meant(model).id
        assert meant == no_vllm.route(model, backend).spec.key.model
        assert meant == "/models/both/another name.gguf"
    assert no_vllm.catalog.model_meant("alone").id == "/models/alone"  # nobody else could


# What the engine is told of a folder.


def test_the_spec_of_a_folder(whole: Machine, snapshot: Snapshot) -> None:
    [file] = [file for file in snapshot.models if file.id == "/models/both"]
    spec = whole.route("both").spec
    assert spec.source == str(file.path)
    assert spec.files == (str(file.path / "model.safetensors"),)  # the rest is no weights
    assert spec.flags == ("--runner=pooling",)
    assert spec.revision == file.revision
    assert spec.learned_as == f"{file.revision}||vllm|vllm 0.32"
    assert spec.mmproj is None
    assert spec.cost == ADAPTERS[Backend.VLLM].cost(facts_of(file), "cpu")
    assert (spec.sleep_levels, spec.sleeper_bytes, spec.levels) == ((), None, ())
    assert [name for name, _ in spec.siblings] == ["/models/both/another name.gguf"]


def test_the_spec_of_a_file_is_as_ever(whole: Machine) -> None:
    spec = whole.route("file").spec
    assert spec.files == (spec.source,)
    assert spec.flags == ()
    assert spec.levels == (Level.REST,)


def test_what_an_adapter_may_know_of_a_folder(snapshot: Snapshot) -> None:
    facts = {file.relative: facts_of(file) for file in snapshot.models}
    both = facts["both"]
    assert (both.context_length, both.layers, both.architecture) == (2048, 4, "LlamaForCausalLM")
    assert (both.embedding_length, both.feed_forward, both.vocab_size) == (64, 128, 100)
    assert (both.head_count, both.kv_values) == (8, 2 * 2 * 8)
    assert (both.full_layers, both.sliding_layers, both.sliding_window) == (4, 0, None)
    assert (both.tensor_bytes, both.type_bytes) == (128, (("BF16", 128),))
    assert (both.pooling, both.chat_template) == (True, "<tool_call>")
    assert facts["alone"].pooling is False
    assert facts["damaged"].context_length is None
    assert facts["file-Q4_1.gguf"].kv_values is None
