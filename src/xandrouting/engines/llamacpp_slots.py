"""llama.cpp's slots: how their conversations are written to files and read back.

It reads a file back as it is: one that is cut short aborts it, one with a bit turned is taken
for the conversation. Whoever restores has to know that the file is whole.
"""

from __future__ import annotations

import json
from typing import Final

from xandrouting.engines.base import SlotState


class LlamaSlots:
    """The calls; file names are relative to the folder the engine was given."""

    list_path: Final = b"/slots"

    def states(self, answer: bytes) -> list[SlotState]:
        """Read what `list_path` answers: `n_prompt_tokens` is all that a slot holds.

        One that was read back and not used since says nothing of it.
        """
        return [
            SlotState(slot["id"], tokens=slot.get("n_prompt_tokens", 0), busy=slot["is_processing"])
            for slot in json.loads(answer)
        ]

    def save(self, slot: int, name: str) -> tuple[bytes, bytes]:
        """Return path and body of the POST that writes a slot to a file."""
        return _action(slot, b"save", name)

    def restore(self, slot: int, name: str) -> tuple[bytes, bytes]:
        """Return path and body of the POST that reads a file into a slot."""
        return _action(slot, b"restore", name)

    def saved_bytes(self, answer: bytes) -> int:
        """Return how large the file became, from the answer of `save`."""
        size: int = json.loads(answer)["n_written"]
        return size

    def restored_tokens(self, answer: bytes) -> int:
        """Return how many tokens were read, from the answer of `restore`."""
        tokens: int = json.loads(answer)["n_restored"]
        return tokens


def _action(slot: int, action: bytes, name: str) -> tuple[bytes, bytes]:
    return b"/slots/%d?action=%b" % (slot, action), json.dumps({"filename": name}).encode()
