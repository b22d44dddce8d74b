"""Sizes as people read them."""

from __future__ import annotations

import pytest

from xandrouting.core.sizes import in_words

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("size_bytes", "words"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (1023, "1023 bytes"),
        (KIB, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (MIB - KIB, "1023.0 KiB"),
        (MIB - 1, "1.0 MiB"),  # not 1024.0 KiB
        (9 * MIB + MIB // 2, "9.5 MiB"),
        (GIB - 1, "1.00 GiB"),
        (4 * GIB + GIB // 4, "4.25 GiB"),
        (5000 * GIB, "5000.00 GiB"),
    ],
)
def test_a_size_in_words(size_bytes: int, words: str) -> None:
    assert in_words(size_bytes) == words
