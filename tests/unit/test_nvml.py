"""The cards' memory, through every way in which NVML may fail."""

from __future__ import annotations

import inspect
import logging

import pynvml
import pytest

from tests.fakes.nvml import GIB, FakeCard, FakeNvml
from xandrouting.core.model import DeviceReading
from xandrouting.launch.nvml import GpuReading, NoGpus, Nvml, open_gpus, visible_cards

LOST = pynvml.NVMLError_GpuIsLost
FREE = DeviceReading("cuda:0", "NVIDIA L4", 23 * GIB, 20 * GIB)
STALE = DeviceReading("cuda:0", "NVIDIA L4", 23 * GIB, 20 * GIB, stale=True)


def opened(*cards: FakeCard) -> tuple[FakeNvml, Nvml]:
    library = FakeNvml(*cards)
    gpus = open_gpus(library)
    assert isinstance(gpus, Nvml)
    return library, gpus


def names(reading: GpuReading) -> list[tuple[str, bool]]:
    return [(device.device, device.stale) for device in reading.devices]


def test_the_fake_has_the_real_librarys_signatures() -> None:
    fakes = {name: f for name, f in vars(FakeNvml).items() if name.startswith("nvml")}
    assert fakes
    for name, fake in fakes.items():
        real = inspect.signature(getattr(pynvml, name)).parameters
        assert list(inspect.signature(fake).parameters)[1:] == list(real), name


def test_a_machine_without_the_library_has_no_cards() -> None:
    library = FakeNvml()
    library.errors["nvmlInit"] = pynvml.NVMLError_LibraryNotFound
    gpus = open_gpus(library)
    assert isinstance(gpus, NoGpus)
    assert gpus.read() == GpuReading()


def test_a_machine_without_a_driver_has_no_cards() -> None:
    library = FakeNvml(FakeCard())
    library.errors["nvmlInit"] = pynvml.NVMLError_DriverNotLoaded
    assert isinstance(open_gpus(library), NoGpus)


def test_a_driver_without_cards_tells_of_none() -> None:
    _, gpus = opened()
    assert gpus.read() == GpuReading()


def test_a_driver_that_does_not_work_yet_is_asked_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    library = FakeNvml(FakeCard())
    library.errors["nvmlInit"] = pynvml.NVMLError_LibRmVersionMismatch
    gpus = open_gpus(library)
    assert [gpus.read() for _ in range(3)] == [GpuReading()] * 3
    assert caplog.text.count("gpu memory cannot be read") == 1
    library.errors.clear()
    assert gpus.read().devices == (FREE,)


def test_what_the_driver_keeps_for_itself_is_not_capacity() -> None:
    _, gpus = opened(FakeCard(total=24 * GIB, reserved=GIB, free=20 * GIB))
    assert gpus.read().devices == (FREE,)


@pytest.mark.parametrize(
    "error", [pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_NotSupported]
)
def test_an_old_driver_does_not_tell_what_it_keeps(error: type[Exception]) -> None:
    library, gpus = opened(FakeCard())
    library.errors["nvmlDeviceGetMemoryInfo_v2"] = error
    assert gpus.read().devices[0].capacity_bytes == 24 * GIB
    assert gpus.read().devices[0].available_bytes == 20 * GIB


def test_nvml_starts_once() -> None:
    library, gpus = opened(FakeCard())
    for _ in range(3):
        gpus.read()
    assert library.calls["nvmlInit"] == 1
    assert library.calls["nvmlShutdown"] == 0


def test_each_read_is_new() -> None:
    library, gpus = opened(FakeCard(computing=[(7, GIB)]))
    assert gpus.read() == GpuReading((FREE,), {7: (("cuda:0", GIB),)})
    library.cards[0].free = 22 * GIB
    library.cards[0].computing = []
    assert gpus.read().devices[0].available_bytes == 22 * GIB
    assert gpus.read().processes == {}


def test_a_process_may_be_on_several_cards() -> None:
    _, gpus = opened(
        FakeCard(computing=[(7, 3), (8, 5)]),
        FakeCard(computing=[(7, 4)], name="NVIDIA A2"),
    )
    reading = gpus.read()
    assert [device.name for device in reading.devices] == ["NVIDIA L4", "NVIDIA A2"]
    assert reading.processes == {7: (("cuda:0", 3), ("cuda:1", 4)), 8: (("cuda:0", 5),)}


