"""`carve evaluate`, as a user calls it."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from pipeline.cli import app
from pipeline.errors import ExitCode
from pipeline.evaluation import read_summary, read_tables
from tests.evaluation.corpora import TEMPLATE, config, write_images
from tests.evaluation.models import save_model
from tests.fakes import encoded_image


def carve(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    return path


def test_a_folder_of_images_is_evaluated_by_options_alone(tmp_path: Path, model: Path) -> None:
    (tmp_path / "in").mkdir()
    for place in range(4):
        (tmp_path / "in" / f"p{place}.png").write_bytes(encoded_image(place, kind="PNG"))
    (tmp_path / "in" / "notes.txt").write_text("no image")

    result = carve(
        *("evaluate", "--model", model, "--images", tmp_path / "in", "--output", tmp_path / "out"),
        *("--carvers", "tokencarve,divprune", "--budgets", "1/2, 1/4", "--codecs", "int8,int4"),
        *("--prompts", "how many dogs ?", "--prompts", "what is this ?", "--template", TEMPLATE),
        *("--max-images", "3", "--set", "evaluation.max_new_tokens=2", "--batch-size", "2"),
    )

    assert result.exit_code == 0, result.output
    assert "3 images, 6 questions, 23 variants" in result.stdout
    assert "agreement of full tokens: 100.0% [100.0%, 100.0%]" in result.stdout
    assert "best at 0.250 of the tokens: " in result.stdout
    assert f"results: {tmp_path / 'out' / 'results.html'}" in result.stdout
    assert "<svg" in (tmp_path / "out" / "results.html").read_text()
    answers, _ = read_tables(tmp_path / "out")
    assert set(answers["key"].to_pylist()) == {"p0", "p1", "p2"}
    assert read_summary(tmp_path / "out")["config"]["runner"]["batch_size"] == 2


def test_a_config_is_one_complete_evaluation_and_options_lie_over_it(
    tmp_path: Path, model: Path
) -> None:
    shard = write_images(tmp_path / "in", num_images=3)
    asked = config(model, shard, tmp_path / "out").model_dump(mode="json")
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(asked))

    result = carve(
        *("evaluate", "--config", tmp_path / "evaluate.yaml", "--carvers", "random"),
        *("--output", tmp_path / "there"),
    )

    assert result.exit_code == 0, result.output
    summary = read_summary(tmp_path / "there")
    assert {row["carver"] for row in summary["variants"]} == {
        *("identity", "random", "uniform_grid", "average_pool")
    }
    assert not (tmp_path / "out").exists()


def test_mistakes_are_one_line_and_exit_code_2(tmp_path: Path, model: Path) -> None:
    write_images(tmp_path / "in")

    result = carve(
        *("evaluate", "--model", model, "--input", tmp_path / "in", "--output", tmp_path / "out"),
        *("--carvers", "tokencurve", "--codecs", "int5", "--questions", tmp_path / "no.jsonl"),
    )

    assert result.exit_code == ExitCode.CONFIG
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert "did you mean 'tokencarve'?" in error and "'int5'" in error
    assert not (tmp_path / "out").exists()


def test_a_prompt_of_a_file_that_holds_an_image_token_is_named(tmp_path: Path, model: Path) -> None:
    shard = write_images(tmp_path / "in", num_images=1)
    (tmp_path / "q.jsonl").write_text(json.dumps({"key": "i000", "prompt": "what <image> ?"}))

    result = carve(
        *("evaluate", "--model", model, "--input", shard, "--output", tmp_path / "out"),
        *("--questions", tmp_path / "q.jsonl", "--template", TEMPLATE),
    )

    assert result.exit_code == ExitCode.CONFIG
    assert "must hold the image token once" in result.stderr
    assert list((tmp_path / "out").iterdir()) == []
