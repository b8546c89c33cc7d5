"""One YAML file is one complete run; this module reads and checks it.

What needs plug-ins to be checked (their names, options and signals) is checked in `job.py`.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from pipeline.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)

Dtype = Literal["float32", "bfloat16", "float16"]

_SECRET_SECTION = "notify"
"""No error shows a value of it."""


class StrictModel(BaseModel):
    """A section of a config: no unknown keys, no values of another type, no infinite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class InputConfig(StrictModel):
    """Which shards, and how their members are understood."""

    shards: str | list[str] = ""
    """Braces, globs, a directory, a text file of URLs, any fsspec URL, or a list of these."""
    allow_list_schemes: list[str] = []
    """Stores that a text file on another store may name, `s3` or `file` say; see security.md."""
    image_suffixes: list[str] = ["jpg", "jpeg", "png", "webp"]
    columns: list[str] = ["json", "txt", "cls"]
    """Suffixes of members that go to the cache as text columns of the same name."""
    on_truncated: Literal["fail", "commit_partial"] = "fail"
    on_changed: Literal["reprocess", "error", "ignore"] = "reprocess"
    """What becomes of a shard that is committed and has another size or etag since."""
    max_member_mib: Annotated[int, Field(ge=1)] = 128
    max_megapixels: Annotated[float, Field(ge=1e-6)] = 89.0
    """Larger images are rejected by their header, before they are decoded."""


class OutputConfig(StrictModel):
    """Where the cache goes and how its Parquet parts are cut."""

    url: str = ""
    row_group_mib: Annotated[int, Field(ge=1, le=256)] = 16
    part_mib: Annotated[int, Field(ge=1, le=4096)] = 256


class PluginConfig(StrictModel):
    """A plug-in by file name, with its options."""

    name: str
    options: dict[str, Any] = {}


class RunnerConfig(StrictModel):
    """How the work is spread; nothing here changes stored values except `dtype`."""

    num_actors: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """auto: one per GPU of the cluster, or one per `cpus_per_actor` where there is none."""
    gpus_per_actor: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    cpus_per_actor: Annotated[int, Field(ge=0)] = 1
    dtype: Dtype = "float32"
    batch_size: Annotated[int, Field(ge=1)] = 32
    decode_threads: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """auto: `cpus_per_actor`, at least 1, and with a GPU at least 2."""
    queue_mib: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Bound of what waits between reading and encoding, and between carving and writing, for each
    of the two shards in flight. auto: 256 with a GPU, 32 without."""
    max_attempts: Annotated[int, Field(ge=1)] = 3
    """Per shard; a damaged shard is not tried again, and a smaller batch is not an attempt."""
    max_bad_ratio: Annotated[float, Field(ge=0, le=1)] = 0.5
    """A shard with a larger share of rejected samples fails instead of being committed."""
    max_bad_ratio_run: Annotated[float, Field(ge=0, le=1)] = 0.25
    """The run stops when more of its input is lost, by rejected samples and by failed shards, each
    shard weighed by its size; from 8 settled shards on."""
    duplicate_tail: Annotated[float, Field(gt=1)] | None = 3.0
    """Once no shard waits, an idle actor begins one again that takes so many times the usual; the
    first attempt to commit counts. null: never."""
    heartbeat_s: Annotated[float, Field(gt=0)] = 600.0
    """An actor that makes no progress for this long is killed and its shard retried."""
    actor_start_s: Annotated[float, Field(gt=0)] = 900.0
    """An actor that has not started and loaded its weights by then is not waited for."""
    fail_fast_after: Annotated[int, Field(ge=1)] = 8
    """The run stops when this many shards have failed and none is committed, now or before."""
    max_hours: Annotated[float, Field(gt=0)] | None = None
    """Nothing is started after it; what is at work then is finished. The exit code is 75."""
    max_shards: Annotated[int, Field(ge=1)] | None = None
    """At most so many shards are started. The exit code is 75 if more were to do."""
    drain_s: Annotated[float, Field(ge=0)] = 0.0
    """After SIGTERM the shards in flight may go on for so long; then they are given up."""
    progress_s: Annotated[float, Field(gt=0)] = 5.0
    log_format: Literal["text", "json"] = "text"
    """json: one object a line, with the fields of docs/runs.md."""


class NotifyConfig(StrictModel):
    """Whom to tell how a run ended. Stored nowhere: a webhook's URL may be a secret."""

    command: list[str] = []
    """A program and its arguments, without a shell; it is given the summary on its stdin."""
    webhook: SecretStr | None = None
    """An http(s) URL that the summary is posted to."""
    webhook_env: str | None = None
    """Name of the environment variable that holds that URL."""
    timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """For each attempt."""
    max_attempts: Annotated[int, Field(ge=1, le=10)] = 3
    """Of a webhook; a command is started once."""


