"""One YAML file is one complete evaluation; this module reads and checks it.

What needs plug-ins to be checked is checked in `task.py`.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from pipeline.config import (
    InputConfig,
    PluginConfig,
    RunnerConfig,
    StrictModel,
    assign,
    check,
    parse_override,
    read_yaml,
)
from pipeline.errors import ConfigError
from pipeline.types import Placement

GENERIC_PROMPTS = (
    "Describe the image.",
    "What is the main subject of the image?",
    "What text can be read in the image?",
    "How many objects are in the image, and where are they?",
    "What colors are in the image?",
)
"""Asked of every image where nothing else is given; answers are compared, not judged."""


def parse_share(text: str) -> float:
    """Return the share that `2/9` or `0.2` names.

    Raises:
        ConfigError: it is neither a fraction nor a number.
    """
    share = _share(text)
    if not isinstance(share, float):
        raise ConfigError(f"{text!r} is no share: expected a fraction such as 2/9, or a number")
    return share


def _share(value: object) -> object:
    """Take `1/3` for a share, beside numbers; leave everything else for pydantic to refuse."""
    if isinstance(value, str):
        try:
            return float(Fraction(value.strip()))
        except (ValueError, ZeroDivisionError):
            return value
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _plugin(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), BeforeValidator(_share)]
NamedPlugin = Annotated[PluginConfig, BeforeValidator(_plugin)]


class EvaluationSettings(StrictModel):
    """What is compared, what is asked, and how surely it is to be known."""

    carvers: list[NamedPlugin] = Field(default_factory=lambda: [PluginConfig(name="tokencarve")])
    """Names, or name and options without a budget; `all` for every carver of the registry that
    the encoder can serve. The baselines random, uniform_grid and average_pool, and full tokens
    with each codec, are always there."""
    budgets: list[Share] = Field(
        default_factory=lambda: [1 / 3, 2 / 9, 1 / 9, 1 / 18], min_length=1
    )
    """Shares of the tokens that are kept; fractions such as 2/9 may be written."""
    codecs: list[NamedPlugin] = Field(
        default_factory=lambda: [PluginConfig(name="int8")], min_length=1
    )
    reads: list[Share] = Field(default_factory=list)
    """Shares of the tokens that are read of what each larger budget stored: progressive reads."""
    placements: list[Placement] = Field(default=["packed"], min_length=1)
    """Where the model finds the tokens that were kept, see `pipeline.types`: `packed`, one
    behind the other; `original`, where they stood; `weighted`, so too, each counting for as many
    as it stands for."""
    questions: str = ""
    """JSON lines of {"key", "prompt", "answer"?, "family"?}; images without any are left out."""
    column: str = ""
    """Suffix of the samples' JSON member whose field `questions` lists {"prompt", "answer"?,
    "family"?}."""
    prompts: list[str] = Field(default_factory=lambda: list(GENERIC_PROMPTS), min_length=1)
    """Asked of every image where neither `questions` nor `column` is given."""
    template: str = ""
    """Holds `<image>`, or the model's own image token, once, and `{prompt}`; empty for the
    checkpoint's chat template, and where it has none for LLaVA-1.5's."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 16
    max_images: Annotated[int, Field(ge=1)] | None = None
    """At most so many, spread evenly over the shards; None for all."""
    stability_images: Annotated[int, Field(ge=0)] = 64
    """Of the first so many images the kept sets of disturbed copies are compared."""
    resamples: Annotated[int, Field(ge=100)] = 2000
    """Of the bootstrap."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the disturbances and of the bootstrap."""


class EvaluationConfig(StrictModel):
    """One complete evaluation."""

    input: InputConfig = InputConfig()
    images: str = ""
    """Folder of images, or a glob pattern of them, in place of `input.shards`."""
    output: str = ""
    """Folder of the results."""
    encoder: PluginConfig
    evaluation: EvaluationSettings = EvaluationSettings()
    runner: RunnerConfig = RunnerConfig(batch_size=16)


def load_evaluation(
    path: str | Path | None,
    *,
    values: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> EvaluationConfig:
    """Read one YAML file and lay other values over it.

    Args:
        path: the file; None to start from nothing.
        values: dotted key -> value, laid over the file.
        overrides: `dotted.key=value` with the value in YAML, applied last, in order.

    Raises:
        ConfigError: the file cannot be read, or any key or value is wrong; all are named at once.
    """
    content = {} if path is None else read_yaml(path)
    given = [*(values or {}).items(), *(parse_override(override) for override in overrides)]
    for key, value in given:
        assign(content, key, value, where=key)
    return parse_evaluation(content, where=str(path or "options"))


def parse_evaluation(values: Mapping[str, Any], *, where: str = "config") -> EvaluationConfig:
    """Check an evaluation given as plain values.

    Raises:
        ConfigError: names every wrong key and value, with `where` in front.
    """
    config = check(EvaluationConfig, values, where=where)
    if problems := _contradictions(config):
        raise ConfigError(f"{where}: " + "; ".join(problems))
    return config


def _contradictions(config: EvaluationConfig) -> list[str]:
    asked = config.evaluation
    problems = []
    if bool(config.input.shards) == bool(config.images):
        problems.append("input.shards, images: give exactly one (or use --input or --images)")
    if not config.output:
        problems.append("output: must be given (or use --output)")
    if asked.questions and asked.column:
        problems.append("evaluation.questions, evaluation.column: give at most one")
    if asked.column and config.images:
        problems.append("evaluation.column: images of a folder have no columns; use questions")
    if asked.template and "{prompt}" not in asked.template:
        problems.append(f"evaluation.template: must hold {{prompt}}, is {asked.template!r}")
    if len(set(asked.placements)) != len(asked.placements):
        problems.append("evaluation.placements: one occurs twice")
    if len(set(asked.prompts)) != len(asked.prompts):
        problems.append("evaluation.prompts: one occurs twice")
    return problems
