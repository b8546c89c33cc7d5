"""What listing, planning, snapshots and key lookups cost over very many shards.

    python -m benchmarks.scale make --folder /tmp/scale --shards 100000 --rows 20
    python -m benchmarks.scale measure --folder /tmp/scale --output scale.json

Each step runs in a process of its own, so that its peak memory is its own. It counts what it asks
of the store: on an object store that is what takes the time and costs the money.
"""

import argparse
import builtins
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.hardware import processor
from benchmarks.scale_inputs import commit_shards, keys_of, write_config, write_shards
from pipeline.cache.commit import list_records
from pipeline.cache.reader import SnapshotReader
from pipeline.cache.snapshot import Snapshot, build_snapshot, latest_snapshot
from pipeline.config import load_config
from pipeline.job import resolve_job
from pipeline.plan import given_up, make_plan
from pipeline.storage import Entry, Store
from pipeline.storage._store import _BUFFER_BYTES, _RangeReader

_ADDED = 10
_LOOKUPS = 300


class CountingStore(Store):
    """Counts requests and bytes."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.counts: Counter[str] = Counter()

    def read(self, path: str) -> bytes:
        content = super().read(path)
        self.counts.update(reads=1, read_bytes=len(content))
        return content

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        self.counts.update(reads=1, read_bytes=length)
        return super().read_range(path, offset, length)

    def size(self, path: str) -> int:
        self.counts["stats"] += 1
        return super().size(path)

    def put(self, path: str, data: bytes) -> None:
        self.counts.update(puts=1, put_bytes=len(data))
        super().put(path, data)

    def put_once(self, path: str, data: bytes) -> None:
        self.counts.update(puts=1, put_bytes=len(data))
        super().put_once(path, data)

    def list(self, prefix: str = "", *, temporary: bool = False) -> Iterator[Entry]:
        for entry in super().list(prefix, temporary=temporary):
            self.counts["listed"] += 1
            yield entry

    def list_names(self, prefix: str = "") -> builtins.list[str]:
        names = super().list_names(prefix)
        self.counts["listed"] += len(names)
        return names

    def local_path(self, path: str) -> str | None:
        """Return None but for the folder, so that tables are read by ranges, as from afar."""
        return super().local_path(path) if not path else None

    def open_read(self, path: str) -> BinaryIO:
        return io.BufferedReader(_RangeReader(self, path), _BUFFER_BYTES)


def step_plan(folder: Path, store: CountingStore) -> dict[str, Any]:
    plan = make_plan(resolve_job(load_config(folder / "run.yaml")), store)
    return {"shards": len(plan.shards), "todo": len(plan.todo)}


def step_list(_: Path, store: CountingStore) -> dict[str, Any]:
    return {"records": len(list_records(store))}


def step_snapshot(_: Path, store: CountingStore) -> dict[str, Any]:
    return _sizes(build_snapshot(store))


def step_nothing_to_do(folder: Path, store: CountingStore) -> dict[str, Any]:
    """Do all that a run with nothing to do does."""
    plan = make_plan(resolve_job(load_config(folder / "run.yaml")), store)
    given_up(plan, store)
    return {**_sizes(build_snapshot(store, plan.works)), "todo": len(plan.todo)}


def step_lookups(folder: Path, store: CountingStore) -> dict[str, Any]:
    """Open the cache and look keys up that lie anywhere."""
    facts = json.loads((folder / "facts.json").read_text())
    started = time.perf_counter()
    reader = SnapshotReader(store=store, snapshot=latest_snapshot(store) or _no_snapshot())
    opened = time.perf_counter()
    generator = random.Random(7)
    for _ in range(_LOOKUPS):
        shard = generator.randrange(facts["shards"])
        reader.find(generator.choice(keys_of(shard, facts["rows"], facts["keys"])))
    seconds = time.perf_counter() - opened
    return {"open_ms": 1e3 * (opened - started), "lookup_ms": 1e3 * seconds / _LOOKUPS}


def step_order(_: Path, store: CountingStore) -> dict[str, Any]:
    """Do what a training process does before its first row."""
    reader = SnapshotReader(store=store, snapshot=latest_snapshot(store) or _no_snapshot())
    return {"row_groups": len(reader.row_groups()[2])}


def step_scan_keys(_: Path, store: CountingStore) -> dict[str, Any]:
    reader = SnapshotReader(store=store, snapshot=latest_snapshot(store) or _no_snapshot())
    return {"keys": sum(1 for _ in reader.keys())}  # noqa: SIM118  (a reader is no dict)


STEPS: dict[str, Callable[[Path, CountingStore], dict[str, Any]]] = {
    "list": step_list,
    "plan": step_plan,
    "snapshot": step_snapshot,
    "nothing_to_do": step_nothing_to_do,
    "lookups": step_lookups,
    "order": step_order,
    "scan_keys": step_scan_keys,
}


def _sizes(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "rows": snapshot.num_rows,
        "segments": [segment.num_rows for segment in snapshot.segments],
        "record_bytes": len(snapshot.to_json()),
    }


def _no_snapshot() -> Snapshot:
    raise SystemExit("there is no snapshot: measure the step `snapshot` first")


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_step(name: str, folder: Path) -> None:
    """Do one step in this process and print what it took as JSON."""
    if name in ("plan", "nothing_to_do"):
        resolve_job(load_config(folder / "run.yaml"))  # what it imports is told apart
    store = CountingStore(str(folder / "cache"))
    before, started, cpu = _peak_mb(), time.perf_counter(), time.process_time()
    result = STEPS[name](folder, store)
    print(
        json.dumps(
            {
                "step": name,
                "seconds": time.perf_counter() - started,
                "cpu_seconds": time.process_time() - cpu,
                "imports_mb": before,
                "peak_mb": _peak_mb(),
                **store.counts,
                **result,
            }
        )
    )


def _start(action: str, folder: Path, *step: str, first: int = 0) -> str:
    command = [sys.executable, "-m", "benchmarks.scale", action, *step]
    options = ["--folder", str(folder), "--first", str(first)]
    return subprocess.run([*command, *options], check=True, capture_output=True, text=True).stdout


def _measured(step: str, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_start("step", folder, step).splitlines()[-1])
    print(json.dumps(found), flush=True)
    return found


def _command(name: str, folder: Path) -> dict[str, Any]:
    """Run `carve plan` or `carve run` as a user does, imports and all."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", name, "--config", str(folder / "run.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    said = process.stdout.read().decode() if process.stdout else ""
    found = {
        "step": f"carve {name}",
        "seconds": time.perf_counter() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss / 1024,
        "exit_code": process.returncode,
        "said": said.splitlines()[0] if said else "",
    }
    print(json.dumps(found), flush=True)
    return found


def measure(folder: Path) -> list[dict[str, Any]]:
    """Measure all steps, first without a snapshot, at last with ten shards more."""
    facts = json.loads((folder / "facts.json").read_text())
    shutil.rmtree(folder / "cache" / "snapshots", ignore_errors=True)
    results = [{**_measured("snapshot", folder), "step": "snapshot from scratch"}]
    results += [_measured(s, folder) for s in ("list", "plan", "nothing_to_do")]
    results += [_command("plan", folder), _command("run", folder)]
    results += [_measured(s, folder) for s in ("lookups", "order", "scan_keys")]
    for number in range(3):
        # By a process of its own: one that is started has the peak of this one as its own.
        _start("add", folder, first=facts["shards"] + number * _ADDED)
        results.append({**_measured("snapshot", folder), "step": f"{_ADDED} shards more"})
    results.append({**_measured("lookups", folder), "step": "lookups, several segments"})
    return results


def add(folder: Path, first: int) -> None:
    """Commit ten shards more, from a number on."""
    facts = json.loads((folder / "facts.json").read_text())
    added = range(first, first + _ADDED)
    write_shards(folder, added)
    commit_shards(folder, added, rows=facts["rows"], keys=facts["keys"])


def make(folder: Path, shards: int, rows: int, keys: str) -> None:
    """Write shards, and the cache that carving them leaves, without a snapshot."""
    folder.mkdir(parents=True)
    write_config(folder)
    write_shards(folder, range(shards))
    commit_shards(folder, range(shards), rows=rows, keys=keys)
    facts = {"shards": shards, "rows": rows, "keys": keys}
    (folder / "facts.json").write_text(json.dumps(facts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["make", "measure", "step", "add"])
    parser.add_argument("step", nargs="?", choices=[*STEPS])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first shard to add")
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--keys", choices=["ordered", "random"], default="random")
    parser.add_argument("--output", type=Path, default=Path("scale.json"))
    options = parser.parse_args()
    if options.action == "make":
        make(options.folder, options.shards, options.rows, options.keys)
    elif options.action == "add":
        add(options.folder, options.first)
    elif options.action == "step":
        run_step(options.step, options.folder)
    else:
        facts = json.loads((options.folder / "facts.json").read_text())
        results = measure(options.folder)
        found = {"processor": processor(), "cores": os.cpu_count(), **facts, "results": results}
        options.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
