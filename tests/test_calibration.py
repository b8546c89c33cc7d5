"""`carve calibrate`: a sample of the corpus sets the options that depend on it."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from pipeline.calibration import CorpusSample, calibrate, read_sample
from pipeline.cli import app
from pipeline.config import parse_config
from pipeline.decode import decode_image
from pipeline.encoders import Pixels
from pipeline.errors import ConfigError, ExitCode
from pipeline.job import Job, resolve_job
from pipeline.types import VisualTokens
from tests.encoders.tiny_models import save_llava
from tests.fakes import FakeEncoder, encoded_image, fake_config, write_corpus, write_tar

ADAPTIVE = {"name": "adaptive", "options": {"carver": "uniform_grid", "mean_tokens": 24}}


def make_job(corpus: Path, *, encoder: FakeEncoder | None = None, **sections: object) -> Job:
    sections = {"carver": ADAPTIVE, **sections}
    config = fake_config(corpus, corpus.parent / "cache", **sections)
    return resolve_job(config, encoder=encoder or FakeEncoder(side=8, dim=24))


def plain(job: Job) -> VisualTokens:
    """Return the tokens of the whole input, encoded at once."""
    encoder = FakeEncoder(side=8, dim=24)
    encoder.load(signals=job.carver.needs)
    samples, _ = read_sample(job, 10**6)
    pixels = [decode_image(s.image, key=s.key, options=job.decode) for s in samples]
    return encoder.encode(pixels)[0]


def test_it_sets_what_the_carver_sets_from_the_same_tokens(tmp_path: Path) -> None:
    job = make_job(write_corpus(tmp_path / "in", num_shards=3, num_images=5))

    result = calibrate(job, num_samples=99, device="cpu")

    assert result.carver == job.carver.calibrated([plain(job)])
    assert result.num_images == 15
    assert result.changed == {"mean_rank"}
    assert result.options == {**ADAPTIVE["options"], "mean_rank": result.carver.mean_rank}
    assert result.kept_before == pytest.approx(24 / 64)
    assert result.kept_after == pytest.approx(24 / 64, abs=0.01)
    kept = [len(r.positions) for r in result.carver.carve(plain(job))]
    assert result.kept_after == pytest.approx(np.mean(kept) / 64)
    assert len(set(kept)) > 1


def test_a_carver_without_such_options_is_returned_as_it_is(tmp_path: Path) -> None:
    carver = {"name": "uniform_grid", "options": {"keep_tokens": 4}}
    job = make_job(write_corpus(tmp_path / "in"), carver=carver)

    result = calibrate(job, num_samples=4, device="cpu")

    assert result.carver is job.carver
    assert (result.changed, result.options) == (frozenset(), {"keep_tokens": 4})
    assert result.kept_before == result.kept_after == 4 / 64


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_neither_batches_nor_a_second_call_change_the_result(
    tmp_path: Path, batch_size: int
) -> None:
    corpus = write_corpus(tmp_path / "in", num_shards=2, num_images=6)
    runner = {"num_actors": 1, "gpus_per_actor": 0, "batch_size": batch_size}

    first = calibrate(make_job(corpus, runner=runner), num_samples=9, device="cpu")
    second = calibrate(make_job(corpus), num_samples=9, device="cpu")

    assert first == second


@pytest.mark.parametrize(
    ("count", "keys"),
    [
        (1, ["s2-i000"]),
        (2, ["s1-i000", "s3-i000"]),
        (5, [f"s{s}-i000" for s in range(5)]),
        (7, ["s0-i000", "s1-i000", "s2-i000", "s2-i001", "s3-i000", "s4-i000", "s4-i001"]),
        (99, [f"s{s}-i{i:03d}" for s in range(5) for i in range(3)]),
    ],
)
def test_the_sample_is_spread_evenly_over_the_shards(
    tmp_path: Path, count: int, keys: list[str]
) -> None:
    job = make_job(write_corpus(tmp_path / "in", num_shards=5, num_images=3))

    samples, _ = read_sample(job, count)

    assert [sample.key for sample in samples] == keys


def test_shards_with_too_few_images_leave_their_share_to_the_next(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "a.tar", [("a0.txt", b"no image")])
    write_tar(tmp_path / "in" / "b.tar", [(f"b{i}.jpg", encoded_image(i)) for i in range(9)])

    samples, rejected = read_sample(make_job(tmp_path / "in"), 6)

    assert [sample.key for sample in samples] == [f"b{i}" for i in range(6)]
    assert rejected == {"no_image": 1}


class SometimesNan(FakeEncoder):
    """Gives NaN for images whose first pixel is dark."""

    def encode_pixels(self, prepared: list[Pixels]) -> list[VisualTokens]:
        groups = super().encode_pixels(prepared)
        for features, pixels in zip(groups[0].features, prepared, strict=True):
            if pixels[0, 0, 0] == 0:
                features[2, 3] = torch.nan
        return groups


def black_corner(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(1, 256, (32, 32, 3), dtype=np.uint8)
    pixels[:8, :8] = 0
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def test_images_that_cannot_be_used_are_left_out_and_counted_once(tmp_path: Path) -> None:
    members = [(f"good{i}.jpg", encoded_image(i)) for i in range(6)]
    members.insert(1, ("torn.jpg", encoded_image(3)[:200]))
    members.insert(4, ("dark.png", black_corner(1)))
    corpus = write_tar(tmp_path / "in" / "a.tar", members).parent
    job = make_job(corpus, encoder=SometimesNan(side=8, dim=24))
    clean = write_tar(tmp_path / "clean" / "a.tar", [m for m in members if "good" in m[0]]).parent

    result = calibrate(job, num_samples=20, device="cpu")

    assert result.num_images == 6
    assert sorted(result.rejected.values()) == [1, 1]
    assert result.rejected["non_finite"] == 1
    assert result.carver == calibrate(make_job(clean), num_samples=20, device="cpu").carver


def test_a_corpus_without_a_usable_image_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    corpus = write_tar(tmp_path / "in" / "a.tar", [("x.jpg", b"no picture")]).parent

    with pytest.raises(ConfigError, match=r"no image of the sample can be used \(\w+ 1\)"):
        calibrate(make_job(corpus), num_samples=5, device="cpu")


def test_the_sample_gives_the_same_tokens_in_every_pass(tmp_path: Path) -> None:
    job = make_job(write_corpus(tmp_path / "in", num_shards=1, num_images=6))
    job.encoder.load(signals=job.carver.needs)
    sample = CorpusSample(job=job, samples=read_sample(job, 6)[0])

    first, second = list(sample), list(sample)

    assert [len(tokens.features) for tokens in first] == [4, 2]
    for left, right in zip(first, second, strict=True):
        assert torch.equal(left.features, right.features)


def test_the_command_prints_a_carver_section_that_a_run_can_use(tmp_path: Path) -> None:
    save_llava(tmp_path / "model")
    write_corpus(tmp_path / "in", num_shards=2, num_images=4)
    values = {
        "input": {"shards": str(tmp_path / "in")},
        "output": {"url": str(tmp_path / "cache")},
        "encoder": {"name": "llava", "options": {"model": str(tmp_path / "model")}},
        "carver": {"name": "doc_correlation", "options": {"max_similar": 1, "target_ratio": 0.5}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))

    result = CliRunner().invoke(
        app, ["calibrate", "--config", str(tmp_path / "run.yaml"), "--samples", "6"]
    )

    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("# 6 images keep 0.")
    section = yaml.safe_load(result.stdout)["carver"]
    assert section["name"] == "doc_correlation"
    assert section["options"].keys() == {"max_similar", "target_ratio", "epsilon"}
    job = resolve_job(parse_config({**values, "carver": section}))
    assert job.carver.epsilon == section["options"]["epsilon"] != 0.9
    words = result.stdout.splitlines()[0].split()
    after, before = (float(word) for word in words if word.startswith(("0.", "1.")))
    assert abs(after - 0.5) < abs(before - 0.5)
    assert not (tmp_path / "cache").exists()


def test_the_command_reports_a_wrong_input_in_one_line(tmp_path: Path) -> None:
    save_llava(tmp_path / "model")
    values = {
        "encoder": {"name": "llava", "options": {"model": str(tmp_path / "model")}},
        "carver": {"name": "adaptive"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))

    result = CliRunner().invoke(
        app,
        [
            *("calibrate", "--config", str(tmp_path / "run.yaml")),
            *("--input", str(tmp_path / "nowhere.tar"), "--output", str(tmp_path / "cache")),
        ],
    )

    assert result.exit_code == ExitCode.CONFIG
    assert result.stderr.splitlines()[-1].startswith("error: no shards found for ")
