"""Model names in a path: they hold slashes, and most begin with one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote, unquote_to_bytes

from xandrouting.core.errors import GatewayError
from xandrouting.inventory.model_file import VIRTUAL_ROOT, ModelFile
from xandrouting.routing.names import ModelNames

MAX_PARTS: Final = 16  # of a path, in which a model's name is looked for
_DECODINGS: Final = 3  # whoever encodes more often hides something


@dataclass(frozen=True, slots=True)
class Split:
    """A path's model, its name as the client wrote it, and what follows; b"": nothing does."""

    file: ModelFile
    name: str
    rest: bytes


def named(text: str) -> str:
    """Return the name that `text` is as the end of a path, where a leading slash is lost."""
    return f"/{text}" if text.startswith(f"{VIRTUAL_ROOT[1:]}/") else text


def split(names: ModelNames, path: bytes) -> Split | None:
    """Return the longest name of a model that `path`, as sent, begins with; None: none does."""
    parts = path.split(b"/")
    for count in range(min(len(parts), MAX_PARTS), 0, -1):
        name = named("/".join(unquote(part.decode("latin-1")) for part in parts[:count]))
        if name.endswith("/") or name in ("", VIRTUAL_ROOT, VIRTUAL_ROOT[1:]):
            continue  # the root would stand for the only model in it
        try:
            file = names.resolve(name)
        except GatewayError:
            continue
        rest = parts[count:]
        return Split(file, name, b"/" + b"/".join(rest) if rest else b"")
    return None


def climbs(path: bytes) -> bool:
    """Whether a server could take `path`, as sent, for one that leads up or to itself."""
    for _ in range(_DECODINGS):
        decoded = unquote_to_bytes(path)
        if not {b".", b".."}.isdisjoint(re.split(rb"[/\\]", decoded)):
            return True
        if decoded == path:
            return False
        path = decoded
    return True
