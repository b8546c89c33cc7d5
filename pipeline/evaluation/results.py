"""The tables of an evaluation: what their columns are, and how they are written and read."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import CacheFormatError, ConfigError
from pipeline.evaluation.variants import Variant

ANSWERS_FILE, IMAGES_FILE, SUMMARY_FILE = "answers.parquet", "images.parquet", "summary.json"

FORMAT_VERSION = 1

_VARIANT = [
    pa.field("carver", pa.string(), nullable=False),
    pa.field("carver_options", pa.string(), nullable=False),  # JSON, sorted; without the budget
    pa.field("budget", pa.float64(), nullable=False),  # share of the tokens asked for; 1.0 = full
    pa.field("read", pa.float64(), nullable=False),  # share read; budget unless a prefix is read
    pa.field("codec", pa.string(), nullable=False),
    pa.field("codec_options", pa.string(), nullable=False),  # JSON, sorted
    pa.field("placement", pa.string(), nullable=False),  # packed, original, weighted
    pa.field("tokens", pa.int32(), nullable=False),  # kept and read
    # What a reader of the cache fetches of this image: packed tokens, whole checksum blocks of
    # them, and the row's aux (codec's own, positions, sizes, checksums).
    pa.field("bytes", pa.int64(), nullable=False),
]

VARIANT_COLUMNS = tuple(field.name for field in _VARIANT[:7])
"""Columns that name a variant."""

ANSWERS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("prompt_index", pa.int32(), nullable=False),
        pa.field("family", pa.string(), nullable=False),  # "" if unknown
        *_VARIANT,
        pa.field("agrees", pa.bool_(), nullable=False),  # greedy answer equals that of full tokens
        pa.field("correct", pa.bool_()),  # equals the given answer; null where none is given
        pa.field("full_correct", pa.bool_()),  # likewise, of full uncompressed tokens
        pa.field("kl", pa.float64(), nullable=False),  # nats, KL(full || this), first token
        pa.field("cosine", pa.float64(), nullable=False),  # of last hidden states, to full tokens
        pa.field("answer", pa.string(), nullable=False),
    ],
    metadata={"carvecache.evaluation": str(FORMAT_VERSION)},
)
"""One row per (image, question, variant)."""

IMAGES = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        *_VARIANT,
        pa.field("jpeg_bytes", pa.int64(), nullable=False),  # the input image, whatever its format
        pa.field("effective_rank", pa.float64(), nullable=False),
        pa.field("effective_rank_full", pa.float64(), nullable=False),
        pa.field("spectrum_share", pa.float64(), nullable=False),
        pa.field("carve_s", pa.float64(), nullable=False),  # batch time / images of the batch
        pa.field("overlap_jpeg", pa.float64()),  # null beyond the first `stability_images`
        pa.field("overlap_shift", pa.float64()),
        pa.field("overlap_noise", pa.float64()),
        pa.field("kept_positions", pa.list_(pa.int32())),  # ascending; of the first images only
        pa.field("kept_sizes", pa.list_(pa.float32())),  # source tokens that each stands for
    ],
    metadata={"carvecache.evaluation": str(FORMAT_VERSION)},
)
"""One row per (image, variant)."""


class ResultWriter:
    """Writes the tables of one evaluation; a context manager that leaves none on an error.

    Args:
        folder: made if it does not exist; results in it are replaced when all is measured.
    """

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"output={str(folder)!r} is a file: give a folder")
        folder.mkdir(parents=True, exist_ok=True)
        self._targets = [folder / ANSWERS_FILE, folder / IMAGES_FILE]
        self._parts = [path.with_name(f"{path.name}.part") for path in self._targets]
        self._writers = [
            pq.ParquetWriter(path, schema, compression="zstd")
            for path, schema in zip(self._parts, (ANSWERS, IMAGES), strict=True)
        ]

    def write(self, answers: pa.Table, images: pa.Table) -> None:
        """Append the rows of one batch."""
        for writer, table in zip(self._writers, (answers, images), strict=True):
            writer.write_table(table)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the files; give them their names if all went well, else remove them."""
        for writer in self._writers:
            writer.close()
        for part, target in zip(self._parts, self._targets, strict=True):
            if kind is None:
                part.replace(target)
            else:
                part.unlink()


def variant_columns(variant: Variant, num_rows: int) -> dict[str, pa.Array]:
    """Return the columns that name a variant, for rows that all belong to it."""
    values = asdict(variant)
    return {
        name: pa.repeat(pa.scalar(values[name], ANSWERS.field(name).type), num_rows)
        for name in VARIANT_COLUMNS
    }


def read_tables(folder: str | Path) -> tuple[pa.Table, pa.Table]:
    """Return (answers, images) of an evaluation.

    Raises:
        CacheFormatError: the folder holds no results, or those of another version.
    """
    tables = []
    for name in (ANSWERS_FILE, IMAGES_FILE):
        path = Path(folder) / name
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowInvalid) as err:
            raise CacheFormatError(f"{path}: no results of an evaluation: {err}") from err
        version = (table.schema.metadata or {}).get(b"carvecache.evaluation", b"none").decode()
        if version != str(FORMAT_VERSION):
            raise CacheFormatError(
                f"{path}: results of version {version}, this package reads {FORMAT_VERSION}"
            )
        tables.append(table)
    return tables[0], tables[1]


def write_summary(folder: str | Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`; numbers that are not defined become null."""
    text = json.dumps(_plain(summary), indent=1, allow_nan=False) + "\n"
    (Path(folder) / SUMMARY_FILE).write_text(text, encoding="utf-8")


def read_summary(folder: str | Path) -> dict[str, Any]:
    """Return what `write_summary` wrote.

    Raises:
        CacheFormatError: there is no summary, or it is not JSON.
    """
    path = Path(folder) / SUMMARY_FILE
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise CacheFormatError(f"{path}: no summary of an evaluation: {err}") from err
    return content


def _plain(value: Any) -> Any:  # noqa: ANN401  (any JSON value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
