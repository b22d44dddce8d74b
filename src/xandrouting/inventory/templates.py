"""What a chat template tells of what its model can do."""

from __future__ import annotations

import re
from typing import Final

_TOOLS: Final = re.compile(r"\btools\b")


def takes_tools(template: str) -> bool:
    """Whether a chat template says anything of the variable that holds a request's tools."""
    return _TOOLS.search(template) is not None
