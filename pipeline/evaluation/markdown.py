"""The tables of an evaluation as Markdown."""

from collections.abc import Sequence

from pipeline.evaluation.means import Means
from pipeline.evaluation.tables import Table, result_tables


def render_markdown(means: Means) -> str:
    """Return all tables, each under its title, ready to be pasted into a page."""
    return "\n\n".join(render_table(table) for table in result_tables(means)) + "\n"


def render_table(table: Table) -> str:
    """Return one table under its title and note."""
    lines = [_row(table.head), "|---|" + "---:|" * (len(table.head) - 1)]
    lines += [_row(row) for row in table.rows]
    return "\n".join([f"### {table.title}", "", table.note, "", *lines])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_escaped(cell) for cell in cells)} |"


def _escaped(cell: str) -> str:
    """Return text that Markdown shows as it is and that ends no cell."""
    for mark in "\\|*<`":
        cell = cell.replace(mark, f"\\{mark}")
    return " ".join(cell.split())