class JobConfig(StrictModel):
    """One complete run."""

    input: InputConfig = InputConfig()
    output: OutputConfig = OutputConfig()
    encoder: PluginConfig
    carver: PluginConfig
    codec: PluginConfig = PluginConfig(name="int8")
    runner: RunnerConfig = RunnerConfig()
    notify: NotifyConfig = NotifyConfig()


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
    values = read_yaml(path)
    for override in overrides:
        key, value = parse_override(override)
        assign(values, key, value, where=f"--set {key}")
    if input_shards is not None:
        assign(values, "input.shards", input_shards, where="--set input.shards")
    if output_url is not None:
        assign(values, "output.url", output_url, where="--set output.url")
    return parse_config(values, where=str(path))


def parse_config(values: Mapping[str, Any], *, where: str = "config") -> JobConfig:
    """Check a run given as plain values.

    Raises:
        ConfigError: names every wrong key and value, with `where` in front.
    """
    config = check(JobConfig, values, where=where)
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


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as err:
        raise ConfigError(f"cannot read config {path}: {err.strerror}") from err
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(err).split())}") from err
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a mapping, holds {type(values).__name__}")
    return values


def parse_override(override: str) -> tuple[str, Any]:
    """Return key and value of `dotted.key=value`, the value in YAML.

    Raises:
        ConfigError: it is of another form.
    """
    key, sep, text = override.partition("=")
    if not sep or not key:
        raise ConfigError(f"--set {override!r}: must be dotted.key=value")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError as err:
        # Without the value: it may be a secret.
        raise ConfigError(f"--set {key}: the value is not YAML") from err


def assign(values: dict[str, Any], dotted: str, value: object, *, where: str) -> None:
    """Set a value by its dotted key, making the mappings on the way.

    Raises:
        ConfigError: there is something else than a mapping on the way; `where` stands in front.
    """
    *parents, last = dotted.split(".")
    for name in parents:
        child = values.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{where}: {name!r} is not a mapping")
        values = child
    values[last] = value


def check(model: type[Model], values: Mapping[str, Any], *, where: str) -> Model:
    """Return plain values as a config.

    Raises:
        ConfigError: names every wrong key and value, with `where` in front.
    """
    try:
        return model.model_validate(values)
    except ValidationError as err:
        problems = "; ".join(_problem(model, detail) for detail in err.errors())
        raise ConfigError(f"{where}: {problems}") from err


def _problem(model: type[BaseModel], detail: Any) -> str:  # noqa: ANN401  (pydantic's ErrorDetails)
    place = ".".join(str(part) for part in detail["loc"] if not str(part).startswith("constrained"))
    if detail["type"] == "extra_forbidden":
        known = _known_keys(model, detail["loc"])
        near = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        return f"{place}: unknown key" + (f"; did you mean {near[0]!r}?" if near else "")
    if detail["type"] == "missing":
        return f"{place}: must be given"
    if detail["loc"][0] == _SECRET_SECTION:
        return f"{place}: {detail['msg']}"
    return f"{place}: {detail['msg']} (got {detail['input']!r})"


def _known_keys(model: type[BaseModel], loc: Sequence[str | int]) -> list[str]:
    for part in loc[:-1]:
        field = model.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type):
            return []
        if not issubclass(field.annotation, BaseModel):
            return []
        model = field.annotation
    return list(model.model_fields)
