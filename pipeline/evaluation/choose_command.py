"""The command `carve choose`; `pipeline/cli.py` registers it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from pipeline.config import JobConfig, load_config
from pipeline.errors import ConfigError, ExitCode
from pipeline.evaluation.evaluate_command import InputShards, Prompts, progress, split
from pipeline.evaluation.settings import EvaluationConfig, parse_evaluation

RUN_FILE = "run.yaml"

_CARVERS = "carve_default,vqtoken,scope,cenprune,divprune"
_BUDGETS = "1/2,1/3,2/9,1/9,1/18"


def choose(  # noqa: PLR0913  (one argument a flag)
    config: Annotated[
        Path, typer.Option("--config", help="YAML file of a run; its carver and codec are chosen.")
    ],
    keep_agreement: Annotated[
        float,
        typer.Option("--keep-agreement", min=0, max=1, help="Share of the answers to keep."),
    ] = 0.98,
    shards: InputShards = None,
    output: Annotated[str | None, typer.Option("--output", help="Replaces output.url.")] = None,
    results: Annotated[
        Path, typer.Option("--results", help="Folder of the evidence and of the new run.")
    ] = Path("carve-choose"),
    carvers: Annotated[str, typer.Option("--carvers", help="With commas, or all.")] = _CARVERS,
    budgets: Annotated[str, typer.Option("--budgets", help="Shares, with commas.")] = _BUDGETS,
    codecs: Annotated[str, typer.Option("--codecs", help="With commas.")] = "int8,int4",
    placements: Annotated[
        str, typer.Option("--placements", help="What your engine can do, with commas.")
    ] = "packed",
    samples: Annotated[int, typer.Option(min=2, help="Images to ask about.")] = 256,
    questions: Annotated[
        str, typer.Option("--questions", help="JSON lines of key and prompt.")
    ] = "",
    prompts: Prompts = None,
    template: Annotated[
        str, typer.Option("--template", help="Prompt with <image> and {prompt}.")
    ] = "",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="dotted.key=value of the run.")
    ] = None,
) -> None:
    """Find the cheapest carver, budget and codec that keep a model's answers on this corpus."""
    run = load_config(config, input_shards=shards, output_url=output, overrides=overrides or ())
    asked = {
        "carvers": split(carvers),
        "budgets": split(budgets),
        "codecs": split(codecs),
        "placements": split(placements),
        "questions": questions,
        "template": template,
        "max_images": samples,
        "stability_images": 0,
        **({"prompts": prompts} if prompts else {}),
    }
    raise typer.Exit(int(_choose(run, _evaluation(run, asked, results), keep_agreement, results)))


def _evaluation(run: JobConfig, asked: Mapping[str, object], results: Path) -> EvaluationConfig:
    values = run.model_dump(mode="json")
    return parse_evaluation(
        {
            **{name: values[name] for name in ("input", "encoder", "runner")},
            "output": str(results),
            "evaluation": asked,
        },
        where="options",
    )


def _choose(
    run: JobConfig, config: EvaluationConfig, keep_agreement: float, results: Path
) -> ExitCode:
    from pipeline.evaluation.choose import best, chosen_config, evidence, list_candidates
    from pipeline.evaluation.choose import choose as choose_candidate
    from pipeline.evaluation.run import evaluate
    from pipeline.evaluation.task import resolve_evaluation

    if results.resolve() == Path(run.output.url).resolve():
        raise ConfigError(f"--results {results}: is the folder of the run's cache, give another")
    summary = evaluate(resolve_evaluation(config), on_batch=progress())
    candidates = list_candidates(summary)
    typer.echo(f"{summary['images']} images, {summary['questions']} questions")
    for line in evidence(candidates, keep_agreement):
        typer.echo(line)
    chosen, path = choose_candidate(candidates, keep_agreement), results / RUN_FILE
    if chosen is None:
        path.unlink(missing_ok=True)  # of an earlier wish
        nearest = best(candidates)
        typer.echo(
            f"nothing keeps {keep_agreement:.1%} of the answers for sure; the best is "
            f"{nearest.name}: at least {nearest.bound:.1%}. More --samples narrow the intervals, "
            "more --budgets, --codecs or --carvers widen the choice",
            err=True,
        )
        return ExitCode.PARTIAL
    path.write_text(chosen_config(run, chosen), encoding="utf-8")
    typer.echo(
        f"chosen: {chosen.name}, {chosen.bytes:.0f} bytes per image, at least {chosen.bound:.1%} "
        "of the answers (the cheapest of several that look good is a little optimistic)"
    )
    if chosen.placement != "packed":
        typer.echo(f"that holds for tokens handed over with placement={chosen.placement!r}")
    typer.echo(f"run it: carve run --config {path}")
    return ExitCode.OK
