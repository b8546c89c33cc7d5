"""What a ranged read of S3 costs by this project's reader and by libraries, and a page of it.

    python -m benchmarks.s3_reads > benchmarks/s3_reads.md

Takes the environment of `loaders_requirements.txt` and Ceph's gateway. All ways take turns in one
process, over the same ranges; what they read is compared with what was written.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version

import botocore.config
import botocore.session
import numpy as np
import obstore
import obstore.store
import s3fs

from benchmarks.hardware import processor
from benchmarks.loaders_raw import get_range
from benchmarks.loaders_store import s3_server
from pipeline.storage import open_store
from tests.network import isolate

Read = Callable[[str, int, memoryview], None]  # name of the object, first byte, where to

_OBJECTS = 8
_OBJECT_BYTES = 64 << 20
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Load:
    """Ranges that are read at once."""

    title: str
    length: int
    count: int
    threads: int


LOADS = (
    Load(title="16 MiB, by 8 threads", length=16 << 20, count=64, threads=8),
    Load(title="130 KiB, by 24 threads", length=130 << 10, count=512, threads=24),
)


def ways(bucket: str) -> dict[str, Read]:
    """Return what reads a range, by name."""
    store = open_store(f"s3://{bucket}/x")
    driver = s3fs.S3FileSystem(skip_instance_cache=True)
    settings = botocore.config.Config(max_pool_connections=32)
    client = botocore.session.Session().create_client("s3", config=settings)
    compiled = obstore.store.S3Store(bucket, client_options={"allow_http": True})

    def by_driver(name: str, start: int, view: memoryview) -> None:
        view[:] = driver.cat_file(f"{bucket}/x/{name}", start=start, end=start + len(view))

    def by_client(name: str, start: int, view: memoryview) -> None:
        _fill(view, get_range(client, f"{bucket}/x/{name}", start, start + len(view)))

    def whole(name: str, start: int, view: memoryview) -> None:
        found = obstore.get_range(compiled, f"x/{name}", start=start, length=len(view))
        view[:] = memoryview(found)

    def streamed(name: str, start: int, view: memoryview) -> None:
        answer = obstore.get(compiled, f"x/{name}", options={"range": (start, start + len(view))})
        _fill(view, map(memoryview, answer.stream(min_chunk_size=_PIECE_BYTES)))

    return {
        "this project": lambda name, start, view: store.read_into(name, start, [view]),
        "s3fs `cat_file`": by_driver,
        "botocore `get_object`": by_client,
        "obstore `get_range`": whole,
        "obstore `get(...).stream()`": streamed,
    }


def _fill(view: memoryview, pieces) -> None:  # noqa: ANN001
    at = 0
    for piece in pieces:
        view[at : at + len(piece)] = piece
        at += len(piece)


def measure(load: Load, read: Read, content: np.ndarray, buffer: np.ndarray) -> tuple[float, float]:
    """Return seconds, and seconds of the processor in this process, for a load."""
    draw = np.random.default_rng(load.length)
    names = draw.integers(_OBJECTS, size=load.count)
    starts = draw.integers(_OBJECT_BYTES - load.length, size=load.count)
    places = buffer[: load.count * load.length].reshape(load.count, load.length)

    def one(number: int) -> None:
        read(f"{names[number]}", int(starts[number]), memoryview(places[number]))

    with ThreadPoolExecutor(load.threads) as pool:
        began, used = time.perf_counter(), time.process_time()
        list(pool.map(one, range(load.count)))
        took = time.perf_counter() - began, time.process_time() - used
    for number in range(0, load.count, 7):
        start = starts[number]
        assert (places[number] == content[start : start + load.length]).all(), "other bytes"
    return took


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args(arguments).repeats
    if not isolate():
        raise SystemExit("takes the right to make a network namespace: nothing may call out")
    content = np.random.default_rng(0).integers(0, 256, _OBJECT_BYTES, np.uint8)
    buffer = np.ones(max(load.length * load.count for load in LOADS), np.uint8)
    found: dict[tuple[Load, str], list[tuple[float, float]]] = defaultdict(list)
    with s3_server(_OBJECTS * _OBJECT_BYTES) as server:
        bucket = server.create_bucket().removeprefix("s3://")
        upload = s3fs.S3FileSystem(skip_instance_cache=True)
        for number in range(_OBJECTS):
            upload.pipe_file(f"{bucket}/x/{number}", content.tobytes())
        reads = ways(bucket)
        for load in LOADS:
            for repeat in range(repeats + 1):
                for name, read in reads.items():
                    took = measure(load, read, content, buffer)
                    if repeat:  # the first makes connections, and buffers of their own
                        found[load, name].append(took)
                    print(f"{load.title} {name} {took}", file=sys.stderr)
    print(_page(found, list(reads), repeats))


def _page(
    found: dict[tuple[Load, str], list[tuple[float, float]]], names: Sequence[str], repeats: int
) -> str:
    libraries = ("botocore", "s3fs", "aiobotocore", "obstore")
    lines = [
        "# Ranged reads of S3",
        "",
        "    python -m benchmarks.s3_reads > benchmarks/s3_reads.md",
        "",
        "From Ceph's gateway on loopback, all in memory, on the same cores: so rates are the",
        "server's as much as the reader's, and what a reader leaves of the processor is what the",
        "columns `CPU` show: milliseconds of this process for one range, read into memory that is",
        f"given. Medians of {repeats} rounds, all ways by turns.",
        "",
        f"Hardware: {processor()}, {os.cpu_count()} logical cores. Python "
        f"{platform.python_version()}, " + ", ".join(f"{n} {version(n)}" for n in libraries) + ".",
    ]
    for load in LOADS:
        lines += ["", f"## {load.title}", "", "| | GB/s | CPU, ms | CPU, beside this project |"]
        lines += ["|---|--:|--:|--:|"]
        cpu = {
            name: statistics.median(used for _, used in found[load, name]) / load.count
            for name in names
        }
        for name in names:
            seconds = statistics.median(took for took, _ in found[load, name])
            rate = load.count * load.length / seconds / 1e9
            ratio = cpu[name] / cpu[names[0]]
            lines.append(f"| {name} | {rate:.2f} | {1e3 * cpu[name]:.2f} | {ratio:.1f} x |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
