"""The page that `loaders.py` writes: every figure on it comes from the results of its runs."""

import importlib.metadata
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.loaders_base import Loader
from benchmarks.loaders_results import COLUMNS, Results
from benchmarks.loaders_tables import NONE, megabytes, milliseconds, table
from benchmarks.loaders_targets import WHY, Targets

_STORES = {"local": "local disk, in the page cache", "s3": "S3 on loopback"}


def name_of(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells a result from those of other measurements."""
    names = ("corpus", "store", "loader", "measure", "num_workers", "repeat")
    return tuple(result.get(name) for name in names)


def line(about: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Return one result in a line."""
    where = "{corpus:7}{store:6}{measure:11}{num_workers} {loader:24}".format(**about)
    if "error" in found:
        return f"{where} FAILED {found['error']}"
    parts = {k: v for k, v in found["result"].items() if isinstance(v, int | float)}
    return f"{where} " + ", ".join(f"{name} {value:.4g}" for name, value in parts.items())


def versions(loaders: Iterable[type[Loader]]) -> str:
    """Return the versions of all packages that were measured."""
    found = {v for kind in loaders for v in kind.versions().split(", ")}
    found |= {f"{name} {importlib.metadata.version(name)}" for name in ("torch", "torchdata")}
    return ", ".join(sorted(found))


def render(
    results: Sequence[Mapping[str, Any]], loaders: Mapping[str, type[Loader]], *, ours: str
) -> str:
    """Return the page as Markdown."""
    about = next(r for r in results if r["measure"] == "about")
    parts = ["# Loaders: the same rows through this project's and through others'", _intro(about)]
    sections = {
        f"{corpus}, {_STORES[store]}": found
        for corpus in dict.fromkeys(r["corpus"] for r in results if "corpus" in r)
        for store in _STORES
        if (found := Results(results, corpus, store)).all
    }
    parts += ["## Against the targets", Targets(loaders=[*loaders], ours=ours).table(sections), WHY]
    for title, found in sections.items():
        parts += _section(found, loaders, ours=ours, title=title)
    parts += ["## How each is set up", _setups(loaders)]
    parts += ["## What could not be measured", _gaps(results, loaders)]
    parts += ["## How it is measured", _METHOD]
    return "\n\n".join(parts) + "\n"


def _intro(about: Mapping[str, Any]) -> str:
    options = about["options"]
    flags = " ".join(f"--{name.replace('_', '-')} {options[name]}" for name in ("rows", "limit_s"))
    lines = [
        "Written by this command, nothing on it by hand:",
        f"\n    python -m benchmarks.loaders --work-dir DIR --write-page {flags}\n",
        "in as many rounds (`--repeats`) as each section says.\n",
        *[f"- {name}: {about[name]}" for name in ("CPU", "memory", "system", "versions")],
        f"- {options['rows']:,} rows in each data set",
        f"- begun {about['date']}; load average {about['load']:.1f}",
        "- rows: `fixed` 128 tokens of 1024 int8 codes, `ragged` 32 to 192 of them; each with a "
        "float32 scale, a position, a float32 size a token, and a key",
    ]
    return "\n".join(lines)


def _section(
    found: Results, loaders: Mapping[str, type[Loader]], *, ours: str, title: str
) -> list[str]:
    return [
        f"## {title}",
        "Rows per second in the midst of an epoch, and GB/s of payload:",
        _rates(found, loaders, ours=ours, name="rows_s"),
        _noise(found),
        "The same over the whole epoch, from the moment the data is opened:",
        _rates(found, loaders, ours=ours, name="whole_rows_s"),
        "Milliseconds to the first batch, in a process of its own, the libraries imported:",
        table(
            list(COLUMNS),
            loaders,
            lambda loader, column: milliseconds(
                found.median(loader, *COLUMNS[column], "first_batch_s")
            ),
        ),
        _second_epochs(found, loaders),
        "Going on from a state taken at 60 % of a shuffled epoch, in a new process:",
        _resumes(found, loaders),
        "Memory in MB that a shuffled epoch adds to the process and its workers:",
        _memory(found, loaders),
        "Written once:",
        _sizes(found, loaders),
    ]


def _rates(found: Results, loaders: Mapping[str, type[Loader]], *, ours: str, name: str) -> str:
    def rate(loader: str, column: str) -> float | None:
        return found.median(loader, *COLUMNS[column], name)

    def cell(loader: str, column: str) -> str:
        value = rate(loader, column)
        return NONE if value is None else f"{value:,.0f} · {value * found.bytes_per_row / 1e9:.2f}"

    def against(row: str, column: str) -> str:
        mine = rate(ours, column)
        if row != _BEST:
            bound = found.read_rows_s(_BOUNDS[row.removeprefix("ours / ")])
            return f"{mine / bound:.2f}" if mine and bound and column != "by key" else NONE
        best = found.best_other(loaders, ours, column, name)
        return f"{mine / best[1]:.2f} ({best[0]})" if mine and best else NONE

    whole = table(list(COLUMNS), loaders, cell)
    for bound, figure in _BOUNDS.items():
        if (value := found.read_rows_s(figure)) is not None:
            number = f"{value:,.0f} · {value * found.bytes_per_row / 1e9:.2f}"
            whole += f"\n| {bound} | {number} |" + f" {NONE} |" * (len(COLUMNS) - 1)
    rows = (_BEST, *[f"ours / {bound}" for bound in _BOUNDS])
    ratios = table(list(COLUMNS), rows, against).splitlines()[2:]
    return "\n".join([whole, *[f"| **{r[2:]}".replace(" |", "** |", 1) for r in ratios]])


_BEST = "ours / best other"
_BOUNDS = {"read()": "bytes_s", "read() by 2 threads": "threads_bytes_s"}


def _noise(found: Results) -> str:
    spreads, rounds = found.spreads(), found.num_rounds
    loads = [r["load"] for r in found.all if "load" in r]
    load = (
        f"Load average before a measurement: {statistics.median(loads):.1f}, at most "
        f"{max(loads):.1f}."
    )
    if rounds == 1:
        return f"One round. {load}"
    return (
        f"{rounds} rounds. Between those of a figure, highest less lowest is "
        f"{statistics.median(spreads):.0%} of the median in the middle case, {max(spreads):.0%} "
        f"in the worst. {load}"
    )


def _second_epochs(found: Results, loaders: Iterable[str]) -> str:
    rows = []
    for loader in loaders:
        for column, where in COLUMNS.items():
            again = [r["second"]["rows_s"] for r in found.found(loader, *where) if "second" in r]
            if again and None not in again:
                rows.append(f"{column} {statistics.median(again):,.0f}")
        if rows:
            return (
                f"{loader} keeps a copy on the local disk; the second epoch, rows/s: "
                + ", ".join(rows)
                + "."
            )
    return "No loader kept a copy of its own."


def _resumes(found: Results, loaders: Iterable[str]) -> str:
    columns = ["ms", "ms, 2 workers", "state, kB", "rows twice", "rows missing"]
    if not any("pickled_state_bytes" in r for n in loaders for r in found.found(n, "resume", 0)):
        columns.remove("state, kB")

    def cell(loader: str, column: str) -> str:
        if column.startswith("ms"):
            workers = 2 if "workers" in column else 0
            return milliseconds(found.median(loader, "resume", workers, "first_batch_s"))
        each = [r for workers in (0, 2) for r in found.found(loader, "resume", workers)]
        if not each:
            return NONE
        if column.startswith("state"):
            return f"{max(r['pickled_state_bytes'] for r in each) / 1000:.1f}"
        values = [r["twice" if "twice" in column else "missing"] for r in each]
        return "not known" if None in values else f"{max(values):,}"

    return table(columns, loaders, cell)


def _memory(found: Results, loaders: Iterable[str]) -> str:
    columns = [
        f"{label}{', 2 workers' * (workers > 0)}"
        for workers in (0, 2)
        for label in ("own, to 25 %", "own, to the end", "mapped files")
    ]

    def cell(loader: str, column: str) -> str:
        memory = found.memory(loader, 2 if "workers" in column else 0)
        if memory is None:
            return NONE
        value = memory[0 if "25" in column else 2 if column.startswith("mapped") else 1]
        return NONE if math.isnan(value) else megabytes(value)

    return table(columns, loaders, cell)


def _sizes(found: Results, loaders: Iterable[str]) -> str:
    def cell(loader: str, column: str) -> str:
        each = found.found(loader, "write", 0)
        if not each:
            return NONE
        return megabytes(each[0]["bytes"]) if column == "MB" else f"{each[0][column]:,.0f}"

    return table(["MB", "files", "seconds"], loaders, cell)


def _setups(loaders: Mapping[str, type[Loader]]) -> str:
    return "\n".join(f"- **{name}**: {kind.how}." for name, kind in loaders.items())


def _gaps(results: Sequence[Mapping[str, Any]], loaders: Mapping[str, type[Loader]]) -> str:
    lines = [
        f"- {name}, {_WORDS.get(what, what)}: {why}."
        for name, kind in loaders.items()
        for what, why in kind.lacks.items()
    ]
    known = {name_of(r) for r in results if "result" in r}
    failed = {name_of(r): r for r in results if "error" in r and name_of(r) not in known}
    lines += [
        f"- failed: {r['loader']}, {r['corpus']} on {r['store']}, {r['measure']} with "
        f"{r['num_workers']} workers, round {r['repeat'] + 1}: `{r['error'][-200:]}`"
        for r in failed.values()
    ]
    return "\n".join(lines)


_WORDS = {"by_key": "by key", "resume": "going on", "s3": "from S3"}

_METHOD = """\
- **Same payload.** Every loader stores the codes, scales, positions, sizes and keys of the same
  random rows and gives, in the consumer's process, batches of 64 rows as torch tensors: codes in
  one int8 tensor, row after row, the scales, the positions and the sizes likewise, and a list of
  keys. Before anything is timed a batch in order, a shuffled one and one by key are compared byte
  by byte with what was written. Nothing is unpacked to floats. The consumer reads one byte of
  every page of the codes.
- **Memory of their own.** Batches lie in memory that is nobody else's, so that a consumer can write
  to it; a loader whose pages are a mapped file's is given one copy, one whose buffers are its own
  (Arrow's, Lance's) is not. In a worker that copy goes to shared memory, as torch's own collate
  does it.
- **Checks.** This project's loader checks every row against its checksums. The others do not check,
  beyond what their transport does.
- **Turns.** Every figure is measured in a process of its own, one after the other over the
  loaders (from S3: all figures of a loader, then the next), and so for each round; the tables
  give medians. A measurement ends after an epoch or the time limit, which with workers on S3, and
  for this project's memory there, is four times as long: what is fetched at first takes most of
  it. Steady rates are those between 20 % and 80 % of the rows, because loaders that read ahead
  have the last rows ready and make the first ones wait; where the limit came first, from 20 % of
  what was read.
- **Shuffles differ.** *Arrow*, *Lance* and *plain file* give any row at any time; litdata shuffles
  chunks and the rows within; *Parquet stream* and *webdataset* shuffle files and a buffer of 1,000
  rows; this project shuffles row groups and the rows within.
- **Local disk**: the files are read once right before each measurement, so they come from the
  page cache. `read()` reads the bytes of this project's Parquet files in pieces of 8 MiB into one
  buffer; two threads of it into one each, half of the files each. From S3 it is botocore's, in
  ranged GETs of 16 MiB by 8 threads. It makes no tensors.
- **S3** is Ceph's gateway with all its objects in memory, on the same machine: it takes its share
  of the same cores, and there is no network to wait for. In a round it is started anew for each
  loader and holds its data alone. A steady rate above that of `read()` means that what was counted
  had been fetched before.
- **Going on.** Loaders without a state of their own that torch's sampler drives are put in
  torchdata's `StatefulDataLoader`. *Twice* and *missing* count rows over both processes.
- **Memory** is what `/proc/PID/smaps_rollup` says of the process and all below it, read every
  50 ms, less what the process had after its imports: *own* is anonymous and shared memory, shared
  pages once; *mapped* is pages of files, which the system can take back. The consumer pauses 20 ms
  after each batch. Workers that are spawned (Lance's) import their libraries again, and that
  counts."""
