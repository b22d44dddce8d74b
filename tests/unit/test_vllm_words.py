"""What vLLM's lines mean, by the lines of real starts."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from xandrouting.core.model import StartFailure
from xandrouting.engines.base import Phase
from xandrouting.engines.vllm_words import failure_of, phase_of, progress_of, reason_of


def read_logs() -> dict[str, list[str]]:
    """Read what vLLM 0.32 wrote in real starts on a CPU, by what was wrong.

    The model has 135M parameters. Frames of tracebacks and lines that say nothing are left
    out, the ends of long lines are cut, paths are shortened.
    """
    text = (Path(__file__).parents[1] / "fakes" / "vllm_logs.txt").read_text()
    logs = {}
    for section in text.removeprefix("== ").split("\n\n== "):
        name, *lines = section.splitlines()
        logs[name] = lines
    return logs


LOGS = read_logs()
HEALTHY = LOGS["healthy"]
ADVICE = "in its config.json lacks 'factor', which vLLM needs whatever max_model_len is"


@pytest.mark.parametrize(
    ("log", "failure", "reason"),
    [
        ("too long", StartFailure.BAD_OPTION, "context of 8192 tokens. Ask for at most that."),
        ("cut short", StartFailure.BAD_FILE, ""),
        ("tensors missing", StartFailure.BAD_FILE, ""),
        ("no tokenizer", StartFailure.BAD_FILE, ""),
        ("unknown type", StartFailure.UNKNOWN_ARCHITECTURE, ""),
        ("unknown architecture", StartFailure.UNKNOWN_ARCHITECTURE, ""),
        ("rope", StartFailure.BAD_OPTION, ADVICE),
        ("cache too small", StartFailure.OUT_OF_MEMORY, "max_model_len 640 would fit"),
        ("no memory", StartFailure.OUT_OF_MEMORY, ""),
        ("port", StartFailure.PORT_IN_USE, ""),
    ],
)
def test_why_a_real_start_failed(log: str, failure: StartFailure, reason: str) -> None:
    for lines in (LOGS[log], [*HEALTHY, *LOGS[log]]):
        assert failure_of(lines, 1) is failure
        assert reason in reason_of(lines)
        assert bool(reason_of(lines)) is bool(reason)
        assert "/srv" not in reason_of(lines)


def test_every_log_is_tested() -> None:
    assert len(LOGS) == 11


def test_a_healthy_start_says_nothing_of_a_failure() -> None:
    for end in range(len(HEALTHY) + 1):
        assert failure_of(HEALTHY[:end], 1) is StartFailure.EXITED
        assert failure_of(HEALTHY[:end], -signal.SIGKILL) is StartFailure.KILLED
        assert reason_of(HEALTHY[:end]) == ""


# What cannot be had here: lines of vLLM 0.32's source, as they would be written.
CORE = "(EngineCore pid=1) ERROR 11-25 19:18:10 [core.py:1510] "


@pytest.mark.parametrize(
    ("line", "failure", "reason"),
    [
        (
            (
                f"{CORE}ValueError: Free memory on device cuda:0 (3.1/22.0 GiB) on startup is "
                "less than desired GPU memory utilization (0.9, 19.8 GiB)."
            ),
            StartFailure.OUT_OF_MEMORY,
            "",
        ),
        (
            f"{CORE}torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
            StartFailure.OUT_OF_MEMORY,
            "",
        ),
        (
            (
                "  Value error, Total number of attention heads (9) must be divisible by tensor "
                "parallel size (2). [type=value_error, input_value=ArgsKwargs(())]"
            ),
            StartFailure.BAD_OPTION,
            "Its 9 attention heads cannot be shared by so many cards.",
        ),
        (
            "ModuleNotFoundError: No module named 'vllm._C'",
            StartFailure.MISSING_LIBRARY,
            "",
        ),
        (
            "importlib.metadata.PackageNotFoundError: No package metadata was found for vllm",
            StartFailure.MISSING_LIBRARY,
            "",
        ),
        (
            (
                "  Value error, Loading /srv/x requires you to execute the configuration file in "
                "that repo on your local machine. [type=value_error]"
            ),
            StartFailure.UNKNOWN_ARCHITECTURE,
            "It brings code of its own, which this server does not run.",
        ),
        (
            'AssertionError: assert "factor" in rope_scaling',
            StartFailure.BAD_OPTION,
            (
                "vLLM does not understand the rope_scaling in its config. Ask with "
                "max_model_len, such as 32000."
            ),
        ),
    ],
)
def test_what_else_it_would_say(line: str, failure: StartFailure, reason: str) -> None:
    assert failure_of([*HEALTHY, line], 1) is failure
    assert reason_of([*HEALTHY, line]) == reason


def test_the_config_it_prints_is_no_complaint() -> None:
    line = "(EngineCore pid=1) INFO [core.py:133] config: rope_scaling=None, out of memory='x'"
    assert failure_of([line], 1) is StartFailure.EXITED
    assert reason_of([line]) == ""


# How far it is.


def seen(end: str) -> list[str]:
    """Return the healthy start up to the first line that holds this."""
    last = next(number for number, line in enumerate(HEALTHY) if end in line)
    return HEALTHY[: last + 1]


@pytest.mark.parametrize(
    ("end", "phase", "progress"),
    [
        ("Resolved architecture", Phase.STARTING, None),
        ("Starting to load model", Phase.READING, None),
        ("Available RAM", Phase.READING, None),
        ("0% Completed | 0/1", Phase.READING, 0.0),
        ("100% Completed | 1/1", Phase.READING, 1.0),
        ("Loading weights took", Phase.WARMING, None),
        ("KV cache size", Phase.WARMING, None),
        ("Application startup complete", Phase.WARMING, None),
    ],
)
def test_how_far_a_real_start_is(end: str, phase: Phase, progress: float | None) -> None:
    assert phase_of(seen(end)) is phase
    assert progress_of(seen(end)) == progress


def test_progress_is_the_share_of_the_files() -> None:
    bar = "Loading safetensors checkpoint shards:  75% Completed | 3/4 [00:07<00:02,  2.5s/it]"
    assert progress_of(["Starting to load model x", bar]) == 0.75
    threaded = "Multi-thread loading shards: 25% Completed | 1/4 [00:01<00:03,  1.0s/it]"
    assert progress_of([bar, threaded]) == 0.75  # another loader's bar tells nothing
    assert progress_of([]) is None
    assert phase_of([]) is Phase.STARTING
