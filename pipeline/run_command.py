"""`carve run`, which is `jobs/carve_dataset.py` too."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Annotated

import typer

from pipeline.command_line import (
    ConfigPath,
    InputShards,
    OnChanged,
    OutputUrl,
    Overrides,
    errors_as_lines,
    read_config,
    with_flags,
)
from pipeline.job import resolve_job
from pipeline.json_stderr import json_stderr
from pipeline.run_log import log_to_stderr
from pipeline.run_report import RunReport

MaxHours = Annotated[
    float | None, typer.Option("--max-hours", help="Start nothing after it; the next run goes on.")
]
MaxShards = Annotated[int | None, typer.Option("--max-shards", help="Start at most so many.")]
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="Only the shards that earlier runs gave up.")
]
LogFormatOption = Annotated[
    str | None, typer.Option("--log-format", help="Of stderr: text, or json, one object a line.")
]


def run(  # noqa: PLR0913  (one argument a flag)
    config: ConfigPath,
    input_shards: InputShards = None,
    output: OutputUrl = None,
    changed: OnChanged = None,
    max_hours: MaxHours = None,
    max_shards: MaxShards = None,
    retry_failed: RetryFailed = False,
    log_format: LogFormatOption = None,
    overrides: Overrides = None,
) -> None:
    """Carve every shard of the input that is not in the cache yet."""
    # The config may say json too; by then nothing has been logged.
    as_json = log_format == "json"
    log_to_stderr("json" if as_json else "text")
    flags = {
        "input.on_changed": changed,
        "runner.max_hours": max_hours,
        "runner.max_shards": max_shards,
        "runner.log_format": log_format,
    }
    with errors_as_lines(logged=as_json):
        checked = read_config(config, input_shards, output, with_flags(overrides, flags))
    chosen = checked.runner.log_format
    log_to_stderr(chosen)
    as_json = chosen == "json"
    with errors_as_lines(logged=as_json), json_stderr() if as_json else nullcontext():
        # Ray takes a second to import: a mistake in the config is told before.
        from pipeline.ray_runner import run_job

        job = resolve_job(checked)
        report = run_job(job, retry_failed=retry_failed)
    for line in summary_lines(report, job.config.output.url):
        print(line)
    raise typer.Exit(int(report.exit_code))


def summary_lines(report: RunReport, url: str) -> Iterator[str]:
    """Yield the end of a run in words."""
    if report.num_done_before == report.num_shards:
        yield f"nothing to do: all {report.num_shards} shards are in {url}"
    else:
        yield (
            f"{report.num_committed} shards committed, {len(report.failed)} failed, "
            f"{report.num_done_before} done before, in {report.seconds:.1f} s"
        )
        yield (
            f"{report.num_images} images, {report.tokens_full} tokens carved to "
            f"{report.tokens_kept}, {report.bytes_in / 1e6:.2f} MB of images to "
            f"{report.bytes_tokens / 1e6:.2f} MB of tokens"
        )
    if report.num_rejected:
        reasons = ", ".join(f"{r} {c}" for r, c in report.num_rejected.most_common())
        yield f"{sum(report.num_rejected.values())} samples rejected: {reasons}"
    for failure in report.failed:
        yield (
            f"failed: {failure.shard} ({failure.reason}, {failure.error_class}): {failure.message}"
        )
    for count, what in (
        (report.num_left_out, "to do were left out: no earlier run gave them up"),
        (report.num_abandoned, "were begun and not finished"),
        (report.num_not_started, "were not started"),
    ):
        if count:
            yield f"{count} shards {what}"
    if report.stopped_by:
        yield f"stopped early: {report.stopped_by}"
    if report.snapshot_error:
        yield f"no snapshot was made: {report.snapshot_error}"
    if report.num_duplicates:
        yield f"{report.num_duplicates} rows are hidden by an equal key of an earlier shard"
    if report.interrupted:
        yield "interrupted; the same command resumes"
