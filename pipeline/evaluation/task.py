"""A checked evaluation: its config with the plug-ins built. Cheap to make and to pickle."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline import encoders
from pipeline.decode import DecodeOptions
from pipeline.encoders import Encoder
from pipeline.errors import ConfigError, PipelineError
from pipeline.evaluation.images import ImageSource
from pipeline.evaluation.questions import (
    ColumnQuestions,
    Questions,
    SamePrompts,
    fill_template,
    read_questions,
)
from pipeline.evaluation.settings import EvaluationConfig
from pipeline.evaluation.variants import Grid, build_grid
from pipeline.job import decode_options, package_versions, source_options
from pipeline.types import SIGNALS

T = TypeVar("T")

_VERSIONED = ("torch", "transformers", "pyarrow", "pillow", "numpy")


@dataclass(frozen=True, kw_only=True)
class EvaluationTask:
    """Everything that a process needs to measure a share of the images."""

    config: EvaluationConfig
    encoder: Encoder
    grid: Grid
    source: ImageSource
    questions: Questions
    decode: DecodeOptions
    stage: str  # of the encoder's features
    model: str  # place of the checkpoint
    revision: str | None

    @property
    def identity(self) -> Mapping[str, Any]:
        """What was measured and with what, as JSON."""
        return {
            "config": self.config.model_dump(mode="json"),
            "encoder": {"name": self.config.encoder.name, **self.encoder.describe(self.grid.needs)},
            "left_out": dict(self.grid.left_out),
            "versions": package_versions(_VERSIONED),
        }


def resolve_evaluation(config: EvaluationConfig) -> EvaluationTask:
    """Build the plug-ins of an evaluation and check that they fit together; loads no weights.

    Raises:
        ConfigError: names every problem found, an input that cannot be reached among them.
    """
    problems: list[str] = []
    chosen = config.encoder
    encoder = _attempt(problems, lambda: encoders.build(chosen.name, chosen.options))
    described = _attempt(problems, encoder.describe) if encoder else None
    # Without an encoder the names and options of the grid are checked all the same.
    yields = encoder.yields if encoder and described is not None else frozenset(SIGNALS)
    grid = _attempt(problems, lambda: build_grid(config.evaluation, yields))
    if described is not None and "stage" not in described:
        problems.append(
            f"encoder {chosen.name!r} gives features that no language model takes: use one with a "
            "stage, such as llava"
        )
    source = _source(config)
    _attempt(problems, source.check)
    _attempt(problems, lambda: _check_template(config))
    questions = _attempt(problems, lambda: _questions(config))
    if problems or not (encoder and grid and questions) or described is None:
        raise ConfigError("; ".join(problems))
    return EvaluationTask(
        config=config,
        encoder=encoder,
        grid=grid,
        source=source,
        questions=questions,
        decode=decode_options(config.input),
        stage=str(described["stage"]),
        model=str(config.encoder.options["model"]),
        revision=config.encoder.options.get("revision"),
    )


def _attempt(problems: list[str], action: Callable[[], T]) -> T | None:
    try:
        return action()
    except PipelineError as err:
        problems.append(str(err))
        return None


def _source(config: EvaluationConfig) -> ImageSource:
    column = config.evaluation.column
    return ImageSource(
        shards=config.input.shards,
        images=config.images,
        options=source_options(config.input, [column] if column else []),
        max_images=config.evaluation.max_images,
        allow_list_schemes=config.input.allow_list_schemes,
    )


def _questions(config: EvaluationConfig) -> Questions:
    asked = config.evaluation
    if asked.questions:
        return read_questions(asked.questions)
    if asked.column:
        return ColumnQuestions(column=asked.column)
    return SamePrompts(prompts=tuple(asked.prompts))


def _check_template(config: EvaluationConfig) -> None:
    template = config.evaluation.template
    if "<image>" in template:  # a model's own image token is checked with its tokenizer
        fill_template(template, [""], "<image>")