def test_a_process_that_computes_and_draws_counts_once() -> None:
    _, gpus = opened(FakeCard(computing=[(7, 5)], drawing=[(7, 5), (9, 2)]))
    assert gpus.read().processes == {7: (("cuda:0", 5),), 9: (("cuda:0", 2),)}


def test_a_process_of_unknown_size_is_not_listed() -> None:
    _, gpus = opened(FakeCard(computing=[(7, None), (8, 5)]))
    assert gpus.read().processes == {8: (("cuda:0", 5),)}


@pytest.mark.parametrize(
    "error",
    [
        pynvml.NVMLError_NotSupported,
        pynvml.NVMLError_NoPermission,
        pynvml.NVMLLibraryMismatchError,
    ],
)
def test_a_driver_that_lists_no_processes_is_no_failure(
    error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    library, gpus = opened(FakeCard(computing=[(7, 5)], drawing=[(9, 2)]))
    library.errors["nvmlDeviceGetComputeRunningProcesses"] = error
    assert gpus.read() == GpuReading((FREE,), {9: (("cuda:0", 2),)})
    assert not caplog.records


def test_a_lost_card_keeps_its_last_figures_and_the_others_go_on() -> None:
    library, gpus = opened(FakeCard(computing=[(7, 5)]), FakeCard())
    gpus.read()
    library.cards[0].errors["nvmlDeviceGetMemoryInfo_v2"] = LOST
    library.cards[1].free = 1 * GIB
    reading = gpus.read()
    assert reading.devices[0] == STALE
    assert reading.devices[1].available_bytes == 1 * GIB
    assert reading.processes == {7: (("cuda:0", 5),)}
    assert names(gpus.read()) == [("cuda:0", True), ("cuda:1", False)]


def test_a_name_stays_with_its_card_when_another_is_gone() -> None:
    library, gpus = opened(FakeCard(name="first"), FakeCard(name="second"))
    gpus.read()
    del library.cards[0]  # NVML's numbers move up
    for _ in range(2):
        reading = gpus.read()
        assert names(reading) == [("cuda:0", True), ("cuda:1", False)]
        assert [device.name for device in reading.devices] == ["first", "second"]


@pytest.mark.parametrize("function", ["nvmlDeviceGetName", "nvmlDeviceGetMigMode"])
@pytest.mark.parametrize("error", [LOST, pynvml.NVMLError_Unknown, pynvml.NVMLError_Timeout])
def test_any_failure_of_a_card_makes_it_stale(function: str, error: type[Exception]) -> None:
    library, gpus = opened(FakeCard())
    gpus.read()
    library.errors[function] = error
    assert gpus.read().devices == (STALE,)


def test_nvml_is_started_anew_after_a_failure() -> None:
    library, gpus = opened(FakeCard())
    gpus.read()
    library.errors["nvmlDeviceGetMemoryInfo_v2"] = pynvml.NVMLError_Unknown
    gpus.read()
    assert library.calls["nvmlShutdown"] == 1
    library.errors.clear()
    assert gpus.read().devices == (FREE,)
    assert library.calls["nvmlInit"] == 2


def test_a_driver_that_goes_and_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    library, gpus = opened(FakeCard())
    gpus.read()
    library.errors = {
        "nvmlInit": pynvml.NVMLError_DriverNotLoaded,
        "nvmlDeviceGetHandleByPciBusId": pynvml.NVMLError_Uninitialized,
        "nvmlShutdown": pynvml.NVMLError_Uninitialized,
    }
    assert [gpus.read().devices for _ in range(3)] == [(STALE,)] * 3
    library.errors.clear()
    assert [gpus.read().devices for _ in range(2)] == [(FREE,)] * 2
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "gpu memory cannot be read error=Uninitialized"),
        ("INFO", "gpu memory can be read again"),
    ]


def test_a_card_that_was_never_read_is_not_told_of() -> None:
    library = FakeNvml(FakeCard(), FakeCard())
    library.cards[0].errors["nvmlDeviceGetMemoryInfo_v2"] = LOST
    assert names(open_gpus(library).read()) == [("cuda:1", False)]


def test_a_card_of_another_container_has_no_number() -> None:
    library = FakeNvml(FakeCard(), FakeCard(name="ours"))
    library.cards[0].errors["nvmlDeviceGetHandleByIndex"] = pynvml.NVMLError_NoPermission
    (device,) = open_gpus(library).read().devices
    assert (device.device, device.name) == ("cuda:0", "ours")


