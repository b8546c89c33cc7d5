"""One YAML file is one complete run; this module reads and checks it.

What needs plug-ins to be checked (their names, options and signals) is checked in `job.py`.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "float16"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class InputConfig(_Strict):
    """Which shards, and how their members are understood."""

    shards: str | list[str] = ""
    """Braces, globs, a directory, a text file of URLs, any fsspec URL, or a list of these."""
    image_suffixes: list[str] = ["jpg", "jpeg", "png", "webp"]
    columns: list[str] = ["json", "txt", "cls"]
    """Suffixes of members that go to the cache as text columns of the same name."""
    on_truncated: Literal["fail", "commit_partial"] = "fail"
    max_member_mib: Annotated[int, Field(ge=1)] = 128
    max_megapixels: Annotated[float, Field(gt=0)] = 89.0
    """Larger images are rejected by their header, before they are decoded."""


class OutputConfig(_Strict):
    """Where the cache goes and how its Parquet parts are cut."""

    url: str = ""
    row_group_mib: Annotated[int, Field(ge=1, le=256)] = 16
    part_mib: Annotated[int, Field(ge=1, le=4096)] = 256


class PluginConfig(_Strict):
    """A plug-in by file name, with its options."""

    name: str
    options: dict[str, Any] = {}


class RunnerConfig(_Strict):
    """How the work is spread; nothing here changes stored values except `dtype`."""

    num_actors: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """auto: one per GPU of the cluster, or one per `cpus_per_actor` where there is none."""
    gpus_per_actor: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    cpus_per_actor: Annotated[int, Field(ge=0)] = 1
    dtype: Dtype = "float32"
    batch_size: Annotated[int, Field(ge=1)] = 32
    decode_threads: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """auto: `cpus_per_actor`, at least 1, and with a GPU at least 2."""
    queue_mib: Annotated[int, Field(ge=1)] = 256
    """Bound of the images waiting between reading and encoding, per shard in flight."""
    max_attempts: Annotated[int, Field(ge=1)] = 3
    """Per shard; a damaged shard is not tried again, and a smaller batch is not an attempt."""
    max_bad_ratio: Annotated[float, Field(ge=0, le=1)] = 0.5
    """A shard with a larger share of rejected samples fails instead of being committed."""
    heartbeat_s: Annotated[float, Field(gt=0)] = 600.0
    """An actor that makes no progress for this long is killed and its shard retried."""
    actor_start_s: Annotated[float, Field(gt=0)] = 900.0
    """An actor that has not started and loaded its weights by then is not waited for."""
    fail_fast_after: Annotated[int, Field(ge=1)] = 8
    """The run stops when this many shards have failed and none is committed, now or before."""
    progress_s: Annotated[float, Field(gt=0)] = 5.0


class JobConfig(_Strict):
    """One complete run."""

    input: InputConfig = InputConfig()
    output: OutputConfig = OutputConfig()
    encoder: PluginConfig
    carver: PluginConfig
    codec: PluginConfig = PluginConfig(name="int8")
    runner: RunnerConfig = RunnerConfig()


def load_config(
    path: str | Path,
    *,
    input_shards: str | None = None,
    output_url: str | None = None,
    overrides: Sequence[str] = (),
) -> JobConfig:
    """Read one YAML file and lay command-line values over it.

    Args:
        path: the file.
        input_shards: replaces `input.shards`.
        output_url: replaces `output.url`.
        overrides: `dotted.key=value` with the value in YAML, applied in order.

    Raises:
        ConfigError: the file cannot be read, or any key or value is wrong; all are named at once.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as err:
        raise ConfigError(f"cannot read config {path}: {err.strerror}") from err
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(err).split())}") from err
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a mapping, holds {type(values).__name__}")
    for override in overrides:
        key, sep, text = override.partition("=")
        if not sep or not key:
            raise ConfigError(f"--set {override!r}: must be dotted.key=value")
        _assign(values, key, _parse_value(override, text))
    if input_shards is not None:
        _assign(values, "input.shards", input_shards)
    if output_url is not None:
        _assign(values, "output.url", output_url)
    return parse_config(values, where=str(path))


def parse_config(values: Mapping[str, Any], *, where: str = "config") -> JobConfig:
    """Check a run given as plain values.

    Raises:
        ConfigError: names every wrong key and value, with `where` in front.
    """
    try:
        config = JobConfig.model_validate(values)
    except ValidationError as err:
        raise ConfigError(
            f"{where}: " + "; ".join(_problem(detail) for detail in err.errors())
        ) from err
    missing = [
        f"{key}: must be given (or use {flag})"
        for key, flag, value in (
            ("input.shards", "--input", config.input.shards),
            ("output.url", "--output", config.output.url),
        )
        if not value
    ]
    if missing:
        raise ConfigError(f"{where}: " + "; ".join(missing))
    return config


def _parse_value(override: str, text: str) -> Any:  # noqa: ANN401  (any YAML value)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as err:
        raise ConfigError(f"--set {override!r}: the value is not YAML") from err


def _assign(values: dict[str, Any], dotted: str, value: object) -> None:
    *parents, last = dotted.split(".")
    for name in parents:
        child = values.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {dotted}: {name!r} is not a mapping")
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
    model: type[BaseModel] = JobConfig
    for part in loc[:-1]:
        field = model.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type):
            return []
        if not issubclass(field.annotation, BaseModel):
            return []
        model = field.annotation
    return list(model.model_fields)
