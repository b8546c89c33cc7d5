"""Bad input as a user meets it: one line with place and remedy, the right exit code, no loss."""

import json
import re
import struct
import zlib
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from pipeline import open_cache
from pipeline.cache.commit import claim_identity
from pipeline.cli import app
from pipeline.errors import ExitCode
from pipeline.job import resolve_job
from pipeline.ray_runner import run_job
from pipeline.storage import open_store
from tests.encoders.tiny_models import save_llava, save_vit
from tests.fakes import FakeEncoder, encoded_image, fake_config, write_corpus, write_tar


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_llava(folder / "llava")
    save_vit(folder / "siglip", "siglip")
    return folder


@pytest.fixture
def values(tmp_path: Path, models: Path) -> dict:
    write_corpus(tmp_path / "in", num_shards=1)
    return {
        "input": {"shards": str(tmp_path / "in")},
        "output": {"url": str(tmp_path / "cache")},
        "encoder": {"name": "llava", "options": {"model": str(models / "llava")}},
        "carver": {"name": "tokencarve", "options": {"keep_tokens": 4}},
    }


def carve_run(tmp_path: Path, values: dict) -> tuple[int, str]:
    """Return exit code and what stood on standard error, of a run that must not start Ray."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    result = CliRunner().invoke(app, ["run", "--config", str(path)])
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.output
    return result.exit_code, lines[0]


def test_an_unknown_key_and_an_unknown_carver_are_named_with_the_nearest(
    tmp_path: Path, values: dict
) -> None:
    code, line = carve_run(tmp_path, {**values, "runner": {"batchsize": 3}})
    assert code == ExitCode.CONFIG
    assert "run.yaml: runner.batchsize: unknown key; did you mean 'batch_size'?" in line

    code, line = carve_run(tmp_path, {**values, "carver": {"name": "tokencarv"}})
    assert code == ExitCode.CONFIG
    assert "no carver named 'tokencarv'; did you mean 'tokencarve'?" in line


def test_problems_of_several_plugins_are_named_together(tmp_path: Path, values: dict) -> None:
    bad = {"carver": {"name": "tokencarve", "options": {"keep_tokens": 0}}, "codec": {"name": "x"}}

    code, line = carve_run(tmp_path, {**values, **bad})

    assert code == ExitCode.CONFIG
    assert "keep_tokens" in line
    assert "no codec named 'x'" in line


def test_a_signal_the_encoder_cannot_give_is_named_before_anything_starts(
    tmp_path: Path, values: dict, models: Path
) -> None:
    encoder = {"name": "vit", "options": {"model": str(models / "siglip")}}

    code, line = carve_run(tmp_path, {**values, "encoder": encoder})

    assert code == ExitCode.CONFIG
    assert "carver 'tokencarve' needs cls_attention, which encoder 'vit' cannot give" in line
    assert "change the carver's options or the encoder" in line


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"input": {"columns": ["packed"]}}, "packed is a column of the cache itself"),
        ({"input": {"columns": ["aux"]}}, "aux is a column of the cache itself"),
        ({"input": {"max_megapixels": float("inf")}}, "input.max_megapixels"),
        ({"input": {"max_megapixels": 1e-9}}, "input.max_megapixels"),
        ({"runner": {"heartbeat_s": float("inf")}}, "runner.heartbeat_s"),
    ],
)
def test_values_that_cannot_be_are_named_before_anything_starts(
    tmp_path: Path, values: dict, section: dict, problem: str
) -> None:
    (name,) = section
    code, line = carve_run(tmp_path, {**values, name: {**values.get(name, {}), **section[name]}})

    assert code == ExitCode.CONFIG
    assert problem in line


def test_a_model_that_is_not_there_is_named(tmp_path: Path, values: dict) -> None:
    encoder = {"name": "llava", "options": {"model": str(tmp_path / "nowhere")}}

    code, line = carve_run(tmp_path, {**values, "encoder": encoder})

    assert code == ExitCode.CONFIG
    assert str(tmp_path / "nowhere") in line


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path, values: dict) -> None:
    (tmp_path / "file").write_text("in the way")

    code, line = carve_run(tmp_path, {**values, "output": {"url": str(tmp_path / "file" / "c")}})

    assert code == ExitCode.CONFIG
    assert str(tmp_path / "file" / "c") in line


def test_an_output_of_another_run_is_refused_and_left_alone(tmp_path: Path, values: dict) -> None:
    store = open_store(values["output"]["url"])
    config = fake_config(values["input"]["shards"], values["output"]["url"])
    claim_identity(store, resolve_job(config, encoder=FakeEncoder()).identity)
    before = store.read("carve.json")

    code, line = carve_run(tmp_path, values)

    assert code == ExitCode.CONFIG
    assert "made with other settings" in line
    assert "carver.name: 'uniform_grid' there, 'tokencarve' here" in line
    assert store.read("carve.json") == before
    planned = CliRunner().invoke(app, ["plan", "--config", str(tmp_path / "run.yaml")])
    assert planned.exit_code == ExitCode.CONFIG
    assert "made with other settings" in planned.stderr


@pytest.mark.parametrize("shards", ["nowhere/*.tar", "nowhere.tar", "missing-{0..3}.tar"])
def test_an_input_that_is_not_there_is_named(tmp_path: Path, values: dict, shards: str) -> None:
    code, line = carve_run(tmp_path, {**values, "input": {"shards": str(tmp_path / shards)}})

    assert code == ExitCode.CONFIG
    assert re.search(r"nowhere|missing", line)


def large_png(width: int, height: int) -> bytes:
    """Return a PNG that claims a size; its few pixels would be found missing only by decoding."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 + 3 * 100))
    return b"".join(
        (b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    )


def write_bad_corpus(folder: Path) -> None:
    """Write two good shards, a mixed one, and every kind of broken one."""
    write_corpus(folder, num_shards=2, num_images=5)
    whole = encoded_image(7)
    good = [(f"m{i}.jpg", encoded_image(i)) for i in range(9)]
    bad = [
        ("zero.jpg", b""),
        ("half.jpg", whole[: len(whole) // 2]),
        ("giant.png", large_png(50_000, 50_000)),
        ("text.jpg", b"just some text"),
        ("lonely.txt", b"no image"),
        ("m0.jpg", whole),  # again, not beside the first
    ]
    write_tar(folder / "mixed.tar", [*good, *bad])
    write_tar(folder / "empty.tar", [])
    write_tar(folder / "twin.tar", [("s0-i000.jpg", whole), ("twin.jpg", whole)])
    source = write_tar(folder / "source", [("a.jpg", whole), ("b.jpg", whole)]).read_bytes()
    (folder / "source").unlink()
    member = 512 + -(-len(whole) // 512) * 512
    (folder / "cut-boundary.tar").write_bytes(source[:member])
    (folder / "cut-header.tar").write_bytes(source[: member + 200])
    (folder / "cut-payload.tar").write_bytes(source[: member + 512 + 100])
    (folder / "zero-bytes.tar").write_bytes(b"")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_every_kind_of_broken_input_is_reported_and_costs_nothing_else(tmp_path: Path) -> None:
    write_bad_corpus(tmp_path / "in")
    config = fake_config(tmp_path / "in", tmp_path / "cache")

    report = run_job(resolve_job(config, encoder=FakeEncoder()))

    assert report.exit_code == ExitCode.PARTIAL
    assert {(Path(f.shard).name, f.reason) for f in report.failed} == {
        ("cut-boundary.tar", "truncated"),
        ("cut-header.tar", "truncated"),
        ("cut-payload.tar", "truncated"),
        ("zero-bytes.tar", "empty"),
    }
    assert all("\n" not in f.message and f.shard in f.message for f in report.failed)
    assert report.num_rejected == {
        "empty_image": 1,
        "corrupt_image": 1,
        "too_many_pixels": 1,
        "not_an_image": 1,
        "no_image": 1,
        "duplicate_key": 1,
    }
    cache = open_cache(str(tmp_path / "cache"))
    expected = {f"s{s}-i{i:03d}" for s in range(2) for i in range(5)}
    expected |= {f"m{i}" for i in range(9)} | {"twin"}
    assert set(cache.keys()) == expected
    assert cache.reader.snapshot.num_duplicates == 1
    (failures,) = (tmp_path / "cache" / "runs").glob("*/failures.parquet")
    assert pq.read_table(failures).num_rows == 4
    (errors,) = (tmp_path / "cache" / "data").glob("mixed-*/*/errors.parquet")
    assert {r["key"]: r["reason"] for r in pq.read_table(errors).to_pylist()} == {
        "zero": "empty_image",
        "half": "corrupt_image",
        "giant": "too_many_pixels",
        "text": "not_an_image",
        "lonely": "no_image",
        "m0": "duplicate_key",
    }
    (summary,) = (tmp_path / "cache" / "runs").glob("*/summary.json")
    assert json.loads(summary.read_text())["exit_code"] == 3
