"""This machine's vLLM, and the starter model as a folder of safetensors for it."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

from tests.server import ROOT, starter
from xandrouting.provision.vllm import FOLDER, Missing, VllmInstall, find_vllm

STARTER = ROOT / ".cache" / "vllm-models" / "smollm2-135m-instruct"


@functools.cache
def vllm() -> VllmInstall:
    """Return the vLLM of this machine; skip the test where there is none, fail it in CI."""
    found = find_vllm(os.environ, beside=[ROOT / FOLDER])
    if isinstance(found, Missing):
        absent(f"{found.reason}: `make vllm` did not run, or said why it could not")
    return found


def vllm_model() -> Path:
    """Return the starter model's safetensors folder; it is converted once, in half a minute."""
    python = vllm().python
    if not STARTER.exists():
        assert python is not None, "VLLM_BIN is a script of its own: run `make test` without it"
        argv = [python, ROOT / "scripts" / "convert_starter.py", starter(), STARTER]
        if subprocess.run(argv, check=False, timeout=100).returncode != 0:
            absent("the starter model could not be converted")
    return STARTER


def absent(reason: str) -> NoReturn:
    """Skip the test; in CI, where everything must be there, fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
