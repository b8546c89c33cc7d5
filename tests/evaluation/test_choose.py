"""`carve choose`: from an evaluation of a sample to the config of a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from pipeline.cli import app
from pipeline.config import load_config, parse_config
from pipeline.errors import ExitCode
from pipeline.evaluation.choose import (
    Candidate,
    best,
    choose,
    chosen_config,
    evidence,
    list_candidates,
)
from pipeline.job import resolve_job
from tests.evaluation.corpora import TEMPLATE, write_images
from tests.evaluation.models import save_model


def row(carver: str, size: float, agreement: tuple[float, float], **values: Any) -> dict[str, Any]:
    mean, low = agreement
    budget = values.pop("budget", 0.25)
    return {
        "carver": carver,
        "carver_options": json.dumps(values.pop("options", {})),
        "budget": budget,
        "read": values.pop("read", budget),
        "codec": values.pop("codec", "int8"),
        "codec_options": "{}",
        "placement": "packed",
        "family": values.pop("family", "all"),
        "tokens": {"mean": 4.0},
        "bytes": {"mean": size},
        "bytes_per_jpeg": {"mean": size / 1000},
        "agreement": {
            "mean": mean,
            "low": low,
            "high": 1.0,
            "images": values.pop("images", 500),
        },
    }


def candidates(*rows: dict[str, Any]) -> list[Candidate]:
    return list_candidates({"variants": rows})


def test_the_cheapest_whose_lower_bound_meets_the_wish_is_chosen_not_its_mean() -> None:
    found = candidates(
        row("identity", 9000, (1.0, 1.0), codec="fp32", budget=1.0),
        row("tokencarve", 900, (0.995, 0.985)),
        row("divprune", 500, (0.99, 0.97)),
        row("random", 300, (0.5, 0.4)),
        row("tokencarve", 1500, (0.999, 0.99), codec="bf16"),
    )

    chosen = choose(found, 0.98)

    assert chosen is not None and (chosen.carver, chosen.bytes) == ("tokencarve", 900)
    assert [c.bytes for c in found] == [300, 500, 900, 1500]  # the reference is none of them
    assert choose(found, 0.97).carver == "divprune"  # type: ignore[union-attr]


def test_reads_and_families_are_no_candidates() -> None:
    found = candidates(
        row("divprune", 100, (1.0, 1.0), budget=0.5, read=0.25),
        row("divprune", 100, (1.0, 1.0), family="count"),
        row("divprune", 500, (0.9, 0.8)),
    )

    assert [c.bytes for c in found] == [500]


def test_few_images_show_little_even_if_all_agree() -> None:
    many, few, one = candidates(
        row("divprune", 1, (1.0, 1.0), images=500),
        row("random", 2, (1.0, 1.0), images=64),
        row("tome", 3, (1.0, float("nan")), images=1),
    )

    assert many.bound == pytest.approx(0.025 ** (1 / 500)) and many.bound > 0.99
    assert few.bound == pytest.approx(0.944, abs=1e-3)
    assert one.bound == 0
    assert choose([one, few], 0.98) is None and best([one, few]) is few


def test_the_config_is_the_run_with_carver_and_codec_replaced() -> None:
    run = parse_config(
        {
            "input": {"shards": "a.tar"},
            "output": {"url": "out"},
            "encoder": {"name": "llava", "options": {"model": "m"}},
            "carver": {"name": "identity"},
        }
    )
    (chosen,) = candidates(
        row("adaptive", 5, (1.0, 1.0), options={"carver": "divprune"}, codec="int4", budget=2 / 9)
    )

    written = parse_config(yaml.safe_load(chosen_config(run, chosen)))

    assert written.carver.options == {"carver": "divprune", "mean_ratio": 2 / 9}
    assert (written.carver.name, written.codec.name) == ("adaptive", "int4")
    assert written.model_dump(exclude={"carver", "codec"}) == run.model_dump(
        exclude={"carver", "codec"}
    )


def test_the_evidence_shows_every_candidate_and_which_meet_the_wish() -> None:
    head, good, bad = evidence(
        candidates(row("tome", 5, (1.0, 0.99)), row("random", 7, (0.5, 0.4))), 0.9
    )

    assert "agreement" in head
    assert good.split()[:2] == ["meets", "tome"] and "[ 99.0%, 100.0%]" in good
    assert bad.split()[0] == "random" and "50.0%" in bad


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_model(folder / "model")
    shard = write_images(folder / "in", num_images=6)
    values = {
        "input": {"shards": str(shard)},
        "output": {"url": str(folder / "cache")},
        "encoder": {
            "name": "llava",
            "options": {"model": str(folder / "model"), "stage": "projected"},
        },
        "carver": {"name": "identity"},
        "runner": {"batch_size": 3},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


def carve_choose(run_file: Path, *arguments: object) -> Result:
    return CliRunner().invoke(
        app,
        [
            *("choose", "--config", str(run_file), "--template", TEMPLATE),
            *("--prompts", "how many dogs ?", "--carvers", "divprune", "--budgets", "1/2,1/4"),
            *map(str, arguments),
        ],
    )


def test_a_modest_wish_is_met_and_its_config_runs(run_file: Path, tmp_path: Path) -> None:
    result = carve_choose(run_file, "--keep-agreement", "0.1", "--results", tmp_path / "out")

    assert result.exit_code == 0, result.output
    assert "6 images, 6 questions" in result.stdout
    assert "chosen: " in result.stdout
    job = resolve_job(load_config(tmp_path / "out" / "run.yaml"))
    assert f"chosen: {job.config.carver.name}" in result.stdout
    assert job.config.encoder == load_config(run_file).encoder


@pytest.mark.slow
def test_a_wish_that_nothing_meets_is_said_and_ends_with_3(run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.yaml").write_text("of an earlier wish")

    result = carve_choose(run_file, "--keep-agreement", "0.98", "--results", tmp_path / "out")

    assert result.exit_code == ExitCode.PARTIAL
    assert "nothing keeps 98.0% of the answers for sure; the best is " in result.stderr
    assert not (tmp_path / "out" / "run.yaml").exists()


def test_results_do_not_go_into_the_cache(run_file: Path) -> None:
    result = carve_choose(run_file, "--results", run_file.parent / "cache")

    assert result.exit_code == ExitCode.CONFIG
    assert "is the folder of the run's cache" in result.stderr
