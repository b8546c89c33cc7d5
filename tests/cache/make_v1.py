"""Make the version-1 caches of `tests/data/cache_v1`: `python -m tests.cache.make_v1`.

Those of a codec were made once and are never made again: that they still open is what the test is
for. Only codecs that have none yet get theirs.
"""

from pathlib import Path

from safetensors.torch import save_file

from pipeline import codecs, open_cache
from pipeline.cache.commit import claim_identity
from pipeline.cache.snapshot import build_snapshot
from pipeline.storage import open_store
from tests.cache import rows

FOLDER = Path(__file__).parent.parent / "data" / "cache_v1"
CODECS = (
    *("bf16", "fp16", "fp32", "int8"),
    *("int4", "int3", "int2", "int8_channel", "int4_channel", "mixed", "gear"),
)


def main() -> None:
    for name in CODECS:
        if (FOLDER / name).exists():
            continue
        rows.CODEC = codecs.build(name)
        settings = {**rows.SETTINGS, "codec": {"name": name, "options": {}}}
        store = open_store(str(FOLDER / name))
        claim_identity(store, {**rows.IDENTITY, "settings": settings})
        made = [rows.make_row(f"k{i}", seed=i, num_tokens=17 + i, text=f"t{i}") for i in range(4)]
        rows.commit_rows(store, "a", made[:3], row_group_bytes=2000)
        rows.commit_rows(store, "b", made[3:])
        build_snapshot(store)
        cache = open_cache(str(FOLDER / name))
        expected = {
            f"{key}.{field}": getattr(cache[key], field).contiguous()
            for key in cache.keys()  # noqa: SIM118  (a cache is no dict)
            for field in ("features", "positions", "sizes", "ranks")
        }
        save_file(expected, FOLDER / f"{name}.safetensors")


if __name__ == "__main__":
    main()
