"""What the commands share: their options, reading the config, errors as one line."""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from pipeline.config import JobConfig, load_config
from pipeline.errors import ExitCode, PipelineError

logger = logging.getLogger(__name__)

ConfigPath = Annotated[Path, typer.Option("--config", help="YAML file of one complete run.")]
InputShards = Annotated[str | None, typer.Option("--input", help="Replaces input.shards.")]
OutputUrl = Annotated[str | None, typer.Option("--output", help="Replaces output.url.")]
OnChanged = Annotated[
    str | None,
    typer.Option("--changed", help="Shards that changed: reprocess, error or ignore."),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="dotted.key=value; may be repeated.")
]


def with_flags(overrides: list[str] | None, flags: Mapping[str, object]) -> list[str]:
    """Return the overrides, and behind them what flags say that were given."""
    given = [f"{key}={value}" for key, value in flags.items() if value is not None]
    return [*(overrides or ()), *given]


def read_config(
    config: Path, input_shards: str | None, output: str | None, overrides: list[str] | None
) -> JobConfig:
    """Read a run's config with what the command line lays over it.

    Raises:
        ConfigError: names every mistake.
    """
    return load_config(
        config, input_shards=input_shards, output_url=output, overrides=overrides or ()
    )


@contextmanager
def errors_as_lines(*, logged: bool = False) -> Iterator[None]:
    """Turn our own errors into one line and exit code 2; others keep their traceback.

    Args:
        logged: make it a line of the log, where stderr holds nothing else.
    """
    try:
        yield
    except PipelineError as err:
        if logged:
            logger.error("%s", err)  # noqa: TRY400  (one line, no trace)
        else:
            print(f"error: {err}", file=sys.stderr)
        raise typer.Exit(int(ExitCode.CONFIG)) from err
