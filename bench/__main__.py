"""The command line of the bench."""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from bench import (
    decisions,
    download_ends,
    downloads,
    engine,
    estimates,
    inventory,
    machine,
    manners,
    memory,
    relay,
    simulate,
    switch,
    vllm,
)
from bench.processes import CORES, BenchError
from bench.stage import Effort
from bench.table import Row, as_markdown, as_text

MEASURES: Mapping[str, Callable[[Effort], list[Row]]] = {
    "request": relay.request,
    "throughput": relay.throughput,
    "first-token": relay.first_chunk,
    "paced": relay.paced,
    "chunks": relay.chunks,
    "leave": relay.leave,
    "rest": memory.rest,
    "idle": memory.idle,
    "stall": memory.stall,
    "cold-start": engine.cold_start,
    "looks": engine.looks,
    "engine-leave": engine.leave,
    "estimates": estimates.estimates,
    "switch": switch.switch,
    "parked": switch.parked,
    "wake": switch.wake,
    "read-ahead": switch.read_ahead,
    "hit": switch.hit,
    "vllm": vllm.speed,
    "vllm-start": vllm.start,
    "inventory": inventory.inventory,
    "download": downloads.download,
    "download-cancel": download_ends.cancel,
    "download-killed": download_ends.killed,
    "download-manners": manners.manners,
    "decisions": decisions.decisions,
    "simulate": simulate.simulate,
}


def main() -> None:
    options = _parse()
    # By the way of an exception, so that everything that was started is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    about = machine.describe()
    if len(CORES) == 1:
        about.append(("mind", "one core for everything: times and rates say little"))
    rows = []
    for name in options.only or MEASURES:
        began = time.monotonic()
        rows += measure(name, Effort(options.seconds, options.rounds))
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print("\n".join(f"{name}: {value}" for name, value in about))
    print(f"\n{as_text(rows)}")
    if options.markdown is not None:
        lines = "".join(f"- {name}: {value}\n" for name, value in about)
        options.markdown.write_text(f"{lines}\n{as_markdown(rows)}")


def measure(name: str, effort: Effort) -> list[Row]:
    """Take one measurement; one that fails costs its own rows and no other's."""
    try:
        return MEASURES[name](effort)
    except BenchError as error:
        return [Row(name, None, "", note=f"not measured: {error}")]
    except Exception as error:  # noqa: BLE001 - see above
        traceback.print_exc()
        return [Row(name, None, "", note=f"not measured: {error!r}")]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure the server.")
    parser.add_argument(
        "--only", nargs="+", choices=MEASURES, metavar="NAME", help=", ".join(MEASURES)
    )
    parser.add_argument("--seconds", type=float, default=1.5, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=5, help="of all contenders in turn")
    parser.add_argument("--markdown", type=Path, help="write the table to this file too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
