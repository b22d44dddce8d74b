"""The table: one row per figure, with its target and whether it is met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HEADINGS = ("what", "gateway", "direct", "nginx", "figure", "target", "met")


@dataclass(frozen=True)
class Row:
    """One line. `limit` None: the figure has no target."""

    what: str
    value: float | None  # what the target is about; None: it could not be taken
    unit: str
    limit: float | None = None
    at_least: bool = False  # the limit is a lower one
    gateway: str = ""
    direct: str = ""
    nginx: str = ""
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.value is None or self.limit is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def cells(self) -> tuple[str, ...]:
        target = f"{'≥' if self.at_least else '≤'} {show(self.limit, self.unit)}"
        return (
            self.what,
            self.gateway,
            self.direct,
            self.nginx,
            show(self.value, self.unit),
            target if self.limit is not None else "-",
            {True: "yes", False: "NO", None: "-"}[self.met],
        )


def show(value: float | None, unit: str) -> str:
    """Return a figure with three digits that count."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f} {unit}"
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f} {unit}"


def as_markdown(rows: Sequence[Row]) -> str:
    lines = [HEADINGS, ("---",) * len(HEADINGS), *(row.cells() for row in rows)]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    notes = "\n".join(f"- {row.what}: {row.note}" for row in rows if row.note)
    return f"{table}\n\n{notes}\n" if notes else f"{table}\n"


def as_text(rows: Sequence[Row]) -> str:
    lines = [HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(cells[column]) for cells in lines) for column in range(len(HEADINGS))]
    table = "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in lines
    )
    notes = "\n".join(f"  {row.what}: {row.note}" for row in rows if row.note)
    return f"{table}\n\n{notes}" if notes else table
