"""Make the caches of `tests/data/cache_v<version>`: `python -m tests.cache.golden_caches`.

Those of a version and codec were made once and are never made again: that they still open is what
the test is for. Only codecs that have none yet get theirs, in the version of today.
"""

from pathlib import Path

from safetensors.torch import save_file

from pipeline import codecs, open_cache
from pipeline.cache.commit import claim_identity
from pipeline.cache.snapshot import build_snapshot
from pipeline.storage import open_store
from tests.cache import rows

DATA = Path(__file__).parent.parent / "data"
CODECS = (
    *("bf16", "fp16", "fp32", "int8"),
    *("int4", "int3", "int2", "int8_channel", "int4_channel", "mixed", "gear"),
)
CACHES = [*((1, codec) for codec in CODECS), *((2, codec) for codec in ("int8", "int4", "gear"))]


def folder(version: int) -> Path:
    """Return where the caches of a version lie."""
    return DATA / f"cache_v{version}"


def main() -> None:
    for version, name in CACHES:
        path = folder(version) / name
        if path.exists():
            continue
        rows.CODEC = codecs.build(name)
        settings = {**rows.SETTINGS, "codec": {"name": name, "options": {}}}
        store = open_store(str(path))
        claim_identity(store, {**rows.IDENTITY, "settings": settings})
        made = [rows.make_row(f"k{i}", seed=i, num_tokens=17 + i, text=f"t{i}") for i in range(4)]
        rows.commit_rows(store, "a", made[:3], row_group_bytes=2000)
        rows.commit_rows(store, "b", made[3:])
        build_snapshot(store)
        cache = open_cache(str(path))
        expected = {
            f"{key}.{field}": getattr(cache[key], field).contiguous()
            for key in cache.keys()  # noqa: SIM118  (a cache is no dict)
            for field in ("features", "positions", "sizes", "ranks")
        }
        save_file(expected, folder(version) / f"{name}.safetensors")


if __name__ == "__main__":
    main()
