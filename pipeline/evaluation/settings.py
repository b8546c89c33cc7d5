"""One YAML file is one complete evaluation; this module reads and checks it.

What needs plug-ins to be checked is checked in `task.py`.
"""

import difflib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pipeline.config import InputConfig, PluginConfig, RunnerConfig
from pipeline.errors import ConfigError

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


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class EvaluationSettings(_Strict):
    """What is compared, what is asked, and how surely it is to be known."""

    carvers: list[NamedPlugin] = [PluginConfig(name="tokencarve")]
    """Names, or name and options without a budget; `all` for every carver of the registry that
    the encoder can serve. The baselines random, uniform_grid and average_pool, and full tokens
    with each codec, are always there."""
    budgets: Annotated[list[Share], Field(min_length=1)] = [1 / 3, 2 / 9, 1 / 9, 1 / 18]
    """Shares of the tokens that are kept; fractions such as 2/9 may be written."""
    codecs: Annotated[list[NamedPlugin], Field(min_length=1)] = [PluginConfig(name="int8")]
    reads: list[Share] = []
    """Shares of the tokens that are read of what each larger budget stored: progressive reads."""
    questions: str = ""
    """JSON lines of {"key", "prompt", "answer"?, "family"?}; images without any are left out."""
    column: str = ""
    """Suffix of the samples' JSON member whose field `questions` lists {"prompt", "answer"?,
    "family"?}."""
    prompts: Annotated[list[str], Field(min_length=1)] = list(GENERIC_PROMPTS)
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


class EvaluationConfig(_Strict):
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
    content = {} if path is None else _read_yaml(Path(path))
    for key, value in (values or {}).items():
        _assign(content, key, value)
    for override in overrides:
        key, sep, text = override.partition("=")
        if not sep or not key:
            raise ConfigError(f"--set {override!r}: must be dotted.key=value")
        try:
            _assign(content, key, yaml.safe_load(text))
        except yaml.YAMLError as err:
            raise ConfigError(f"--set {override!r}: the value is not YAML") from err
    return parse_evaluation(content, where=str(path or "options"))


def parse_evaluation(values: Mapping[str, Any], *, where: str = "config") -> EvaluationConfig:
    """Check an evaluation given as plain values.

    Raises:
        ConfigError: names every wrong key and value, with `where` in front.
    """
    try:
        config = EvaluationConfig.model_validate(values)
    except ValidationError as err:
        wrong = "; ".join(_problem(detail) for detail in err.errors())
        raise ConfigError(f"{where}: {wrong}") from err
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
    if len(set(asked.prompts)) != len(asked.prompts):
        problems.append("evaluation.prompts: one occurs twice")
    return problems


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise ConfigError(f"cannot read config {path}: {err.strerror}") from err
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(err).split())}") from err
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a mapping, holds {type(values).__name__}")
    return values


def _assign(values: dict[str, Any], dotted: str, value: object) -> None:
    *parents, last = dotted.split(".")
    for name in parents:
        child = values.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{dotted}: {name!r} is not a mapping")
        values = child
    values[last] = value


def _problem(detail: Any) -> str:  # noqa: ANN401  (pydantic's ErrorDetails)
    place = ".".join(str(part) for part in detail["loc"] if not str(part).startswith("constrained"))
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(detail["loc"][-1]), _known_keys(detail["loc"]), n=1)
        return f"{place}: unknown key" + (f"; did you mean {near[0]!r}?" if near else "")
    if detail["type"] == "missing":
        return f"{place}: must be given"
    return f"{place}: {detail['msg']} (got {detail['input']!r})"


def _known_keys(loc: Sequence[str | int]) -> list[str]:
    model: type[BaseModel] = EvaluationConfig
    for part in loc[:-1]:
        field = model.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type):
            return []
        if not issubclass(field.annotation, BaseModel):
            return []
        model = field.annotation
    return list(model.model_fields)
