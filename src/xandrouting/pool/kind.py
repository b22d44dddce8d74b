"""How engines of one backend are made."""

from __future__ import annotations

from dataclasses import dataclass

from xandrouting.engines.base import EngineAdapter
from xandrouting.launch.base import Launcher


@dataclass(frozen=True, slots=True)
class Kind:
    """Who plans the engines of one backend and who runs them."""

    adapter: EngineAdapter
    launcher: Launcher
