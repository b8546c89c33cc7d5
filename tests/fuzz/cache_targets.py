"""Parts, tables and records of a cache, damaged by accident or sealed by an attacker.

Damage by accident must give an error by name, or the values that were written. Damage whose
checksums were all made anew must give an error by name or well-formed values.
"""

import json
import struct
from collections.abc import Mapping
from random import Random
from typing import Any

import pyarrow as pa

from pipeline.cache import layout, parquet
from pipeline.cache.record import dump_record, parse_record
from pipeline.errors import KeyNotFoundError, PipelineError
from tests.fuzz.cache_target import CacheTarget, Change, expect
from tests.fuzz.mutation import damage
from tests.fuzz.target import BrokenPromiseError


class PartTarget(CacheTarget):
    """Parts: mostly through the whole reader, at times Arrow alone, without any checksum."""

    name = "part"

    def mutated(self, random: Random) -> Change | bytes:
        parts = self.paths(".parquet")
        parts = [path for path in parts if "/part-" in path]
        path = random.choice(parts)
        if random.random() < 0.05:
            other = random.choice(parts)
            return Change(path=path, content=self.whole[other])
        content = self.whole[path]
        others = [self.whole[part] for part in parts]
        changed = _damage_parquet(content, random, others)
        return changed if random.random() < 0.5 else Change(path=path, content=changed)

    def check(self, made: Change | bytes) -> str:
        if isinstance(made, Change):
            return super().check(made)
        part = parquet.open_part(pa.BufferReader(made), where="part", check_pages=False)
        for group in range(part.num_row_groups):
            with parquet.parsing("part"):
                table = part.read_row_group(group)
                table.validate(full=True)
                table.to_pylist()
        return "parsed"


class TableTarget(CacheTarget):
    """Indexes, tables of snapshots, errors and failures; at times without their SHA-256."""

    name = "table"

    def mutated(self, random: Random) -> Change | tuple[str, bytes]:
        tables = [path for path in self.paths(".parquet") if "/part-" not in path]
        path = random.choice(tables)
        others = [self.whole[table] for table in tables]
        if random.random() < 0.05:
            changed = random.choice(others)
        else:
            changed = _damage_parquet(self.whole[path], random, others)
        if random.random() < 0.5:
            return path, changed
        return Change(path=path, content=changed, without_snapshot=random.random() < 0.5)

    def check(self, made: Change | tuple[str, bytes]) -> str:
        if isinstance(made, Change):
            return super().check(made)
        path, content = made
        for schema in _SCHEMAS:
            if path.rsplit("/", 1)[-1].startswith(schema):
                table = parquet.read_table(content, _SCHEMAS[schema], where="table")
                expect(table.schema.equals(_SCHEMAS[schema]), "schema")
                table.to_pylist()
        return "parsed"


_SCHEMAS: Mapping[str, pa.Schema] = {
    "index": layout.INDEX_SCHEMA,
    "files": layout.FILES_SCHEMA,
    "errors": layout.ERRORS_SCHEMA,
    "failures": layout.FAILURES_SCHEMA,
}


class RecordTarget(CacheTarget):
    """Commits, `carve.json`, `snapshot.json`, summaries; at times with a good checksum."""

    name = "record"

    def mutated(self, random: Random) -> Change:
        records = self.paths(".json")
        path = random.choice(records)
        content = self.whole[path]
        choice = random.random()
        if choice < 0.1:
            changed = self.whole[random.choice(records)]
        elif choice < 0.5:
            changed = damage(content, random, others=[self.whole[r] for r in records])
        else:
            values = _change_json(json.loads(content), random)
            is_sealed = choice < 0.8 and isinstance(values, dict)
            changed = _sealed(values) if is_sealed else json.dumps(values).encode()
        return Change(path=path, content=changed, without_snapshot=random.random() < 0.5)

    def check(self, made: Change) -> str:
        # With a good checksum it is another cache, of which nothing is known but that it is one.
        self.is_sealed = _is_sealed(made.content)
        if not self.is_sealed or made.content == self.whole[made.path]:
            self.is_sealed = False
            return super().check(made)
        try:
            return f"sealed: {super().check(made)}"
        except (BrokenPromiseError, KeyNotFoundError):
            return "sealed: other values"


def _damage_parquet(content: bytes, random: Random, others: list[bytes]) -> bytes:
    """Damage pages, or the footer alone: it is small and decides everything."""
    choice = random.random()
    (length,) = struct.unpack("<I", content[-8:-4])
    start = len(content) - 8 - length
    if choice < 0.4:
        return damage(content, random, others=others)
    if choice < 0.5:
        other = random.choice(others)
        (taken,) = struct.unpack("<I", other[-8:-4])
        return content[:start] + other[-8 - taken :]
    footer = damage(content[start:-8], random)
    if random.random() < 0.8:  # with its length made anew
        return content[:start] + footer + struct.pack("<I", len(footer)) + b"PAR1"
    return content[:start] + footer + content[-8:]


_ODD_VALUES = (
    *(
        None,
        True,
        -1,
        0,
        1,
        2**31,
        2**63,
        10**30,
        1e308,
        "",
        "../../x",
        "/etc/passwd",
        "a\0b",
        "\ud800",
    ),
    *([], {}, [[]], [1], {"a": 1}, "x" * 1000),
)


def _change_json(value: Any, random: Random) -> Any:
    """Change, drop, rename or exchange one value at any depth."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = random.choice(sorted(value))
        choice = random.random()
        if choice < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if choice < 0.2:
            return {(k + "_" if k == key else k): v for k, v in value.items()}
        if choice < 0.3:
            return {**value, key: value[random.choice(sorted(value))]}
        return {**value, key: _change_json(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.85:
        place = random.randrange(len(value))
        if random.random() < 0.2:
            return [*value, value[place]] if random.random() < 0.5 else value[:place]
        return [*value[:place], _change_json(value[place], random), *value[place + 1 :]]
    if isinstance(value, str) and value and random.random() < 0.4:
        place = random.randrange(len(value))
        return value[:place] + random.choice("0f9zZ/.-\u00e9") + value[place + 1 :]
    if isinstance(value, int) and random.random() < 0.5:
        return value + random.choice((-1, 1, 1000))
    return random.choice(_ODD_VALUES)


def _sealed(values: dict[str, Any]) -> bytes:
    rest = {k: v for k, v in values.items() if k not in ("checksum", "format_version")}
    try:
        return dump_record(rest)
    except UnicodeEncodeError:
        return json.dumps(values).encode()


def _is_sealed(content: bytes) -> bool:
    try:
        parse_record(content, where="record")
    except PipelineError:
        return False
    return True