def test_a_card_that_shares_the_processors_memory_is_not_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    library, gpus = opened(FakeCard())
    for function in ("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMemoryInfo_v2"):
        library.errors[function] = pynvml.NVMLError_NotSupported
    assert gpus.read() == GpuReading()
    library.errors = {"nvmlDeviceGetPciInfo": pynvml.NVMLError_NotSupported}
    assert open_gpus(library).read() == GpuReading()
    assert not caplog.records


def test_a_divided_card_is_its_first_instance() -> None:
    instance = FakeCard("NVIDIA A100 MIG 1g.5gb", 5 * GIB, 4 * GIB, 0, computing=[(7, GIB)])
    other = FakeCard("another", GIB, GIB)
    card = FakeCard("NVIDIA A100", 40 * GIB, instances=[None, instance, other])
    library, gpus = opened(card, FakeCard())
    library.cards[0].errors["nvmlDeviceGetMemoryInfo_v2"] = pynvml.NVMLError_NoPermission
    reading = gpus.read()
    assert reading.devices[0] == DeviceReading("cuda:0", instance.name, 5 * GIB, 4 * GIB)
    assert reading.processes == {7: (("cuda:0", GIB),)}
    assert names(reading) == [("cuda:0", False), ("cuda:1", False)]


def test_a_card_that_loses_its_instances_is_not_told_of(caplog: pytest.LogCaptureFixture) -> None:
    card = FakeCard(instances=[FakeCard("one")])
    _, gpus = opened(card)
    assert names(gpus.read()) == [("cuda:0", False)]
    card.instances = []
    assert gpus.read() == GpuReading()
    assert not caplog.records


@pytest.mark.parametrize(
    "error", [pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_NotSupported]
)
def test_most_cards_cannot_be_divided(error: type[Exception]) -> None:
    library, gpus = opened(FakeCard())
    library.errors["nvmlDeviceGetMigMode"] = error
    assert gpus.read().devices == (FREE,)


# The cards this process was given.

UUID_A, UUID_B = "GPU-aa0c0ffee-1", "GPU-ab0c0ffee-2"


def given(*visible: str, cards: int = 3) -> list[str]:
    """Return the cards told of, by their makers' names, where CUDA_VISIBLE_DEVICES is this."""
    library = FakeNvml(*(FakeCard(name=f"card {number}") for number in range(cards)))
    library.cards[0].uuid, library.cards[1].uuid = UUID_A, UUID_B
    reading = open_gpus(library, visible=visible).read()
    assert [device.device for device in reading.devices] == [
        f"cuda:{number}" for number in range(len(reading.devices))
    ]
    return [device.name for device in reading.devices]


@pytest.mark.parametrize(
    ("visible", "told"),
    [
        (["1"], ["card 1"]),
        (["2", "0"], ["card 2", "card 0"]),  # in the order they are named
        ([UUID_B], ["card 1"]),
        (["GPU-ab"], ["card 1"]),  # as much of it as tells it from the others
        (["GPU-ab", "2"], ["card 1", "card 2"]),
        (["GPU-a"], []),  # two begin so
        (["GPU-ff"], []),
        (["1", "7", "0"], ["card 1"]),  # CUDA stops at the first that is none
        (["-1", "0"], []),
        (["NoDevFiles"], []),
        ([], []),
    ],
)
def test_only_the_cards_it_was_given_are_told_of(visible: list[str], told: list[str]) -> None:
    assert given(*visible) == told


def test_not_restricted_all_cards_are_told_of() -> None:
    library = FakeNvml(FakeCard(), FakeCard())
    assert names(open_gpus(library, visible=None).read()) == [("cuda:0", False), ("cuda:1", False)]


@pytest.mark.parametrize(
    ("environment", "visible"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": ""}, ()),
        ({"CUDA_VISIBLE_DEVICES": "1, 0"}, ("1", "0")),
        ({"CUDA_VISIBLE_DEVICES": "GPU-ab,"}, ("GPU-ab",)),
    ],
)
def test_which_cards_the_environment_gives(
    environment: dict[str, str], visible: tuple[str, ...] | None
) -> None:
    assert visible_cards(environment) == visible
