"""Let storms rage over real runs, and write what they survived to `benchmarks/chaos.md`.

    python benchmarks/chaos.py --log FOLDER

The storms are those of `pytest -m chaos`, on a local disk and on Ceph's S3 gateway at once, each
worker with a Ray cluster of its own. It needs what the tests need; `tests/servers/install.sh`
installs the gateway. Storms that the folder knows already are not repeated, so that a run may be
broken off. Exits with 1, and writes no page, if a storm was not survived.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from hardware import processor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.chaos.plan import NUM_LONG  # noqa: E402  (the tests are no package that is installed)

PAGE = ROOT / "benchmarks" / "chaos.md"
STORES = {"local": "local disk", "s3": "radosgw"}
_FAULTS = {
    "kill_actor": "SIGKILL of an actor's process",
    "kill_driver": "SIGKILL of the driver",
    "stop_driver": "SIGTERM of the driver",
    "kill_node": "a whole Ray node killed, a new one later",
    "refuse": "all connections to the store reset",
    "black_hole": "store silent",
    "slow_down": "503 SlowDown",
    "lose_replies": "replies to puts lost",
    "cut_requests": "puts cut off midway",
    "kill_gateway": "SIGKILL of the S3 gateway",
}
_PACKAGES = ("ray", "torch", "pyarrow", "s3fs")

Storms = Mapping[str, Sequence[Mapping[str, Any]]]  # what each was like, by store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", type=Path, required=True, help="folder for what storms were like")
    parser.add_argument("--workers", type=int, default=1, help="storms at once on each store")
    arguments = parser.parse_args()
    arguments.log.mkdir(parents=True, exist_ok=True)
    processes = []
    for store in STORES:
        known = {storm["seed"] for storm in _read(arguments.log, store)}
        seeds = [seed for seed in range(1, NUM_LONG + 1) if seed not in known]
        shares = [seeds[number :: arguments.workers] for number in range(arguments.workers)]
        processes += [_start(arguments.log, store, n, s) for n, s in enumerate(shares) if s]
    codes = [process.wait() for process in processes]
    storms = {store: _read(arguments.log, store) for store in STORES}
    lost = [storm for known in storms.values() for storm in known if storm["error"]]
    for storm in lost:
        print(f"seed {storm['seed']} on {storm['store']}: {storm['error']}")
    if any(codes) or lost:
        sys.exit(1)
    PAGE.write_text("\n".join(page(storms)) + "\n")


def _start(folder: Path, store: str, worker: int, seeds: Sequence[int]) -> subprocess.Popen[bytes]:
    log = f"--storm-log={folder / store}.jsonl"
    # One process: a world of its own costs each a cluster.
    command = ["pytest", "-n", "0", "-m", "chaos", "tests/chaos", "-k", store, log]
    with (folder / f"{store}-{worker}.log").open("w") as said:
        return subprocess.Popen(
            [sys.executable, "-m", *command, *(f"--seed={seed}" for seed in seeds)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "CARVE_TEST_SERVERS": "required"},
            stdout=said,
            stderr=subprocess.STDOUT,
        )


def _read(folder: Path, store: str) -> list[dict[str, Any]]:
    log = folder / f"{store}.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return sorted(map(json.loads, lines), key=lambda storm: storm["seed"])


def page(storms: Storms) -> Iterator[str]:
    """Yield the lines of the page."""
    every = [storm for known in storms.values() for storm in known]
    yield f"# Chaos: {len(every)} storms survived"
    yield ""
    yield "Written by this command, nothing on it by hand:"
    yield ""
    yield "    python benchmarks/chaos.py --log FOLDER"
    yield ""
    yield from _machine(every)
    yield ""
    yield (
        "A storm is one or two phases of one or two real runs (`jobs/carve_dataset.py`) at once "
        "on one cache, on a Ray cluster of two nodes, hurt at moments drawn from its seed; between "
        "phases shards are added, changed, put back and removed. Then one run is left alone. What "
        "it leaves must hold, bit for bit, every row that the same shards give when carved with no "
        "Ray and no fault, each key once; every checksum must fit; a reader must be given nothing "
        "else; `carve gc --grace 0` must remove exactly the files that, by a raw listing and the "
        "raw records, nothing names; `carve verify` must find nothing wrong and one more run "
        "nothing to do. All along a reader opens the cache again and again and compares every row "
        "it is given. Shards that were removed from the corpus stay in the cache by design, whole "
        "and with a content that was committed. `pytest -m chaos tests/chaos --seed N` lets the "
        "storm of one seed rage again."
    )
    yield ""
    yield from _totals(storms)
    yield ""
    yield from _faults(storms)
    yield ""
    yield from _endings(storms)


def _machine(storms: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    cores, memory = os.cpu_count(), psutil.virtual_memory().total / 2**30
    system = os.uname()
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    gateway = shutil.which("radosgw")
    if gateway:
        said = subprocess.run([gateway, "--version"], capture_output=True, text=True, check=True)
        versions.append("radosgw " + said.stdout.split()[2])
    yield f"- CPU: {processor()}, {cores} logical cores; memory: {memory:.0f} GiB"
    yield f"- system: {system.sysname} {system.release}, Python {sys.version.split()[0]}"
    yield f"- versions: {', '.join(versions)}"
    days = [time.strftime("%Y-%m-%d", time.gmtime(storm["ended_at"])) for storm in storms]
    minutes = sum(sum(storm["seconds"].values()) for storm in storms) / 60
    yield f"- {min(days)} to {max(days)}, {minutes:.0f} minutes of storms on a shared machine"


def _totals(storms: Storms) -> Iterator[str]:
    rows = {
        "storms survived": lambda storm: storm["error"] is None,
        "of them compared with another, undisturbed run on Ray too": lambda s: s["is_compared"],
        "runs": lambda storm: storm["num_runs"],
        "shards committed": lambda storm: storm["num_commits"],
        "attempts that left files": lambda storm: storm["num_attempts"],
        "of them orphans, found and collected": lambda storm: storm["num_orphans"],
        "files collected": lambda storm: storm["num_collected"],
        "rows compared at the end": lambda storm: storm["num_rows"],
        "times a reader looked meanwhile": lambda storm: storm["looks"],
        "rows it compared": lambda storm: storm["looked_rows"],
    }
    yield from _head("", storms)
    for name, count in rows.items():
        yield _row(name, [sum(map(count, known)) for known in storms.values()])
    seeds = [sorted(storm["seed"] for storm in known) for known in storms.values()]
    yield _row("seeds", [f"{known[0]} to {known[-1]}" for known in seeds], total="")


def _faults(storms: Storms) -> Iterator[str]:
    yield (
        "Faults that struck, and of those the ones that certainly hit work: shards were being "
        "carved and not all committed, and the process hit, or the actors of the node, had begun."
    )
    yield ""
    yield "| | " + " | ".join(STORES.values()) + " | together | hit work |"
    yield "|---|" + "--:|" * (len(STORES) + 2)
    for kind, words in _FAULTS.items():
        struck = {s: _struck(known, kind) for s, known in storms.items()}
        counts = [len(found) for found in struck.values()]
        hit = sum(fault["in_flight"] for found in struck.values() for fault in found)
        yield f"| {words} | {' | '.join(map(str, counts))} | {sum(counts)} | {hit} |"


def _struck(storms: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    faults = [fault for storm in storms for fault in storm["faults"]]
    return [fault for fault in faults if fault["kind"] == kind and fault["landed"]]


def _endings(storms: Storms) -> Iterator[str]:
    yield "How the disturbed runs ended:"
    yield ""
    yield from _head("exit code", storms)
    codes = [
        Counter(c for storm in known for c in storm["exit_codes"]) for known in storms.values()
    ]
    names = {-9: "killed"}
    for code in sorted(set().union(*codes)):
        yield _row(names.get(code, str(code)), [found[code] for found in codes])


def _head(first: str, storms: Storms) -> Iterator[str]:
    yield f"| {first} | " + " | ".join(STORES[store] for store in storms) + " | together |"
    yield "|---|" + "--:|" * (len(storms) + 1)


def _row(name: str, values: Sequence[Any], *, total: str | None = None) -> str:
    together = str(sum(values)) if total is None else total
    return f"| {name} | " + " | ".join(map(str, values)) + f" | {together} |"


if __name__ == "__main__":
    main()
