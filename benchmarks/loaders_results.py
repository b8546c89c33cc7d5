"""What `loaders.py` measured, figure by figure."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

COLUMNS: Mapping[str, tuple[str, int]] = {
    "in order": ("sequential", 0),
    "in order, 2 workers": ("sequential", 2),
    "shuffled": ("shuffled", 0),
    "shuffled, 2 workers": ("shuffled", 2),
    "by key": ("by_key", 0),
}
"""Measure and workers, by what the page calls them."""
_QUARTER = 0.25


class Results:
    """The results of one corpus on one store."""

    def __init__(self, results: Iterable[Mapping[str, Any]], corpus: str, store: str) -> None:
        self.all = [r for r in results if r.get("corpus") == corpus and r.get("store") == store]

    def found(self, loader: str, measure: str, num_workers: int) -> list[Mapping[str, Any]]:
        """Return the results of all rounds."""
        return [
            r["result"]
            for r in self.all
            if (r["loader"], r["measure"], r["num_workers"]) == (loader, measure, num_workers)
            and "result" in r
        ]

    def median(self, loader: str, measure: str, num_workers: int, name: str) -> float | None:
        """Return the median of a figure over the rounds; None where there is none."""
        values = [r[name] for r in self.found(loader, measure, num_workers)]
        return statistics.median(values) if values and None not in values else None

    @property
    def bytes_per_row(self) -> float:
        """The payload of a row, without its key."""
        return float(next(r["result"]["bytes_per_row"] for r in self._rates()))

    def read_rows_s(self, name: str) -> float | None:
        """Return what reading the bytes alone would give."""
        reads = self.found("read()", "read", 0)
        if not reads or name not in reads[0]:
            return None
        return statistics.median(r[name] for r in reads) / self.bytes_per_row

    def best_other(
        self, loaders: Iterable[str], ours: str, column: str, name: str, *, lowest: bool = False
    ) -> tuple[str, float] | None:
        """Return which other loader is best at something, and how good."""
        found = {
            kind: value
            for kind in loaders
            if kind != ours and (value := self.median(kind, *COLUMNS[column], name))
        }
        best = min if lowest else max
        return best(found.items(), key=lambda item: item[1]) if found else None

    def memory(self, loader: str, num_workers: int) -> tuple[float, float, float] | None:
        """Return bytes of their own to a quarter and to the end of what was read, and mapped ones.

        Each is what came on top of the imports.
        """
        each = self.found(loader, "memory", num_workers)
        if not each or not each[0].get("readings"):
            return None
        readings, before, rows = each[0]["readings"], each[0]["before"], each[0]["rows"]
        first = [r[1] for r in readings if r[0] <= _QUARTER * rows]
        return (
            max(first) - before["own_bytes"] if first else float("nan"),
            max(r[1] for r in readings if r[0] <= rows) - before["own_bytes"],
            max(r[2] for r in readings) - before["mapped_bytes"],
        )

    @property
    def num_rounds(self) -> int:
        """How often the rates were measured."""
        return max(r["repeat"] for r in self._rates()) + 1

    def spreads(self) -> list[float]:
        """Return how far the rounds of each figure lie apart, relative to their median."""
        groups: dict[tuple[Any, ...], list[float]] = {}
        for r in self._rates():
            key = (r["loader"], r["measure"], r["num_workers"])
            groups.setdefault(key, []).append(r["result"]["rows_s"] or 0.0)
        return [(max(g) - min(g)) / (statistics.median(g) or 1.0) for g in groups.values()]

    def _rates(self) -> list[Mapping[str, Any]]:
        measures = {measure for measure, _ in COLUMNS.values()}
        return [r for r in self.all if r["measure"] in measures and "result" in r]
