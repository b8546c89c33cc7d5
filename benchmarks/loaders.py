"""This project's loader beside others, over the same rows: from disk and from S3.

    python -m benchmarks.loaders --work-dir /tmp/loaders --write-page

Takes the environment of `loaders_requirements.txt`. Every figure comes from a process of its own,
and the loaders take turns. Results are kept as they come: `--resume` goes on with a run that was
broken off, `--page-only` writes the page anew. `loaders.md` explains the numbers. Needs Linux.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks import loaders_page as page
from benchmarks.hardware import processor
from benchmarks.loaders_inputs import Corpus, corpora
from benchmarks.loaders_measure import (
    LOADERS,
    PLAIN_READ,
    Task,
    as_argument,
    loader_kind,
)
from benchmarks.loaders_store import is_complete, s3_server, upload
from benchmarks.process_watch import memory_of
from tests.network import isolate

OURS = "carvecache"
_KINDS = {name: loader_kind(name) for name in LOADERS}
_ROOT = Path(__file__).parents[1]
_WORKERS = (0, 2)
_RATES = ("sequential", "shuffled", "by_key", "resume")
_GRACE_S = 60.0  # for start, opening and what a limit does not cover
_LONGER = 4  # times the limit, where what is fetched at first takes most of it
_MEMORY_POLL_S = 0.05
_SILENCE = {
    "AWS_EC2_METADATA_DISABLED": "true",
    "DO_NOT_TRACK": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "LITDATA_DISABLE_VERSION_CHECK": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}


class MeasurementError(Exception):
    """A measurement's process failed, or took far too long."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """A corpus on a store, written by every loader."""

    corpus: Corpus
    store: str  # local, s3
    folder: Path  # on this machine, a folder for each loader in it
    bucket: str = ""

    def folder_of(self, loader: str) -> Path:
        """Return where a loader wrote it."""
        kind = OURS if loader == PLAIN_READ else loader
        return self.folder / kind.replace(", ", "-").replace(" ", "-")

    def url_of(self, loader: str) -> str:
        """Return where a loader reads it."""
        folder = self.folder_of(loader)
        return f"{self.bucket}/{folder.name}" if self.bucket else str(folder)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What is measured of every loader before the next."""

    measure: str
    num_workers: int
    repeat: int


class Bench:
    """The work, and what came of it so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.results = options.work_dir / "results.jsonl"
        kept = self.read() if options.resume else []
        self.done = {page.name_of(r) for r in kept if "result" in r}

    def read(self) -> list[dict[str, Any]]:
        """Return the results that are kept."""
        if not self.results.is_file():
            return []
        return [json.loads(line) for line in self.results.read_text().splitlines()]

    def keep(self, result: Mapping[str, Any]) -> None:
        """Add a result to the file."""
        with open(self.results, "a") as sink:
            sink.write(json.dumps(result) + "\n")

    def prepare(self, data: Data) -> None:
        """Write the corpus with every loader that has not yet."""
        step = Step(measure="write", num_workers=0, repeat=0)
        for loader in self.loaders(data.store):
            folder = data.folder_of(loader)
            mark = folder.with_name(f"{folder.name}.json")
            if not mark.is_file():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                mark.write_text(json.dumps(self.run(data, loader, step)))
            about = _about_step(data, loader, step)
            if page.name_of(about) not in self.done:
                self.keep({**about, "result": json.loads(mark.read_text())})

    def loaders(self, store: str) -> list[str]:
        """Return the loaders that can read from a store, in the order of their turns."""
        chosen = self.options.loaders or list(LOADERS)
        return [name for name in chosen if store not in _KINDS[name].lacks]

    def measure_local(self, data: Data) -> None:
        """Let all loaders take turns at every step."""
        for step in self.steps():
            for loader in self.takers(data.store, step):
                self.take(data, loader, step)

    def measure_remote(self, data: Data) -> None:
        """Let all loaders take turns at a round; one's data at a time fits into the store."""
        for repeat in range(self.options.repeats):
            for loader in self.loaders(data.store):
                steps = [
                    (name, step)
                    for step in self.steps()
                    for name in self.takers(data.store, step)
                    if step.repeat == repeat
                    and loader == (OURS if name == PLAIN_READ else name)
                    and page.name_of(_about_step(data, name, step)) not in self.done
                ]
                if not steps:
                    continue
                folder = data.folder_of(loader)
                with s3_server(_size_of(folder)) as server:
                    there = replace(data, bucket=server.create_bucket())
                    upload(folder, there.url_of(loader))
                    for name, step in steps:
                        self.take(there, name, step)

    def take(self, data: Data, loader: str, step: Step) -> None:
        """Carry one step out with one loader and keep what comes of it."""
        about = _about_step(data, loader, step)
        if page.name_of(about) in self.done:
            return
        load = os.getloadavg()[0]
        started = time.time()
        try:
            found: dict[str, Any] = {"result": self.run(data, loader, step)}
        except MeasurementError as err:
            found = {"error": str(err)}
        self.keep({**about, "load": load, "seconds": time.time() - started, **found})
        print(page.line(about, found), flush=True)

    def steps(self) -> Iterator[Step]:
        """Yield what to measure: that all is right, each figure in every round, memory once."""
        yield Step(measure="check", num_workers=0, repeat=0)
        for repeat in range(self.options.repeats):
            yield Step(measure="read", num_workers=0, repeat=repeat)
            for measure in _RATES:
                for num_workers in _WORKERS:
                    if measure != "by_key" or num_workers == 0:
                        yield Step(measure=measure, num_workers=num_workers, repeat=repeat)
        for num_workers in _WORKERS:
            yield Step(measure="memory", num_workers=num_workers, repeat=0)

    def takers(self, store: str, step: Step) -> list[str]:
        """Return who takes a step."""
        if step.measure == "read":
            return [PLAIN_READ] if OURS in self.loaders(store) else []
        return [name for name in self.loaders(store) if step.measure not in _KINDS[name].lacks]

    def run(self, data: Data, loader: str, step: Step) -> dict[str, Any]:
        """Carry one step out and return its result."""
        if data.store == "local" and step.measure != "write":
            _warm(data.folder_of(loader))
        is_long = data.store == "s3" and (step.num_workers > 0 or step.measure == "memory")
        with tempfile.TemporaryDirectory(dir=self.options.work_dir) as scratch:
            task = Task(
                corpus=data.corpus.name,
                num_rows=data.corpus.num_rows,
                loader=loader,
                measure=step.measure,
                num_workers=step.num_workers,
                url=data.url_of(loader),
                cache_dir=f"{scratch}/cache",
                limit_s=self.options.limit_s * (_LONGER if is_long else 1),
                state_file=f"{scratch}/state",
                progress_file=f"{scratch}/progress",
            )
            if step.measure == "resume":
                saved = _run_process({**vars(task), "measure": "save"}, Path(scratch))
                shutil.rmtree(task.cache_dir, ignore_errors=True)
                return {
                    **_run_process(vars(task), Path(scratch)),
                    "pickled_state_bytes": saved["state_bytes"],
                }
            return _run_process(vars(task), Path(scratch))


