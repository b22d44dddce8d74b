"""The llama.cpp engine's process: `python -m xandrouting.engines.llamacpp_server`.

It imports the library, says that it waits, and reads one order from stdin: a line of JSON with
all that the model is served with (`llamacpp.Order`). xllamacpp then loads the model and starts
llama.cpp's own HTTP server in one constructor. It prints one line when it listens; when the
load fails, llama.cpp's reason is on stderr and the exit status is 1. SIGTERM ends it at once,
in a load as well: the gateway has drained before it asks.

Told to rest, it starts its own program over: the system takes back all that llama.cpp had, to
the last page, and what waits for the next order is as fresh as any.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import xllamacpp

from xandrouting.engines.llamacpp import (
    KEY_VARIABLE,
    LIST_DEVICES,
    READY_LINE,
    REST_ORDER,
    RUNNER,
    WAITING_LINE,
    Order,
)
from xandrouting.engines.llamacpp_memory import CHECKPOINTS, EMBEDDING_BATCH, PROMPT_BATCH

HTTP_THREADS: Final = 32  # each open stream holds one; the gateway opens as many as it has clients
PING_S: Final = 1  # llama.cpp looks for a client that left when it pings
ORDERS: Final = 0  # stdin
# How much of a prompt a slot must hold already to be taken for it, and not the one that rested
# longest. At llama.cpp's own 0.1 clients that share a system prompt share one slot for ever, and
# each throws away the other's conversation.
SAME_CONVERSATION: Final = 0.5


def main(arguments: Sequence[str]) -> int:
    """Serve as ordered until told to end; return the exit status."""
    if arguments[-1:] == LIST_DEVICES[-1:]:
        for device in xllamacpp.get_device_info():
            print(f"device {device['name']}")  # noqa: T201
        return 0
    os.umask(0o077)  # what it saves of conversations is nobody else's to read
    _say(WAITING_LINE)
    orders = os.fdopen(ORDERS, "rb", closefd=False)
    line = orders.readline()
    if not line:
        return 0  # the gateway has gone
    order = Order.parse(line)
    os.environ.update(order.env or {})
    try:
        server = xllamacpp.Server(_params(order))
    except RuntimeError as error:
        print(f"load failed: {error}", file=sys.stderr, flush=True)  # noqa: T201
        return 1
    _say(f"{READY_LINE} {server.listening_address}")
    if orders.readline().decode().rstrip() == REST_ORDER:
        _start_over()
    os._exit(0)  # the gateway has gone: nobody waits for threads to end in good order


def _say(line: str) -> None:
    # In one write and from the beginning of a line: llama.cpp's threads write theirs in pieces.
    os.write(1, f"\n{line}\n".encode())


def _start_over() -> None:
    """Replace this program with itself. Never returns; its threads and its files end with it."""
    for path in list(Path("/dev/fd").iterdir()):
        if int(path.name) > sys.stderr.fileno() and path.exists():  # not the listing's own
            os.set_inheritable(int(path.name), False)
    os.execv(RUNNER[0], RUNNER)  # noqa: S606


def _params(order: Order) -> xllamacpp.CommonParams:
    params = xllamacpp.CommonParams()
    params.model.path = order.model
    if order.mmproj:
        params.mmproj.path = order.mmproj
    params.model_alias = {order.alias}
    params.hostnames = ["127.0.0.1"]
    params.port = int(order.port)
    params.api_keys = [os.environ[KEY_VARIABLE]]
    params.n_ctx = order.n_ctx_total
    params.n_parallel = order.n_parallel
    params.n_gpu_layers = order.n_gpu_layers
    params.cache_type_k = _ggml_type(order.cache_type_k)
    params.cache_type_v = _ggml_type(order.cache_type_v)
    params.n_threads_http = HTTP_THREADS + order.n_parallel
    # Between two batches it looks for clients that left, and others decode.
    params.n_batch = PROMPT_BATCH
    params.warmup = order.warmup
    params.slot_prompt_similarity = SAME_CONVERSATION
    params.fit_params = False  # the gateway plans; an engine that shrinks itself would belie it
    params.cache_ram_mib = 0  # memory that no plan knows of
    params.n_ctx_checkpoints = CHECKPOINTS
    params.sse_ping_interval = PING_S
    params.ui = False
    params.endpoint_slots = params.endpoint_metrics = params.endpoint_props = True
    if order.slot_folder:
        params.slot_save_path = order.slot_folder
    if order.embeddings:
        params.embedding = True
        # An input is embedded in one batch or not at all.
        params.n_batch = params.n_ubatch = min(order.n_ctx_total, EMBEDDING_BATCH)
    if order.embeddings == "mean":
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    return params


def _ggml_type(name: str) -> xllamacpp.ggml_type:
    return getattr(xllamacpp.ggml_type, f"GGML_TYPE_{name.upper()}")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
