"""Write tiny folders of safetensors for tests, independently of the reader."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "vocab_size": 100,
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def weights_bytes(values: int = 64) -> bytes:
    """Return a file with one tensor of so many 16-bit values."""
    tensor = {"dtype": "BF16", "shape": [values], "data_offsets": [0, 2 * values]}
    header = json.dumps({"x": tensor}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(2 * values)


def write_folder(
    path: Path,
    config: Mapping[str, Any] | None = None,
    *,
    parts: int = 1,
    tokenizer: str | None = "tokenizer.json",
    **files: str | bytes,
) -> Path:
    """Write a model that an engine must accept; `config` is added to that of a small Llama.

    `files` are further ones by their names, with `__` for a dot.
    """
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    if parts == 1:
        (path / "model.safetensors").write_bytes(weights_bytes())
    else:
        names = [f"model-{no:05d}-of-{parts:05d}.safetensors" for no in range(1, parts + 1)]
        for name in names:
            (path / name).write_bytes(weights_bytes())
        index = {"weight_map": {f"x{no}": name for no, name in enumerate(names)}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    if tokenizer is not None:
        (path / tokenizer).write_text("{}")
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (path / name.replace("__", ".")).write_bytes(data)
    return path