def _about_step(data: Data, loader: str, step: Step) -> dict[str, Any]:
    return {
        "corpus": data.corpus.name,
        "store": data.store,
        "loader": loader,
        "measure": step.measure,
        "num_workers": step.num_workers,
        "repeat": step.repeat,
    }


def _warm(folder: Path) -> None:
    """Bring a folder's files into the page cache: all of them fit, those of all loaders do not."""
    buffer = bytearray(8 << 20)
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def _run_process(task: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """Run a task in a process of its own, and whatever it starts; all are gone afterwards."""
    Path(task["cache_dir"]).mkdir()
    Path(task["progress_file"]).write_bytes(bytes(8))
    home = {"HOME": str(scratch), "HF_HOME": f"{scratch}/hf", "LITDATA_CACHE_DIR": f"{scratch}/lit"}
    command = [sys.executable, "-m", "benchmarks.loaders_measure", as_argument(Task(**task))]
    with open(scratch / "out", "w+") as out, open(scratch / "err", "w+") as err:
        process = subprocess.Popen(
            command,
            cwd=_ROOT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, **_SILENCE, **home},
            start_new_session=True,
        )
        try:
            with _watch_memory(process.pid, task) as readings:
                code: int | None = process.wait(task["limit_s"] * 10 + _GRACE_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0), err.seek(0)
        if code != 0:
            words = " ".join(err.read().split())[-400:]
            raise MeasurementError(f"{'too slow' if code is None else f'exit {code}'}: {words}")
        result: dict[str, Any] = json.loads(out.read().splitlines()[-1])
    return {**result, "readings": readings} if readings else result


