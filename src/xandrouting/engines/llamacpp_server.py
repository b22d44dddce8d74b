"""The llama.cpp engine's process: `python -m xandrouting.engines.llamacpp_server …`.

xllamacpp loads the model and starts llama.cpp's own HTTP server in one constructor, so this
is all there is to do. It prints one line when it listens; when the load fails, llama.cpp's
reason is on stderr and the exit status is 1. SIGTERM ends it at once, in a load as well:
the gateway has drained before it asks.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

import xllamacpp

from xandrouting.engines.llamacpp import KEY_VARIABLE, READY_LINE
from xandrouting.engines.llamacpp_memory import CHECKPOINTS, EMBEDDING_BATCH, PROMPT_BATCH

HTTP_THREADS = 32  # each open stream holds one; the gateway opens as many as it has clients
PING_S = 1  # llama.cpp looks for a client that left when it pings


def main(arguments: Sequence[str] | None = None) -> int:
    """Load the model, serve it until told to end; return the exit status."""
    options = _parse(arguments)
    if options.list_devices:
        for device in xllamacpp.get_device_info():
            print(f"device {device['name']}")  # noqa: T201
        return 0
    params = _params(options)
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        print(f"load failed: {error}", file=sys.stderr, flush=True)  # noqa: T201
        return 1
    # In one write and from the beginning of a line: llama.cpp's threads write theirs in pieces.
    os.write(1, f"\n{READY_LINE} {server.listening_address}\n".encode())
    while True:
        signal.pause()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="llamacpp_server", description=__doc__)
    parser.add_argument("--list-devices", action="store_true", help="print them and end")
    parser.add_argument("--model", help="the GGUF file, or its first part")
    parser.add_argument("--mmproj", help="the projector file of a vision model")
    parser.add_argument("--alias", help="the name the engine answers by")
    parser.add_argument("--port", type=int)
    parser.add_argument("--n-ctx-total", type=int, help="tokens, of all slots")
    parser.add_argument("--n-parallel", type=int, help="slots")
    parser.add_argument("--n-gpu-layers", type=int, help="-1: all")
    parser.add_argument("--cache-type-k", default="f16", help="what keys are stored as")
    parser.add_argument("--cache-type-v", default="f16", help="what values are stored as")
    parser.add_argument(
        "--embeddings", choices=("model", "mean"), help="answer /v1/embeddings too, pooled so"
    )
    return parser.parse_args(arguments)


def _params(options: argparse.Namespace) -> xllamacpp.CommonParams:
    params = xllamacpp.CommonParams()
    params.model.path = options.model
    if options.mmproj:
        params.mmproj.path = options.mmproj
    params.model_alias = {options.alias}
    params.hostnames = ["127.0.0.1"]
    params.port = options.port
    params.api_keys = [os.environ[KEY_VARIABLE]]
    params.n_ctx = options.n_ctx_total
    params.n_parallel = options.n_parallel
    params.n_gpu_layers = options.n_gpu_layers
    params.cache_type_k = _ggml_type(options.cache_type_k)
    params.cache_type_v = _ggml_type(options.cache_type_v)
    params.n_threads_http = HTTP_THREADS + options.n_parallel
    # Between two batches it looks for clients that left, and others decode.
    params.n_batch = PROMPT_BATCH
    params.fit_params = False  # the gateway plans; an engine that shrinks itself would belie it
    params.cache_ram_mib = 0  # memory that no plan knows of
    params.n_ctx_checkpoints = CHECKPOINTS
    params.sse_ping_interval = PING_S
    params.ui = False
    params.endpoint_slots = params.endpoint_metrics = params.endpoint_props = True
    if options.embeddings:
        params.embedding = True
        # An input is embedded in one batch or not at all.
        params.n_batch = params.n_ubatch = min(options.n_ctx_total, EMBEDDING_BATCH)
    if options.embeddings == "mean":
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    return params


def _ggml_type(name: str) -> xllamacpp.ggml_type:
    return getattr(xllamacpp.ggml_type, f"GGML_TYPE_{name.upper()}")


if __name__ == "__main__":
    sys.exit(main())
