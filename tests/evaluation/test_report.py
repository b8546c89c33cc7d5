"""What people read of an evaluation, from a real one on a tiny model."""

import json
from pathlib import Path

import pytest

from pipeline.errors import CacheFormatError
from pipeline.evaluation import evaluate, parse_evaluation, resolve_evaluation
from pipeline.evaluation.report import write_report
from pipeline.evaluation.task import EvaluationTask
from tests.evaluation.html_checker import check_page
from tests.evaluation.models import save_model
from tests.fakes import encoded_image


def make_task(folder: Path) -> EvaluationTask:
    save_model(folder / "model")
    (folder / "images").mkdir()
    for index in range(3):
        (folder / "images" / f"k{index}.jpg").write_bytes(encoded_image(index))
    values = {
        "images": str(folder / "images"),
        "output": str(folder / "out"),
        "encoder": {
            "name": "llava",
            "options": {"model": str(folder / "model"), "stage": "projected"},
        },
        "evaluation": {
            "carvers": ["tome"],
            "budgets": [0.25],
            "prompts": ["what is in this picture ?", "how many <dogs> ?"],
            "max_new_tokens": 3,
            "resamples": 100,
            "stability_images": 0,
        },
        "runner": {"batch_size": 2},
    }
    return resolve_evaluation(parse_evaluation(values))


def test_both_files_hold_the_means_and_the_worst_answers_are_drawn(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    summary = evaluate(task)

    files = write_report(task)

    markdown, page = (file.read_text() for file in files)
    checked = check_page(page)
    (tome,) = [row for row in summary["variants"] if row["carver"] == "tome"]
    mean = f"{100 * tome['agreement']['mean']:.1f}"
    assert [file.name for file in files] == ["results.md", "results.html"]
    assert f"| tome | {mean}" in markdown and mean in checked.text
    assert "No right answers were given" in checked.text
    disagree = [row["agreement"]["mean"] < 1 for row in summary["variants"]]
    assert any(disagree), "the model is random: some answers must differ"
    assert checked.sources and len(checked.sources) % 2 == 0
    assert "k0" in checked.text or "k1" in checked.text or "k2" in checked.text
    assert "how many <dogs> ?" in checked.text or "what is in this picture ?" in checked.text


def test_without_results_there_is_no_report(tmp_path: Path) -> None:
    task = make_task(tmp_path)

    with pytest.raises(CacheFormatError, match=r"no summary of an evaluation"):
        write_report(task)


def test_tokens_that_cannot_be_drawn_cost_the_pictures_only(tmp_path: Path) -> None:
    """With the class token among them, tokens fill no rectangle."""
    task = make_task(tmp_path)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["vision_feature_select_strategy"] = "full"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    task = resolve_evaluation(task.config)
    evaluate(task)

    _, page = (file.read_text() for file in write_report(task))

    checked = check_page(page)
    assert "No pictures: 1 x 17 tokens do not lie over a view of 28 x 28 pixels" in checked.text
    assert not checked.sources and "tome" in checked.text
