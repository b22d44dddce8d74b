"""A vLLM that waits: everything is imported, and it serves once it is told what.

Run by the Python of vLLM's own environment. One line of stdin is its order: `argv`, that of
`vllm`, and `env`, what is to be in the environment before anything looks at a device.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Import, wait, serve. Without an order, as when nobody is left to give one, end."""
    from vllm.entrypoints.cli import serve as _  # noqa: F401 - takes seconds to import
    from vllm.entrypoints.cli.main import main as serve

    line = sys.stdin.readline()
    if line:
        order = json.loads(line)
        os.environ.update(order["env"])
        sys.argv = order["argv"]
        serve()


if __name__ == "__main__":  # its workers import this file too
    main()
