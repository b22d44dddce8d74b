"""Have the server download the starter model into a models directory without one, and end it.

For tests and benches; `make serve` gives `--starter` to the server that it runs.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> int:
    """Return 0 if the model is there; else the server has said on stderr why it is not."""
    models = Path(sys.argv[1])
    if _has_model(models):
        return 0
    with tempfile.TemporaryDirectory() as data:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "xandrouting", "serve", "--starter", "--port=0"),
                *(f"--models-dir={models}", f"--data-dir={data}", "--ollama-base-url=none"),
            ],
            stdout=subprocess.PIPE,
        )
        assert server.stdout is not None
        server.stdout.readline()  # it is ready when the download has ended
        server.terminate()
        server.communicate()
    return 0 if _has_model(models) else 1


def _has_model(models: Path) -> bool:
    return any(models.rglob("*.gguf"))


if __name__ == "__main__":
    sys.exit(main())