@contextmanager
def _watch_memory(pid: int, task: Mapping[str, Any]) -> Iterator[list[tuple[int, int, int]]]:
    """Read the memory of a process and all below it: rows so far, own bytes, mapped bytes."""
    readings: list[tuple[int, int, int]] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(_MEMORY_POLL_S):
            with suppress(psutil.Error, OSError):
                root = psutil.Process(pid)
                found = [memory_of(p) for p in (root, *root.children(recursive=True))]
                rows = int.from_bytes(Path(task["progress_file"]).read_bytes(), "little")
                own, mapped = (sum(f[n] for f in found) for n in ("own_bytes", "mapped_bytes"))
                if rows:
                    readings.append((rows, own, mapped))

    thread = threading.Thread(target=look)
    if task["measure"] == "memory":
        thread.start()
    try:
        yield readings
    finally:
        over.set()
        if thread.ident is not None:
            thread.join()


def _about(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "measure": "about",
        "CPU": f"{processor()}, {os.cpu_count()} logical cores",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": page.versions(_KINDS.values()),
        "options": {
            name: value for name, value in vars(options).items() if name not in ("work_dir",)
        },
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def _measure_all(bench: Bench) -> None:
    options = bench.options
    for name in options.data:
        corpus = corpora(options.rows)[name]
        for store in options.stores:
            folder = options.work_dir / f"{name}-{options.rows}"
            data = Data(corpus=corpus, store=store, folder=folder)
            print(f"{name}, {store}: {options.rows} rows", flush=True)
            bench.prepare(data)
            if store == "local":
                bench.measure_local(data)
            else:
                bench.measure_remote(data)


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True, help="for data and results")
    parser.add_argument(
        "--data", nargs="+", choices=["fixed", "ragged"], default=["fixed", "ragged"]
    )
    parser.add_argument("--stores", nargs="+", choices=["local", "s3"], default=["local", "s3"])
    parser.add_argument("--loaders", nargs="+", choices=list(LOADERS), help="default: all")
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit-s", type=float, default=10, help="of a measurement; or one epoch")
    parser.add_argument("--resume", action="store_true", help="measure what has no result yet")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    parser.add_argument("--write-page", action="store_true", help="write the page beside this file")
    options = parser.parse_args(arguments)
    options.work_dir = options.work_dir.absolute()
    return options


def main() -> None:
    """Measure, and write down what came of it."""
    options = parse_options()
    bench = Bench(options)
    if not options.page_only:
        if "s3" in options.stores and not is_complete():
            raise SystemExit("S3 takes radosgw, ceph-mon, ceph-osd and curl; or --stores local")
        if not isolate():
            raise SystemExit("takes the right to make a network namespace: nothing may call out")
        options.work_dir.mkdir(parents=True, exist_ok=True)
        if not options.resume:
            bench.results.unlink(missing_ok=True)
        if not bench.results.is_file():
            bench.keep(_about(options))
        _measure_all(bench)
    text = page.render(bench.read(), _KINDS, ours=OURS)
    print(text)
    if options.write_page:
        Path(__file__).with_name("loaders.md").write_text(text)


if __name__ == "__main__":
    main()
