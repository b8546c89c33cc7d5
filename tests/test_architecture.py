"""Imports point down, libraries stay in their one place, files stay short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pipeline"

LAYERS = (
    {"types", "errors", "fork_lock"},
    {
        "registry",
        "config",
        "storage",
        "byte_queue",
        "heap",
        "stop_signal",
        "run_log",
        "error_budget",
    },
    {"source", "decode", "encoders", "carvers", "codecs", "cache"},
    {"unpacked_rows"},
    {"job", "carved_cache", "run_report", "notify", "command_line", "json_stderr"},
    {"plan", "shard_pipeline", "dataset", "calibration", "status", "rejections"},
    {"carve_shard"},
    {"progress", "consumers", "evaluation", "plugin_table"},
    {"ray_runner"},
    {"demo", "run_command", "kv_prefix_command"},
    {"cli"},
    {"__main__"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Besides what lies below: the evaluation hands tokens to a language model as a user would.
ALSO_SEES = {"evaluation": {"consumers"}}

ONLY_IN = {
    "ray": ("pipeline/ray_runner/",),
    "fsspec": ("pipeline/storage/",),
    "transformers": (
        "pipeline/encoders/",
        "pipeline/consumers/",
        "pipeline/evaluation/",
        "pipeline/demo/",
    ),
    "matplotlib": ("pipeline/evaluation/plots.py",),
    "vllm": ("pipeline/consumers/vllm_ec_connector.py",),
    "webdataset": ("pipeline/source",),
}

FILES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__"
)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def unit(dotted: str) -> str:
    return dotted.split(".")[1]


def own_unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    mine = own_unit(path)

    theirs = {
        unit(name)
        for name in imports(path)
        if name.startswith("pipeline.") and unit(name) in RANK and unit(name) != mine
    }

    above = {name for name in theirs if RANK[name] >= RANK[mine]}
    assert above <= ALSO_SEES.get(mine, set())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_libraries_stay_in_their_place(path: Path) -> None:
    place = str(path.relative_to(ROOT))
    libraries = {name.split(".")[0] for name in imports(path)}

    misplaced = {name for name in libraries & ONLY_IN.keys() if not place.startswith(ONLY_IN[name])}

    assert misplaced == set()


def test_every_module_has_a_layer() -> None:
    units = {own_unit(path) for path in FILES} - {"__init__"}

    assert units <= RANK.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_a_plain_install_is_enough_to_open_a_cache() -> None:
    only_for_tests = ("google_crc32c", "torchdata", "datasets", "polars", "duckdb", "psutil")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({only_for_tests}));"
        "from pipeline import Batch, CarvedDataset, DiskCache, MixedDataset, open_cache"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
