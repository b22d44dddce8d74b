"""What providers are said to take, held against what the parser takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jsonschema_rs import Draft202012Validator, meta
from msgspec import Struct

from xandrouting.core.errors import InvalidRequest
from xandrouting.core.ledger import DeviceState
from xandrouting.core.model import HOST, Backend
from xandrouting.engines.base import ModelFacts
from xandrouting.engines.vllm import Vllm, VllmSetup
from xandrouting.http.options import completion_options, device_choices, load_options
from xandrouting.http.provider_schemas import ProviderItem
from xandrouting.http.providers import engine_items, upstream_items
from xandrouting.http.schemas import EngineStatus
from xandrouting.proxy.request import BodyParser, Chat, Inference, LoadRequest
from xandrouting.upstreams.values import Listing, UpstreamState

DEVICES = ["cpu", "cuda:0", "cuda:1"]
LOADS = {backend: load_options(backend, DEVICES, 300.0) for backend in Backend}
ANSWERS = {backend: completion_options(backend) for backend in Backend}
ENGINES = (Backend.LLAMACPP, Backend.VLLM, Backend.TRANSFORMERS)

EDGES = [
    *(-(2**31), -3, -2, -1, 0, 1, 2, 3, 64, 65, 1024, 1025, 2**31 - 1, 2**31, 2**63, 2**64, 10**30),
    *(-2.01, -1.99, -0.01, 0.01, 0.09, 0.1, 0.11, 0.99, 1.01, 1.5, 1.99, 2.01, 1e300),
    *(None, True, False, "", "1", "\n", [], ["END"], [1], [None], {}),
    *("auto", "cpu", "cuda", "cuda:0", "cuda:1", "cpu\n", "CPU", "gpu"),
    *("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1", "q6_K", "F16"),
]
SCALARS = (
    st.sampled_from(EDGES)
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=3)
)
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.sampled_from("ab"), SCALARS)


def sent(value: Any) -> Any:
    """Write a number without a fraction as an integer: to a schema they are the same."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return [sent(each) for each in value] if isinstance(value, list) else value


