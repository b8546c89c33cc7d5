"""Try damaged inputs on every reader and write down how they ended: `benchmarks/fuzz.md`.

    PYTHONPATH=. python benchmarks/fuzz.py                       # 20,000 inputs of each reader
    PYTHONPATH=. python benchmarks/fuzz.py --targets tar image --count 1000 --seed 7

`--results` is written after every 2,000 inputs, and a run which was stopped goes on from there.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import PIL
import pyarrow
import torch
from hardware import processor

from tests.fuzz.driver import Report, fuzz
from tests.fuzz.worker import TARGETS

STEP = 2000
_NOTHING: Mapping[str, Any] = {
    "count": 0,
    "outcomes": {},
    "broken": [],
    "slowest_s": 0.0,
    "seconds": 0,
}
WHAT = {
    "tar": "the tar reader, compared with Python's `tarfile`",
    "image": "the image decoder, up to 4 megapixels",
    "part": "parts; half through every way to read a cache, half by Arrow without any checksum",
    "row": "rows of all codecs; half with all their checksums made anew",
    "record": "`carve.json`, commits, `snapshot.json`, summaries; some with a good checksum",
    "table": "indexes, tables of snapshots, errors, failures; half without their SHA-256",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("fuzz-results.json"))
    parser.add_argument("--page", type=Path, default=Path("benchmarks/fuzz.md"))
    options = parser.parse_args()
    known = json.loads(options.results.read_text()) if options.results.exists() else {}
    for target in options.targets:
        while (done := known.get(target, _NOTHING)["count"]) < options.count:
            started = time.monotonic()
            count = min(STEP, options.count - done)
            report = fuzz(target, seed=options.seed, first=done, count=count)
            known[target] = added(known.get(target, _NOTHING), report, time.monotonic() - started)
            options.results.write_text(json.dumps(known, indent=1))
        print(f"{target}: {known[target]['count']} inputs, {len(known[target]['broken'])} broken")
    if known.keys() >= TARGETS.keys():
        options.page.write_text("\n".join(page(known)) + "\n")
    sys.exit(any(result["broken"] for result in known.values()))


def added(known: Mapping[str, Any], report: Report, seconds: float) -> dict[str, Any]:
    """Return the results of a target so far with those of the next inputs."""
    outcomes = report.outcomes + Counter(known["outcomes"])
    return {
        "seed": report.seed,
        "count": known["count"] + report.count,
        "outcomes": dict(outcomes.most_common()),
        "broken": [*known["broken"], *report.broken],
        "slowest_s": round(max(known["slowest_s"], report.slowest[0]), 3),
        "seconds": round(known["seconds"] + seconds),
    }


def page(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of the page."""
    yield "# Damaged inputs"
    yield ""
    yield "What is damaged, and what must hold, stands in `docs/security.md`. Made by"
    yield "`PYTHONPATH=. python benchmarks/fuzz.py`; any input can be tried again by its number:"
    yield "`python -m tests.fuzz.worker TARGET SEED NUMBER 1`."
    yield ""
    yield f"{processor()}, {os.cpu_count()} cores shared with other work, at low priority; Python"
    yield f"{platform.python_version()}, pyarrow {pyarrow.__version__}, Pillow {PIL.__version__},"
    yield f"torch {torch.__version__}, NumPy {numpy.__version__}. Each process has a bound on its"
    yield "address space, and is ended when an input takes 120 s."
    yield ""
    yield "| reader | inputs | seed | broken | slowest | took | how the others ended |"
    yield "|---|--:|--:|--:|--:|--:|---|"
    for target in TARGETS:
        found = results[target]
        outcomes = ", ".join(f"{name} {count:,}" for name, count in found["outcomes"].items())
        yield (
            f"| {target} | {found['count']:,} | {found['seed']} | {len(found['broken'])} | "
            f"{found['slowest_s']:.2f} s | {found['seconds']:,} s | {outcomes} |"
        )
    yield ""
    for target, what in WHAT.items():
        yield f"- `{target}`: {what}"


if __name__ == "__main__":
    main()
