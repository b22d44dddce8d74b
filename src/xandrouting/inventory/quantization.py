"""How GGUF files name their quantization, and what their tensors really are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from xandrouting.core.quantization import quantization_in_name

# Number in the file: name, elements per block, bytes per block.
TENSOR_TYPES: Final[dict[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
RETIRED_TENSOR_TYPES: Final = frozenset({4, 5, 31, 32, 33, 36, 37, 38})
MAX_TENSOR_TYPE: Final = 255  # a type newer than the table is believed up to here
_BITS: Final = {name: 8 * size / block for name, block, size in TENSOR_TYPES.values()}
_UNQUANTIZED: Final = frozenset({"F32", "F16", "BF16"})

# `general.file_type`, which llama.cpp calls LLAMA_FTYPE.
FILE_TYPES: Final[dict[int, str]] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4_MOE",
    39: "NVFP4",
    40: "Q1_0",
}
# The tensor type that most of such a file is made of, where its name does not tell.
_MAIN_TYPES: Final = {
    "IQ2_S": "IQ2_XS",
    "IQ2_M": "IQ2_S",
    "IQ3_XS": "IQ3_S",
    "IQ3_M": "IQ3_S",
    "MXFP4_MOE": "MXFP4",
}

# A claim stands though a smaller type prevails: mixes take up to a tenth off their main type.
_SLACK: Final = 0.85


def quantization_of(
    type_bytes: Mapping[str, int], file_type: str | None, file_name: str
) -> str | None:
    """Return the usual name of what the tensors are: what is claimed where they bear it out.

    The header's claim goes before the file name's; without either, the type that takes the
    most bytes.
    """
    for claim in (file_type, quantization_in_name(file_name)):
        if claim is not None and _borne_out(claim, type_bytes):
            return claim
    return max(type_bytes, key=type_bytes.__getitem__, default=None)


def _borne_out(claim: str, type_bytes: Mapping[str, int]) -> bool:
    if not type_bytes:
        return True
    main = _main_type(claim)
    prevailing = max(type_bytes, key=type_bytes.__getitem__)
    if main == prevailing:
        return True
    # Rows that do not divide into blocks, and the embeddings of a small model, take a larger
    # type than the claimed one and may outweigh it. F32 and F16 are in every file.
    if main not in type_bytes or main in _UNQUANTIZED:
        return False
    return _BITS[prevailing] >= _BITS[main] * _SLACK


def _main_type(claim: str) -> str:
    name = claim.removeprefix("UD-")
    if name in _MAIN_TYPES:
        return _MAIN_TYPES[name]
    return re.sub(r"(?<=^Q\d_K)_.*", "", name)
