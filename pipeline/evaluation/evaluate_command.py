"""The command `carve evaluate`; `pipeline/cli.py` registers it."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.evaluation.settings import EvaluationConfig, load_evaluation

if TYPE_CHECKING:
    from pipeline.evaluation.task import EvaluationTask

logger = logging.getLogger(__name__)

_PROGRESS_S = 10.0

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file of one complete evaluation.")
]
Model = Annotated[
    str | None, typer.Option("--model", help="Checkpoint of the llava family, in place of encoder.")
]
InputShards = Annotated[str | None, typer.Option("--input", help="Replaces input.shards.")]
ImageFolder = Annotated[str | None, typer.Option("--images", help="Folder of images instead.")]
Output = Annotated[str | None, typer.Option("--output", help="Folder of the results.")]
Carvers = Annotated[
    str | None, typer.Option("--carvers", help="Names, with commas, or all; baselines are added.")
]
Budgets = Annotated[
    str | None, typer.Option("--budgets", help="Shares of the tokens, with commas: 1/3,2/9.")
]
Codecs = Annotated[str | None, typer.Option("--codecs", help="Names, with commas.")]
Placements = Annotated[
    str | None, typer.Option("--placements", help="packed, original, weighted; with commas.")
]
Reads = Annotated[
    str | None, typer.Option("--reads", help="Shares to read of what larger budgets stored.")
]
QuestionFile = Annotated[
    str | None, typer.Option("--questions", help="JSON lines of key, prompt, answer, family.")
]
Column = Annotated[
    str | None, typer.Option("--column", help="JSON member of the samples with `questions`.")
]
Prompts = Annotated[
    list[str] | None, typer.Option("--prompts", help="Asked of every image; may be repeated.")
]
Template = Annotated[
    str | None, typer.Option("--template", help="Prompt with <image> and {prompt}.")
]
MaxImages = Annotated[int | None, typer.Option("--max-images", help="At most so many images.")]
StabilityImages = Annotated[
    int | None, typer.Option("--stability-images", help="Disturb the first so many images.")
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="float32 (default), bfloat16 or float16.")
]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Images at a time.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="dotted.key=value; may be repeated.")
]


def evaluate(  # noqa: PLR0913  (one argument a flag)
    config: ConfigFile = None,
    model: Model = None,
    shards: InputShards = None,
    images: ImageFolder = None,
    output: Output = None,
    carvers: Carvers = None,
    budgets: Budgets = None,
    codecs: Codecs = None,
    placements: Placements = None,
    reads: Reads = None,
    questions: QuestionFile = None,
    column: Column = None,
    prompts: Prompts = None,
    template: Template = None,
    max_images: MaxImages = None,
    stability_images: StabilityImages = None,
    dtype: Dtype = None,
    batch_size: BatchSize = None,
    overrides: Overrides = None,
) -> None:
    """Measure what carvers, budgets and codecs cost a model in answers, and what they save."""
    asked = "evaluation."
    values = {
        **encoder_values(model),
        "input.shards": shards,
        "images": images,
        "output": output,
        f"{asked}carvers": split(carvers),
        f"{asked}budgets": split(budgets),
        f"{asked}codecs": split(codecs),
        f"{asked}placements": split(placements),
        f"{asked}reads": split(reads),
        f"{asked}questions": questions,
        f"{asked}column": column,
        f"{asked}prompts": prompts or None,
        f"{asked}template": template,
        f"{asked}max_images": max_images,
        f"{asked}stability_images": stability_images,
        "runner.dtype": dtype,
        "runner.batch_size": batch_size,
    }
    run_evaluation(read_config(config, values, overrides))


def read_config(
    config: Path | None, values: Mapping[str, Any], overrides: list[str] | None
) -> EvaluationConfig:
    """Lay the options that were given over a file.

    Raises:
        ConfigError: as `load_evaluation`.
    """
    given = {key: value for key, value in values.items() if value is not None}
    return load_evaluation(config, values=given, overrides=overrides or ())


def run_evaluation(config: EvaluationConfig) -> dict[str, Any]:
    """Evaluate in this process, say what was found, and return the summary."""
    from pipeline.evaluation.run import evaluate as measure
    from pipeline.evaluation.task import resolve_evaluation

    task = resolve_evaluation(config)
    summary = measure(task, on_batch=progress())
    report(task, summary)
    return summary


def report(task: "EvaluationTask", summary: Mapping[str, Any]) -> None:
    """Write the pages of an evaluation and say what was found."""
    from pipeline.evaluation.report import write_report

    files = write_report(task)
    for line in result_lines(summary):
        typer.echo(line)
    for file in files:
        typer.echo(f"results: {file}")


def encoder_values(model: str | None) -> dict[str, Any]:
    """Return the settings of an encoder that gives a checkpoint's own visual tokens."""
    if model is None:
        return {}
    return {
        "encoder.name": "llava",
        "encoder.options.model": model,
        "encoder.options.stage": "projected",
    }


def split(names: str | None) -> list[str] | None:
    """Return what stands between commas; None for nothing given."""
    return None if names is None else [name.strip() for name in names.split(",") if name.strip()]


def progress() -> Callable[[int], None]:
    """Return a function that logs the images measured so far, now and then."""
    started = last = time.monotonic()

    def log(num_images: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _PROGRESS_S:
            last = now
            rate = num_images / (now - started)
            logger.info("%d images measured (%.2f images/s)", num_images, rate)

    return log


def result_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield an evaluation in words: the best at each budget with its interval."""
    rows = [row for row in summary["variants"] if row["family"] == "all"]
    yield (
        f"{summary['images']} images, {summary['questions']} questions, {len(rows)} variants in "
        f"{summary['seconds']['measure']:.0f} s"
    )
    for reason, count in summary["rejected"].items():
        yield f"left out: {reason} {count}"
    for name, why in summary["left_out"].items():
        yield f"carver {name} left out: {why}"
    measure = "accuracy" if any("accuracy" in row for row in rows) else "agreement"
    reference, *others = rows
    yield f"{measure} of full tokens: {estimate(reference[measure])}"
    for budget in sorted({row["budget"] for row in others if row["budget"] < 1}, reverse=True):
        best = max((r for r in others if r["budget"] == budget), key=lambda r: r[measure]["mean"])
        yield (
            f"best at {budget:.3f} of the tokens: {best['carver']}, {best['codec']}: "
            f"{estimate(best[measure])}, {best['bytes']['mean']:.0f} bytes per image"
        )


def estimate(value: Mapping[str, Any]) -> str:
    """Return a share and its interval in per cent."""
    if value["low"] != value["low"]:  # NaN: a single image
        return f"{value['mean']:.1%} (one image: no interval)"
    return f"{value['mean']:.1%} [{value['low']:.1%}, {value['high']:.1%}]"
