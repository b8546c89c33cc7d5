"""Markdown tables, and numbers in their cells."""

from collections.abc import Callable, Iterable, Sequence

NONE = "-"


def table(columns: Sequence[str], rows: Iterable[str], cell: Callable[[str, str], str]) -> str:
    """Return a table; rows of which nothing is known are left out."""
    lines = [f"| | {' | '.join(columns)} |", "|---" + "|--:" * len(columns) + "|"]
    for row in rows:
        cells = [cell(row, column) for column in columns]
        if any(content != NONE for content in cells):
            lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def milliseconds(seconds: float | None) -> str:
    """Return a duration in ms, or that there is none."""
    return NONE if seconds is None else f"{1000 * seconds:,.0f}"


def megabytes(num_bytes: float) -> str:
    """Return a size in MB."""
    return f"{num_bytes / 1e6:,.0f}"
