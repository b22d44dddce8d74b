"""What vLLM 0.32 says while it loads, and why it did not."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Sequence
from typing import Final

from xandrouting.core.model import StartFailure
from xandrouting.engines.base import Phase

_READING: Final = "Starting to load model"
_READ: Final = re.compile(r"Loading weights took|Model loading took")
_SHARDS: Final = re.compile(r"checkpoint shards:\s*\d+% Completed \| (?P<done>\d+)/(?P<all>\d+)")

_LENGTH: Final = re.compile(
    r"User-specified max_model_len \((?P<asked>\d+)\) is greater than the derived max_model_len "
    r"\((?:\w+=)?(?P<own>\d+)"
)
_ROPE: Final = re.compile(r"rope_scaling|rope_parameters")
_ROPE_KEYS: Final = re.compile(
    r"Missing required keys in `rope_parameters` for 'rope_type'='\w+': \{(?P<keys>[^}]*)\}"
)
_LONGEST: Final = re.compile(r"estimated maximum model length is (?P<tokens>\d+)")
_HEADS: Final = re.compile(
    r"attention heads \((?P<heads>\d+)\) must be divisible by tensor parallel size"
)
_REMOTE_CODE: Final = re.compile(r"trust_remote_code=True|execute the configuration file")
_COMPLAINT: Final = re.compile(r"error", re.IGNORECASE)  # its config is printed too, whole

# In this order: the first that is found is the cause of the others.
_FAILURES: Final[tuple[tuple[StartFailure, re.Pattern[str]], ...]] = (
    (
        StartFailure.MISSING_LIBRARY,
        re.compile(
            r"ModuleNotFoundError|No module named|torchvision::nms|No package metadata was found"
            r"|cannot open shared object|libcuda"
        ),
    ),
    (StartFailure.BAD_OPTION, _LENGTH),
    (StartFailure.BAD_OPTION, _HEADS),
    (
        StartFailure.UNKNOWN_ARCHITECTURE,
        re.compile(
            r"are not supported for now|does not recognize this architecture|has no vLLM "
            r"implementation|no module or parameter named|" + _REMOTE_CODE.pattern
        ),
    ),
    (
        StartFailure.BAD_FILE,
        re.compile(
            r"SafetensorError|deserializing header|InvalidHeader|Can't load the (?:configuration"
            r"|tokenizer)|Couldn't instantiate the backend tokenizer|Cannot find any model weights"
            r"|were not initialized from checkpoint|size mismatch|is not a valid JSON|data did not "
            r"match any variant|not a valid model"
        ),
    ),
    (
        StartFailure.OUT_OF_MEMORY,
        re.compile(
            r"is less than desired GPU memory utilization|is less than requested memory for kv"
            r"|out of memory|No available memory for the cache blocks|larger than the available KV "
            r"cache memory|Not enough (?:available )?memory|can't allocate memory|Cannot allocate "
            r"memory|MemoryError|bad_alloc"
        ),
    ),
    (StartFailure.PORT_IN_USE, re.compile(r"[Aa]ddress already in use")),
    (StartFailure.BAD_OPTION, re.compile(rf"(?:AssertionError|Error:).*(?:{_ROPE.pattern})")),
)


def phase_of(tail: Sequence[str]) -> Phase:
    """Tell what a loading engine is at."""
    for line in reversed(tail):
        if _READ.search(line):
            return Phase.WARMING
        if _READING in line or _SHARDS.search(line):
            return Phase.READING
    return Phase.STARTING


def progress_of(tail: Sequence[str]) -> float | None:
    """Return the share of the files it has read; None before the first and once it has all."""
    for line in reversed(tail):
        if _READ.search(line):
            return None
        shards = _SHARDS.search(line)
        if shards is not None:
            return int(shards["done"]) / max(1, int(shards["all"]))
    return None


def _complaints(tail: Iterable[str]) -> str:
    return "\n".join(line for line in tail if _COMPLAINT.search(line))


def failure_of(tail: Iterable[str], status: int | None) -> StartFailure:
    """Tell why a start failed."""
    text = _complaints(tail)
    for failure, pattern in _FAILURES:
        if pattern.search(text):
            return failure
    return StartFailure.KILLED if status == -signal.SIGKILL else StartFailure.EXITED


def reason_of(tail: Iterable[str]) -> str:
    """Return why a start failed in words for a client; empty where there are none to show."""
    text = _complaints(tail)
    length = _LENGTH.search(text)
    if length is not None:
        return (
            f"vLLM says that max_model_len {length['asked']} is more than the model's own "
            f"context of {length['own']} tokens. Ask for at most that."
        )
    heads = _HEADS.search(text)
    if heads is not None:
        return f"Its {heads['heads']} attention heads cannot be shared by so many cards."
    longest = _LONGEST.search(text)
    if longest is not None:
        return f"vLLM says that max_model_len {longest['tokens']} would fit."
    if _REMOTE_CODE.search(text):
        return "It brings code of its own, which this server does not run."
    keys = _ROPE_KEYS.search(text)
    if keys is not None:
        return (
            f"The rope_scaling in its config.json lacks {keys['keys']}, which vLLM needs whatever "
            "max_model_len is: add it there."
        )
    if _ROPE.search(text):
        return (
            "vLLM does not understand the rope_scaling in its config. Ask with max_model_len, "
            "such as 32000."
        )
    return ""
