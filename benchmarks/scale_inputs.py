"""What `scale.py` measures on: many shards on disk, and the cache that carving them would leave.

Shards are tar files that end at once (sparse on disk). Commit records and index files are what the
package writes, byte for byte in its format and sealed by its checksums; the parts they name are not
there: planning, snapshots and key lookups never open one.
"""

import functools
import hashlib
import os
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline.cache import layout
from pipeline.cache.commit import Commit, claim_identity
from pipeline.cache.writer import WrittenFile
from pipeline.config import load_config
from pipeline.demo.model import copy_model
from pipeline.job import Job, resolve_job
from pipeline.source import expand_shards, shard_id
from pipeline.storage import open_store
from pipeline.types import ShardRef

_TAR_BYTES = 10240
_TOKEN_BYTES = 64 * 1024  # 64 tokens of width 1,024 at 8 bits
_AUX_BYTES = 800
_GROUP_ROWS = 250


def write_config(folder: Path) -> Path:
    """Write the config of a run over `folder/corpus` into `folder/cache`."""
    copy_model(folder / "model")
    values = {
        "input": {"shards": str(folder / "corpus")},
        "output": {"url": str(folder / "cache")},
        "encoder": {"name": "llava", "options": {"model": str(folder / "model")}},
        "carver": {"name": "carve_default", "options": {"keep_tokens": 32}},
        "codec": {"name": "int8"},
        "runner": {"num_actors": 1, "gpus_per_actor": 0.0},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def write_shards(folder: Path, numbers: Sequence[int]) -> None:
    """Write the shards of these numbers."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        with (corpus / f"shard-{number:07d}.tar").open("wb") as file:
            file.truncate(_TAR_BYTES)


def commit_shards(folder: Path, numbers: Sequence[int], *, rows: int, keys: str) -> None:
    """Commit these shards, as actors would have.

    Args:
        folder: with a config and shards.
        numbers: of the shards.
        rows: of each.
        keys: `ordered`, so that a shard's keys lie beside each other, or `random`.
    """
    job = resolve_job(load_config(folder / "run.yaml"))
    store = open_store(job.config.output.url)
    claim_identity(store, job.identity)
    cache = Path(job.config.output.url)
    (cache / layout.COMMITS).mkdir(exist_ok=True)
    wanted = {f"shard-{number:07d}.tar": number for number in numbers}
    for shard in expand_shards(job.config.input.shards):
        number = wanted.get(shard.url.rsplit("/", 1)[-1])
        if number is not None:
            _commit(cache, job, shard, keys_of(number, rows, keys))


def keys_of(shard: int, rows: int, keys: str) -> list[str]:
    """Return the keys of a shard: 12 digits in order, or 24 hex digits in none."""
    if keys == "ordered":
        return [f"{shard * rows + row:012d}" for row in range(rows)]
    generator = random.Random(shard)
    return [f"{generator.getrandbits(96):024x}" for _ in range(rows)]


def _commit(cache: Path, job: Job, shard: ShardRef, keys: Sequence[str]) -> None:
    name = shard_id(shard)
    generator = random.Random(name)
    attempt = f"{generator.getrandbits(128):032x}"
    path, part = layout.index_path(name, attempt), layout.part_path(name, attempt, 0)
    sink = pa.BufferOutputStream()
    pq.write_table(_index(keys, generator), sink, compression="zstd", write_page_checksum=True)
    content = bytes(sink.getvalue().to_pybytes())
    os.makedirs(cache / os.path.dirname(path), exist_ok=True)
    (cache / path).write_bytes(content)
    count = len(keys)
    size = count * (_TOKEN_BYTES + _AUX_BYTES)
    files = (
        WrittenFile(
            path=part,
            kind="part",
            size=size,
            sha256=f"{generator.getrandbits(256):064x}",
            rows=count,
            footer_crc32c=generator.getrandbits(32),
        ),
        WrittenFile(
            path=path,
            kind="index",
            size=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            rows=count,
        ),
    )
    commit = Commit(
        shard_id=name,
        shard=shard,
        work_fingerprint=job.work_fingerprint(shard),
        attempt=attempt,
        files=files,
        num_read=count,
        num_written=count,
        rejected={},
        bytes_in=count * 150_000,
        tokens_full=576 * count,
        tokens_kept=64 * count,
        bytes_tokens=size,
        seconds=12.5,
        details={
            "host": "gpu-node-17",
            "device": "cuda:3",
            "batch_size": 32,
            "stage_seconds": {n: 1.25 for n in ("read", "decode", "encode", "carve", "write")},
        },
        committed_at=1.7e9 + generator.random() * 1e6,
    )
    record = layout.commit_path(name, commit.work_fingerprint)
    (cache / record).write_bytes(commit.to_json())


def _index(keys: Sequence[str], generator: random.Random) -> pa.Table:
    count = len(keys)
    noise = {
        "key": pa.array(sorted(keys)),
        "content_hash": _noise(pa.binary(16), 16 * count, generator),
        "aux_crc32c": _noise(pa.uint32(), 4 * count, generator),
    }
    table = _places(count)
    for name, values in noise.items():
        number = layout.INDEX_SCHEMA.get_field_index(name)
        table = table.set_column(number, layout.INDEX_SCHEMA.field(number), values)
    return table


def _noise(kind: pa.DataType, size: int, generator: random.Random) -> pa.Array:
    buffers = [None, pa.py_buffer(generator.randbytes(size))]
    return pa.Array.from_buffers(kind, size * 8 // kind.bit_width, buffers)


@functools.lru_cache
def _places(count: int) -> pa.Table:
    """Return an index without what tells its rows from those of other shards."""
    place, noise = np.arange(count), np.random.default_rng(count)
    values = {
        "key": [""] * count,
        "content_hash": [bytes(16)] * count,
        "part": np.zeros(count),
        "row_group": place // _GROUP_ROWS,
        "row": place % _GROUP_ROWS,
        "num_tokens": np.full(count, 64),
        "grid_t": np.ones(count),
        "grid_h": np.full(count, 24),
        "grid_w": np.full(count, 24),
        "width": noise.integers(300, 1200, count),
        "height": noise.integers(300, 1200, count),
        "tokens_offset": 4 + place * (_TOKEN_BYTES + 20),
        "tokens_length": np.full(count, _TOKEN_BYTES),
        "aux_offset": 4 + place * (_AUX_BYTES + 20),
        "aux_length": np.full(count, _AUX_BYTES),
        "aux_crc32c": np.zeros(count),
    }
    arrays = [
        pa.array(values[f.name], None if f.name != "content_hash" else f.type).cast(f.type)
        for f in layout.INDEX_SCHEMA
    ]
    return pa.Table.from_arrays(arrays, schema=layout.INDEX_SCHEMA)
