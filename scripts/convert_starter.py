"""Make a safetensors folder of the starter model, for vLLM: `convert_starter.py GGUF FOLDER`.

Run it with the Python of vLLM's environment: torch and transformers are there. What they
need besides to read a GGUF goes into a folder that is thrown away, so that the environment
stays as it was installed. The folder appears whole or not at all.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

READERS = ("gguf==0.19.0", "accelerate==1.15.0")


def main() -> int:
    """Convert, unless the folder is there already."""
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    if target.exists():
        return 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as folder:
        readers, whole = Path(folder, "readers"), Path(folder, "model")
        if not install(readers):
            print("The packages that read a GGUF could not be fetched.", file=sys.stderr)
            return 1
        sys.path.append(str(readers))
        convert(source, whole)
        whole.rename(target)
    print(f"Starter model for vLLM: {target}", file=sys.stderr)
    return 0


def install(readers: Path) -> bool:
    """Let pip put the readers into a folder; what they depend on is in the environment."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    options = ["--no-deps", "--target", str(readers)]
    return subprocess.run([*pip, *options, *READERS], check=False).returncode == 0


def convert(source: Path, folder: Path) -> None:
    """Write the model as bf16 safetensors with its tokenizer and chat template."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    import torch  # takes seconds, and the readers must be on the path before
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read: dict[str, Any] = {"gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **read)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **read)
    tokenizer.model_max_length = model.config.max_position_embeddings
    rebuilt(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rebuilt(model: Any) -> Any:  # noqa: ANN401 - transformers' own types are not here
    """Return the model without what it remembers of its GGUF: it would refuse to be saved."""
    facts = model.config.to_dict()
    del facts["quantization_config"]
    clean = type(model)(type(model.config)(**facts))
    clean.load_state_dict(model.state_dict())
    clean.generation_config = model.generation_config
    return clean


if __name__ == "__main__":
    sys.exit(main())
