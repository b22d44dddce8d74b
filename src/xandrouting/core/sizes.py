"""Sizes as people read them."""

from __future__ import annotations


def in_words(size_bytes: int) -> str:
    """Return a size in the unit in which it is 1 or more: `4.25 GiB`, `9.5 MiB`, `12 bytes`."""
    if size_bytes < 1024:
        return "1 byte" if size_bytes == 1 else f"{size_bytes} bytes"
    for unit, divisor in (("KiB", 1 << 10), ("MiB", 1 << 20)):
        value = round(size_bytes / divisor, 1)
        if value < 1024:
            return f"{value:.1f} {unit}"
    return f"{size_bytes / 2**30:.2f} GiB"
