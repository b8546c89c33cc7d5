"""What the loader was to reach, and whether it did."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.loaders_results import COLUMNS, Results
from benchmarks.loaders_tables import NONE, megabytes, milliseconds, table

_TIMES_OF_BEST = {column: 3.0 if column == "by key" else 2.0 for column in COLUMNS}
_OF_READ = 0.8
_GROWTH = 1.1  # of memory that counts as flat
_FIRST_BATCHES = ("in order", "shuffled", "by key")


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Compares one loader with the others.

    Attributes:
        loaders: all that were measured.
        ours: the one that has targets.
    """

    loaders: Sequence[str]
    ours: str

    def table(self, sections: Mapping[str, Results]) -> str:
        """Return each target with what was reached, by section."""
        reached = {title: self._reached(found, "S3" in title) for title, found in sections.items()}
        names = dict.fromkeys(name for cells in reached.values() for name in cells)
        return table(list(sections), names, lambda name, title: reached[title].get(name, NONE))

    def _reached(self, found: Results, is_s3: bool) -> dict[str, str]:
        cells = {}
        for column, times in _TIMES_OF_BEST.items():
            mine = found.median(self.ours, *COLUMNS[column], "rows_s")
            best = found.best_other(self.loaders, self.ours, column, "rows_s")
            if mine and best:
                cells[f"{column}: {times:.0f} x the best other"] = _told(
                    f"{mine / best[1]:.2f} x {best[0]}", mine >= times * best[1]
                )
        mine, bound = (
            found.median(self.ours, *COLUMNS["in order"], "rows_s"),
            found.read_rows_s("bytes_s"),
        )
        if mine and bound:
            cells[f"in order: {_OF_READ:.0%} of read()"] = _told(
                f"{mine / bound:.0%}", mine >= _OF_READ * bound
            )
        if is_s3:
            cells |= self._first_batches(found)
        memory = found.memory(self.ours, 0)
        if memory is not None:
            cells["memory: the same at the end as at a quarter"] = _told(
                f"{megabytes(memory[0])}, then {megabytes(memory[1])} MB",
                memory[1] <= _GROWTH * memory[0],
            )
        return cells

    def _first_batches(self, found: Results) -> dict[str, str]:
        cells = {}
        for column in _FIRST_BATCHES:
            mine = found.median(self.ours, *COLUMNS[column], "first_batch_s")
            best = found.best_other(self.loaders, self.ours, column, "first_batch_s", lowest=True)
            if mine and best:
                cells[f"first batch {column}, from S3: the soonest"] = _told(
                    f"{milliseconds(mine)} ms, {best[0]} {milliseconds(best[1])} ms",
                    mine <= best[1],
                )
        return cells


def _told(figure: str, is_met: bool) -> str:
    return f"{figure}: {'met' if is_met else '**missed**'}"


WHY = """\
Why some are missed, and what would meet them:

- **One process, from the page cache.** The best others map a file and copy each row out of it
  once, when it is asked for, and check nothing. Here each byte is copied once, too, and checked,
  and a thread that reads ahead takes turns with its consumer at the interpreter's lock. Twice the
  best other is about what `read()` gives by both cores, with nothing made of it: no loader that
  copies could reach it here. A loop over rows in compiled code, outside the lock, would come
  nearer; more would take batches that are views of mapped files, which cannot be written to, are
  not checked, and end the process when a file is cut short.
- **From S3**, where the server has its share of the same cores, the best others come near to what
  `read()` itself gives, or count what was fetched before: litdata's copy on the local disk, the
  Parquet stream's first seconds. Over the whole epoch neither is ahead. A shuffled epoch's second
  batch waits for a window of 1,024 rows, and two are fetched at once: it comes as much as a second
  behind the first, and that is half of a short measurement. By key each row is a request, here as
  in Lance; this process takes a quarter of that time (`s3_reads.md`), the server and the kernel
  the rest. What would show more is a server on another machine, and a smaller second fetch.
- **Memory**: why ragged rows take 3 MB more at the end was not taken apart. Two workers from S3
  kept shared memory of every size that they had ever fetched; since this was measured they give
  back what is too small (`tests/dataset/test_shared_memory.py`)."""
