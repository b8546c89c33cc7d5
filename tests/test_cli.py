"""The `carve` command, where it needs no Ray."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from pipeline.cache.commit import claim_identity
from pipeline.cache.snapshot import build_snapshot
from pipeline.cli import app
from pipeline.errors import ExitCode
from pipeline.storage import open_store
from tests.cache.rows import IDENTITY, commit_rows, make_row
from tests.encoders.tiny_models import save_llava
from tests.fakes import write_corpus


def carve(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    store = open_store(str(tmp_path / "cache"))
    claim_identity(store, IDENTITY)
    commit_rows(store, "s", [make_row(f"k{i}", seed=i, num_tokens=5) for i in range(3)])
    build_snapshot(store)
    return tmp_path / "cache"


def test_no_command_waits_for_models_or_a_cluster_that_it_does_not_use() -> None:
    unused = {"transformers", "ray", "torch._dynamo"}
    code = f"import sys; import pipeline.cli; assert not {unused} & sys.modules.keys()"

    subprocess.run([sys.executable, "-c", code], check=True)


def test_plan_counts_and_changes_nothing(tmp_path: Path) -> None:
    save_llava(tmp_path / "model")
    write_corpus(tmp_path / "in", num_shards=3)
    values = {
        "encoder": {"name": "llava", "options": {"model": str(tmp_path / "model")}},
        "carver": {"name": "identity"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))

    result = carve(
        *("plan", "--config", tmp_path / "run.yaml"),
        *("--input", tmp_path / "in", "--output", tmp_path / "cache"),
    )

    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("3 shards: 0 done, 3 to do")
    assert not (tmp_path / "cache").exists()


def test_inspect_shows_the_cache_and_one_image(cache: Path) -> None:
    whole, one = carve("inspect", cache), carve("inspect", cache, "k1")

    assert "1 shards, 3 images" in whole.stdout
    assert "tokens: 15, width 64" in whole.stdout
    assert one.stdout.startswith("k1: 5 of 1 x 10 x 10 tokens of width 64, image 640 x 480")


@pytest.mark.parametrize("arguments", [("inspect", "nowhere"), ("verify", "nowhere")])
def test_a_place_without_a_cache_is_one_line_and_exit_code_2(arguments: tuple[str, str]) -> None:
    result = carve(*arguments)

    assert result.exit_code == ExitCode.CONFIG
    assert result.stderr.startswith("error: ")
    assert "is not a cache" in result.stderr


def test_a_missing_key_is_one_line(cache: Path) -> None:
    result = carve("inspect", cache, "k9")

    assert result.exit_code == ExitCode.CONFIG
    assert result.stderr.startswith("error: no image 'k9' in ")


def test_verify_tells_a_whole_cache_from_a_damaged_one(cache: Path) -> None:
    assert carve("verify", cache).exit_code == 0
    part = next(cache.rglob("part-*.parquet"))
    content = bytearray(part.read_bytes())
    content[len(content) // 3] ^= 0x40
    part.write_bytes(bytes(content))

    result = carve("verify", cache)

    assert result.exit_code == ExitCode.PARTIAL
    assert part.name in result.stderr


def test_list_prints_a_table_and_refuses_unknown_kinds() -> None:
    assert "| `tokencarve` |" in carve("list", "carvers").stdout
    assert carve("list", "cravers").exit_code == ExitCode.CONFIG
