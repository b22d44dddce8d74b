"""What the calls of llama-server's router take."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct


class RouterRequest(Struct):
    """A model to load, to unload or to download."""

    model: Annotated[str, Meta(min_length=1)]
