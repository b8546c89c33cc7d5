"""Rows, attempts and commits made in code for the tests of the cache."""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pipeline import codecs
from pipeline.cache.commit import Commit, try_commit
from pipeline.cache.writer import RowToWrite, ShardWriter
from pipeline.storage import Store
from pipeline.types import ShardRef

CODEC = codecs.build("int8")
SETTINGS = {
    "encoder": {"name": "fake"},
    "carver": {"name": "uniform_grid", "options": {}},
    "codec": {"name": "int8", "options": {}},
    "width": 64,
}
IDENTITY = {"fingerprint": "0123456789abcdef", "settings": SETTINGS, "nested": True}


def features(seed: int, *, num_tokens: int = 40, width: int = 64) -> torch.Tensor:
    return torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed))


def make_row(
    key: str, *, seed: int = 0, num_tokens: int = 40, text: str | None = None
) -> RowToWrite:
    generator = np.random.default_rng(seed)
    return RowToWrite(
        key=key,
        content_hash=bytes([seed % 256]) * 16,
        packed=CODEC.pack(features(seed, num_tokens=num_tokens)),
        positions=generator.permutation(100)[:num_tokens].astype(np.uint32),
        sizes=generator.integers(1, 5, num_tokens).astype(np.float32),
        grid=(1, 10, 10),
        image_size=(640, 480),
        columns={"txt": text},
    )


def make_writer(store: Store, shard_id: str, **options: int) -> ShardWriter:
    return ShardWriter(
        store=store,
        shard_id=shard_id,
        attempt=uuid.uuid4().hex,
        columns=("txt",),
        metadata={"settings": SETTINGS},
        **options,
    )


def make_commit(writer: ShardWriter, *, committed_at: float | None = None) -> Commit:
    return Commit(
        shard_id=writer.shard_id,
        shard=ShardRef(url=f"{writer.shard_id}.tar", size=1, etag="e"),
        work_fingerprint="f" * 16,
        attempt=writer.attempt,
        files=tuple(writer.files),
        num_read=0,
        num_written=0,
        rejected={},
        bytes_in=0,
        tokens_full=0,
        tokens_kept=0,
        bytes_tokens=0,
        seconds=0.0,
        committed_at=time.time() if committed_at is None else committed_at,
    )


def commit_rows(
    store: Store,
    shard_id: str,
    rows: Sequence[RowToWrite],
    *,
    commit: Mapping[str, Any] | None = None,
    **options: int,
) -> Commit:
    """Write and commit rows; `commit` replaces fields of the record, `options` of the writer."""
    writer = make_writer(store, shard_id, **options)
    with writer:
        for row in rows:
            writer.write(row)
        writer.finish([])
    return try_commit(store, replace(make_commit(writer), **(commit or {})))
