"""The quantization that the name of a file ends with."""

from __future__ import annotations

import re
from typing import Final

_QUANTIZATION: Final = re.compile(
    r"(?<![^-._/])(?:UD-)?(?:I?Q\d+_(?:K(?:_(?:XXS|XS|S|M|L|XL))?|XXS|XS|S|M|L|XL|NL|[01])"
    r"|TQ[12]_0|MXFP4(?:_MOE)?|NVFP4|BF16|FP?(?:16|32))(?![^-._/])",
    re.IGNORECASE,
)


def quantization_in_name(name: str) -> str | None:
    """Return the quantization a file's name ends up with, `UD-Q4_K_XL`, or None."""
    found = _QUANTIZATION.findall(name)
    return normalized(found[-1]) if found else None


def normalized(quantization: str) -> str:
    """Return a quantization's name in its usual spelling."""
    return quantization.upper().replace("FP16", "F16").replace("FP32", "F32")


def without_quantization(stem: str) -> str:
    """Return `stem` without the quantization at its end; a stem that is nothing else stays."""
    for match in _QUANTIZATION.finditer(stem):
        if match.end() == len(stem):
            return stem[: match.start()].rstrip("-._") or stem
    return stem