def bodies(schema: Mapping[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from([*schema["properties"], "unknown"])
    return st.dictionaries(names, VALUES.map(sent), max_size=3)


def parses(kind: type[Struct], body: Mapping[str, Any]) -> bool:
    fields = {"model": "m", "messages": [{"role": "user"}], **body}
    try:
        BodyParser(kind).parse(json.dumps(fields).encode())
    except InvalidRequest:
        return False
    return True


def is_elsewhere(device: Any) -> bool:
    """Whether it names a device that is not here: the catalog answers for it, not the parser."""
    known = [*device_choices(DEVICES), None]
    return device not in known and parses(LoadRequest, {"device": device})


def check_load(schema: dict[str, Any], body: dict[str, Any]) -> None:
    valid = Draft202012Validator(schema).is_valid(body)
    assert valid is parses(LoadRequest, body) is parses(Chat, body), body


def check_answer(schema: dict[str, Any], body: dict[str, Any]) -> None:
    valid = Draft202012Validator(schema).is_valid(body)
    assert valid is parses(Chat, body) is parses(Inference, body), body


@pytest.mark.parametrize("backend", Backend)
def test_what_a_schema_takes_is_what_the_parser_takes(backend: Backend) -> None:
    for check, schema in ((check_load, LOADS[backend]), (check_answer, ANSWERS[backend])):
        for name in [*schema["properties"], "unknown"]:
            for value in EDGES:
                check(schema, {name: value})


@pytest.mark.parametrize("backend", Backend)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_and_so_it_is_with_anything_else(backend: Backend, data: st.DataObject) -> None:
    load = data.draw(bodies(LOADS[backend]))
    assume(not is_elsewhere(load.get("device")))
    check_load(LOADS[backend], load)
    check_answer(ANSWERS[backend], data.draw(bodies(ANSWERS[backend])))


def test_a_device_elsewhere_is_not_listed_and_not_refused() -> None:
    assert is_elsewhere("cuda:2")
    for backend in ENGINES:
        assert not Draft202012Validator(LOADS[backend]).is_valid({"device": "cuda:2"})


SCHEMAS = [*LOADS.values(), *ANSWERS.values()]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_schemas_are_schemas(schema: dict[str, Any]) -> None:
    meta.validate(schema)
    validator = Draft202012Validator(schema)
    for name, described in schema["properties"].items():
        assert described["title"]
        assert described["description"].endswith(".")
        assert validator.is_valid({name: described["default"]})
        for example in described.get("examples", ()):
            assert validator.is_valid({name: example})
        decided = described.get("x-decided-by")
        assert decided in (None, "planner", "model", "engine", "upstream")
        assert decided is None or described["default"] is None
        assert validator.is_valid({name: described.get("x-otherwise")})


def test_who_takes_what() -> None:
    vllm = {"device", "gpu_memory_utilization", "max_model_len", "n_parallel", "ttl"}
    vllm |= {"tensor_parallel_size"}
    caches = {"cache_type_k", "cache_type_v"}
    assert {backend: set(schema["properties"]) for backend, schema in LOADS.items()} == {
        Backend.LLAMACPP: {"device", "n_ctx", "n_gpu_layers", "n_parallel", "ttl", *caches},
        Backend.VLLM: vllm,
        Backend.TRANSFORMERS: vllm,
        Backend.OLLAMA: {"ttl"},
        Backend.UPSTREAM: set(),
    }
    answer = {"temperature", "top_p", "presence_penalty", "frequency_penalty", "max_tokens"}
    for schema in ANSWERS.values():
        assert set(schema["properties"]) == {*answer, "stop", "stream"}


def test_defaults_of_llama_cpp_are_its_own() -> None:
    sampling = pytest.importorskip("xllamacpp").CommonParams().sampling
    said = ANSWERS[Backend.LLAMACPP]["properties"]
    assert said["temperature"]["x-otherwise"] == pytest.approx(sampling.temp)
    assert said["top_p"]["x-otherwise"] == pytest.approx(sampling.top_p)
    assert said["presence_penalty"]["default"] == sampling.penalty_present
    assert said["frequency_penalty"]["default"] == sampling.penalty_freq


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_defaults_of_vllm_are_its_adapter_s(device: str) -> None:
    has = Vllm(VllmSetup("vllm", None, "", 0.0)).defaults(ModelFacts(0), device)
    said = load_options(Backend.VLLM, [device], None)["properties"]
    assert said["n_parallel"]["default"] == has.n_parallel
    assert said["max_model_len"]["default"] == has.max_model_len
    assert said["ttl"]["default"] is None


def test_defaults_follow_the_machine_and_the_settings() -> None:
    on_cpu = load_options(Backend.LLAMACPP, ["cpu"], 0.0)["properties"]
    on_gpu = LOADS[Backend.LLAMACPP]["properties"]
    assert (on_cpu["n_parallel"]["default"], on_gpu["n_parallel"]["default"]) == (2, 4)
    assert on_cpu["device"]["enum"] == ["auto", "cpu", None]
    assert on_gpu["device"]["enum"] == ["auto", "cpu", "cuda", "cuda:0", "cuda:1", None]
    assert (on_cpu["ttl"]["default"], on_gpu["ttl"]["default"]) == (0, 300)
    assert on_gpu["n_ctx"]["default"] == 4096


# The list.


def device(name: str, of: str) -> DeviceState:
    return DeviceState(of, name, 8 << 30, 0, 0, 0, 0, 0, stale=False)


def status(**fields: Any) -> EngineStatus:
    said = {"status": "available", "available": True, "reason": None, "version": None}
    return EngineStatus(**said | fields)


def described(**statuses: EngineStatus) -> dict[str, ProviderItem]:
    known = {backend.value: status() for backend in ENGINES}
    found = engine_items(
        known | statuses, [device("host", HOST), device("NVIDIA L4", "cuda:0")], 300.0
    )
    return {item.id: item for item in found}


def test_engines_are_listed_whether_they_can_serve_or_not() -> None:
    command = "xandrouting engines install vllm"
    missing = status(
        status="unavailable", available=False, reason="vLLM is not installed", command=command
    )
    found = described(llamacpp=status(version="x 1"), vllm=missing)
    assert list(found) == ["llamacpp", "vllm", "transformers"]
    assert found["llamacpp"].available
    assert found["llamacpp"].version == "x 1"
    assert (found["vllm"].available, found["vllm"].command) == (False, command)
    assert found["vllm"].reason == "vLLM is not installed"
    assert "--model-impl transformers" in found["transformers"].description
    taken_by_auto = {i.id: i.formats for i in found.values() if i.default}
    assert taken_by_auto == {"llamacpp": ["gguf"], "vllm": ["safetensors"]}


def test_devices_are_those_the_engine_can_use() -> None:
    found = described(vllm=status(devices=["cpu"]), transformers=status(devices=["cuda:0"]))
    assert [(d.id, d.name) for d in found["llamacpp"].devices] == [
        ("cpu", "CPU"),
        ("cuda:0", "NVIDIA L4"),
    ]
    assert [d.id for d in found["vllm"].devices] == ["cpu"]
    choices = found["transformers"].load_options["properties"]["device"]["enum"]
    assert choices == ["auto", "cuda", "cuda:0", None]
    assert found["llamacpp"].devices[1].capacity_gb == 8.0


def test_upstreams_are_told_as_they_were_last_seen() -> None:
    up = UpstreamState("big", Backend.UPSTREAM, True, None, 1.0, Listing(version="0.9"))
    down = UpstreamState("ollama", Backend.OLLAMA, False, "connection refused", 0.0)
    new = UpstreamState("new", Backend.UPSTREAM, False, None, None)
    found = list(upstream_items([up, down, new]))
    assert [(item.id, item.name, item.kind, item.available) for item in found] == [
        ("big", "big", "upstream", True),
        ("ollama", "Ollama", "upstream", False),
        ("new", "new", "upstream", False),
    ]
    assert [item.reason for item in found] == [
        None,
        "connection refused",
        "it has not answered yet",
    ]
    assert [item.since for item in found] == [None, "1970-01-01T00:00:00.000Z", None]
    assert found[0].version == "0.9"
    assert "ollama/MODEL" in found[1].description
    assert set(found[1].load_options["properties"]) == {"ttl"}
