"""Which engines a machine has, as far as can be told without starting one."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.unit.scheduling import gib, reading
from tests.unit.test_provision import environment_at
from xandrouting import backends
from xandrouting.backends import Backends
from xandrouting.core.model import HOST, Backend, EngineSpec, LaunchPlan, LoadOptions, ModelKey
from xandrouting.engines.base import ModelFacts
from xandrouting.routing.catalog import Devices, Lack

BOTH = (Backend.VLLM, Backend.TRANSFORMERS)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the data directory of a machine without any vLLM."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("VLLM_BIN", raising=False)
    return tmp_path / "data"


def look(
    data_dir: Path,
    *cards_gib: float,
    llamacpp_cards: int = 0,
    names: Sequence[str] = (),
    spare: bool = False,
) -> Backends:
    cards = [reading(f"cuda:{n}", size, size) for n, size in enumerate(cards_gib)]
    return backends.look(
        [reading(HOST, 64, 60), *cards],
        llamacpp_cards=llamacpp_cards,
        cards=names,
        data_dir=data_dir,
        drain_s=30,
        fast_start=None,
        sleeps=False,
        vllm_spare=spare,
    )


def launch(found: Backends, backend: Backend, device: str = "cpu") -> LaunchPlan:
    spec = EngineSpec(ModelKey("/models/m", backend, device), "/srv/m")
    placement = () if device == "cpu" else (device,)
    options = LoadOptions(max_model_len=2048, n_parallel=1)
    return found.adapters[backend].plan(spec, options, placement=placement)


def test_every_engine_has_an_adapter_of_its_own_name(machine: Path) -> None:
    found = look(machine)
    assert {name: adapter.backend for name, adapter in found.adapters.items()} == {
        backend: backend for backend in (Backend.LLAMACPP, *BOTH)
    }
    assert found.statuses.keys() == found.adapters.keys()


def test_without_vllm(machine: Path) -> None:
    found = look(machine, 24, 24, llamacpp_cards=2)
    lack = Lack("vLLM is not installed", "xandrouting engines install vllm")
    assert found.lacks == dict.fromkeys(BOTH, lack)
    for backend in BOTH:
        status = found.statuses[backend]
        assert (status.status, status.available, status.version) == ("unavailable", False, None)
        assert (status.reason, status.command) == (lack.reason, lack.command)
        assert status.devices == ["cpu"]
    assert found.devices == Devices(cuda=2, vllm_cuda=0)
    assert found.statuses[Backend.LLAMACPP].devices == ["cpu", "cuda:0", "cuda:1"]
    assert found.statuses[Backend.LLAMACPP].available


def test_with_vllm_for_cards(machine: Path) -> None:
    vllm = environment_at(machine / "engines" / "vllm", vllm="0.32.0")
    found = look(machine, 24, 16)
    assert found.lacks == {}
    assert found.versions[Backend.VLLM] == found.versions[Backend.TRANSFORMERS] == "vllm 0.32.0"
    assert found.versions[Backend.LLAMACPP].startswith("xllamacpp ")
    assert found.devices == Devices(cuda=0, vllm_cuda=2, vllm_cpu=False)
    assert found.statuses[Backend.VLLM].devices == ["cuda:0", "cuda:1"]
    assert launch(found, Backend.VLLM).argv[0] == str(vllm)
    assert "--shutdown-timeout=30" in launch(found, Backend.VLLM).argv
    assert dict(launch(found, Backend.VLLM).env)["VLLM_CACHE_ROOT"] == str(machine / "vllm")


def test_a_vllm_for_cards_is_of_no_use_without_one(machine: Path) -> None:
    environment_at(machine / "engines" / "vllm", vllm="0.32.0")
    found = look(machine)
    command = "xandrouting engines install vllm --cpu --force"
    lack = Lack("it is built for GPUs, and there is none", command)
    assert found.lacks == dict.fromkeys(BOTH, lack)


def test_of_a_vllm_of_unknown_kind_everything_is_believed(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = machine.parent / "my-vllm"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setenv("VLLM_BIN", str(script))
    assert look(machine).lacks == {}
    found = look(machine, 24)
    assert found.devices == Devices(vllm_cuda=1, vllm_cpu=True)
    assert found.statuses[Backend.VLLM].version == "vllm"
    assert found.statuses[Backend.VLLM].devices == ["cpu", "cuda:0"]


def test_a_vllm_for_the_processor_has_no_cards(machine: Path) -> None:
    environment_at(machine / "engines" / "vllm", vllm_cpu="0.32.0", vllm="0.32.0+cpu")
    found = look(machine, 24, llamacpp_cards=1)
    assert found.devices == Devices(cuda=1, vllm_cuda=0)
    assert found.statuses[Backend.VLLM].devices == ["cpu"]
    assert found.statuses[Backend.VLLM].version == "vllm 0.32.0+cpu"


def test_the_smallest_card_is_what_shares_are_of(machine: Path) -> None:
    environment_at(machine / "engines" / "vllm", vllm="0.32.0")
    adapter = look(machine, 24, 16).adapters[Backend.VLLM]
    asked = LoadOptions(max_model_len=1, n_parallel=1, gpu_memory_utilization=0.5)
    assert adapter.cost(ModelFacts(1), "cuda").footprint(asked).device_bytes == gib(8)


def test_the_cards_it_was_given_are_named_to_both(machine: Path) -> None:
    environment_at(machine / "engines" / "vllm", vllm="0.32.0")
    found = look(machine, 24, 24, llamacpp_cards=2, names=("3", "GPU-ab"))
    env = dict(launch(found, Backend.VLLM, "cuda:1").env)
    assert env["CUDA_VISIBLE_DEVICES"] == "GPU-ab"
    spec = EngineSpec(ModelKey("/models/m", Backend.LLAMACPP, "cuda:1"), "/srv/m")
    plan = found.adapters[Backend.LLAMACPP].plan(
        spec, LoadOptions(n_gpu_layers=-1), placement=("cuda:1",)
    )
    assert '"CUDA_VISIBLE_DEVICES": "GPU-ab"' in plan.order


def test_a_spare_is_had_where_it_is_wanted_and_can_be(machine: Path) -> None:
    assert look(machine, spare=True).adapters[Backend.VLLM].spare() is None
    vllm = environment_at(machine / "engines" / "vllm", vllm_cpu="0.32.0", vllm="0.32.0+cpu")
    assert look(machine).adapters[Backend.VLLM].spare() is None
    spare = look(machine, spare=True).adapters[Backend.VLLM].spare()
    assert spare is not None
    assert spare.argv[0] == str(vllm.parent / "python3")


def test_a_script_of_ones_own_is_not_passed_over_for_a_spare(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = machine / "mine"
    machine.mkdir(parents=True, exist_ok=True)
    script.write_text(f"#!{sys.executable}\n")
    script.chmod(0o755)
    monkeypatch.setenv("VLLM_BIN", str(script))
    found = look(machine, spare=True)
    assert found.adapters[Backend.VLLM].spare() is None
    assert launch(found, Backend.VLLM).argv[0] == str(script)


def test_without_llamacpp(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "xllamacpp" else real(name)
    )
    found = look(machine)
    assert found.lacks[Backend.LLAMACPP] == Lack(
        "llama.cpp is not installed", "pip install 'xandrouting[llamacpp]'"
    )
    assert found.versions[Backend.LLAMACPP] == ""
    assert backends.engine_libraries() == []


def test_where_llamacpp_s_code_lies() -> None:
    libraries = backends.engine_libraries()
    assert libraries
    assert all(library.suffix == ".so" and library.is_file() for library in libraries)
