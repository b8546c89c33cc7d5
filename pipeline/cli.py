"""The `carve` command."""

import functools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from pipeline import calibration, carvers, codecs, encoders, plugin_table
from pipeline.cache.garbage import find_garbage, remove
from pipeline.cache.verify import find_damage
from pipeline.carved_cache import open_cache
from pipeline.config import JobConfig, load_config
from pipeline.errors import ExitCode, PipelineError
from pipeline.evaluation import choose_command, evaluate_command, show_command
from pipeline.job import resolve_job
from pipeline.plan import Estimate, Plan, estimate, make_plan
from pipeline.run_report import RunReport
from pipeline.status import read_status, status_lines
from pipeline.storage import open_store

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Encode an image corpus once, keep the tokens that carry information, load the cache.",
)

ConfigPath = Annotated[Path, typer.Option("--config", help="YAML file of one complete run.")]
InputShards = Annotated[str | None, typer.Option("--input", help="Replaces input.shards.")]
OutputUrl = Annotated[str | None, typer.Option("--output", help="Replaces output.url.")]
OnChanged = Annotated[
    str | None,
    typer.Option("--changed", help="Shards that changed: reprocess, error or ignore."),
]
MaxHours = Annotated[
    float | None, typer.Option("--max-hours", help="Start nothing after it; the next run goes on.")
]
MaxShards = Annotated[int | None, typer.Option("--max-shards", help="Start at most so many.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="dotted.key=value; may be repeated.")
]


@app.command()
def run(  # noqa: PLR0913  (one argument a flag)
    config: ConfigPath,
    input_shards: InputShards = None,
    output: OutputUrl = None,
    changed: OnChanged = None,
    max_hours: MaxHours = None,
    max_shards: MaxShards = None,
    overrides: Overrides = None,
) -> None:
    """Carve every shard of the input that is not in the cache yet."""
    from pipeline.ray_runner import run_job

    _log_to_stderr()
    flags = {
        "input.on_changed": changed,
        "runner.max_hours": max_hours,
        "runner.max_shards": max_shards,
    }
    with _errors_as_lines():
        chosen = _with_flags(overrides, flags)
        job = resolve_job(_read_config(config, input_shards, output, chosen))
        report = run_job(job)
    for line in summary_lines(report, job.config.output.url):
        print(line)
    raise typer.Exit(int(report.exit_code))


@app.command()
def plan(
    config: ConfigPath,
    input_shards: InputShards = None,
    output: OutputUrl = None,
    changed: OnChanged = None,
    overrides: Overrides = None,
) -> None:
    """Show what a run would do; change nothing."""
    with _errors_as_lines():
        chosen = _with_flags(overrides, {"input.on_changed": changed})
        job = resolve_job(_read_config(config, input_shards, output, chosen))
        store = open_store(job.config.output.url)
        found = make_plan(job, store)
        coming = estimate(found, store)
    for line in plan_lines(found, coming):
        print(line)


@app.command()
def calibrate(
    config: ConfigPath,
    input_shards: InputShards = None,
    output: OutputUrl = None,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=1, help="Images to encode.")] = 256,
) -> None:
    """Set the carver's options that depend on the corpus; print its section of the config."""
    _log_to_stderr()
    with _errors_as_lines():
        job = resolve_job(_read_config(config, input_shards, output, overrides))
        result = calibration.calibrate(job, num_samples=samples)
    name = job.config.carver.name
    for reason, count in result.rejected.most_common():
        print(f"left out: {reason} {count}", file=sys.stderr)
    if not result.changed:
        print(f"carver {name!r} has no option to set from this corpus", file=sys.stderr)
    print(
        f"# {result.num_images} images keep {result.kept_after:.4f} of their tokens on average; "
        f"{result.kept_before:.4f} before calibration"
    )
    section = {"carver": {"name": name, "options": result.options}}
    print(yaml.safe_dump(section, sort_keys=False, allow_unicode=True), end="")


@app.command("list")
def list_plugins(
    kind: Annotated[str, typer.Argument(help="carvers, codecs or encoders")],
    full: Annotated[bool, typer.Option("--full", help="With options and sources.")] = False,
) -> None:
    """List the plug-ins of one kind as a Markdown table."""
    kinds = {"carvers": carvers, "codecs": codecs, "encoders": encoders}
    columns: dict[str, Callable[[type], str]] = {}
    if kind not in kinds:
        print(f"no kind {kind!r}; known: {', '.join(kinds)}", file=sys.stderr)
        raise typer.Exit(int(ExitCode.CONFIG))
    if kind == "carvers":
        columns = {
            "reads": lambda carver: ", ".join(sorted(carver().needs)) or "features",
            "prefix": lambda carver: "exact" if carver().nested else "approximate",
        }
    names, load = kinds[kind].names(), kinds[kind].load
    print(plugin_table.full(names, load) if full else plugin_table.brief(names, load, columns))


@app.command()
def inspect(url: str, key: Annotated[str | None, typer.Argument()] = None) -> None:
    """Show what a cache holds, or one image of it."""
    with _errors_as_lines():
        cache = open_cache(url)
        if key is not None:
            image = cache[key]
            print(
                f"{image.key}: {len(image.positions)} of {image.grid[0]} x {image.grid[1]} x "
                f"{image.grid[2]} tokens of width {cache.width}, image {image.width} x "
                f"{image.height}, positions {image.positions.tolist()}"
            )
            return
    settings = cache.identity["settings"]
    snapshot = cache.reader.snapshot
    print(f"{url}: snapshot {snapshot.number}, {snapshot.num_shards} shards, {len(cache)} images")
    print(f"tokens: {snapshot.num_tokens}, width {cache.width}")
    for kind in ("encoder", "carver", "codec"):
        print(f"{kind}: {settings[kind]}")


@app.command()
def status(
    url: str,
    runs: Annotated[int, typer.Option(min=0, help="How many of the last runs to show.")] = 5,
) -> None:
    """Show what is done, at work and failed, from the store alone; changes nothing."""
    with _errors_as_lines():
        found = read_status(open_store(url), num_runs=runs)
        for line in status_lines(found, url):
            print(line)


@app.command()
def verify(url: str) -> None:
    """Read every byte of a cache's snapshot and check all its checksums."""
    damaged = 0
    with _errors_as_lines():
        cache = open_cache(url)
        for problem in find_damage(cache.reader):
            damaged += 1
            print(problem, file=sys.stderr)
    print(f"{url}: {len(cache)} rows checked, {damaged} problems")
    raise typer.Exit(int(ExitCode.PARTIAL if damaged else ExitCode.OK))


@app.command()
def gc(
    url: str,
    grace_hours: Annotated[
        float, typer.Option("--grace", min=0, help="Hours; younger files stay. 0: no run is on.")
    ] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say it, delete nothing.")] = False,
) -> None:
    """Delete what killed runs left in a cache: files that no commit and no snapshot names."""
    num_files = num_bytes = 0
    with _errors_as_lines():
        store = open_store(url)
        for garbage in find_garbage(store, grace_s=grace_hours * 3600):
            print(
                f"{garbage.path}: {len(garbage.entries)} files, {garbage.size} bytes: "
                f"{garbage.reason}"
            )
            if not dry_run:
                remove(store, garbage)
            num_files += len(garbage.entries)
            num_bytes += garbage.size
    done = "would be deleted" if dry_run else "deleted"
    print(f"{url}: {num_files} files, {num_bytes / 1e6:.2f} MB {done}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for corpus, cache and report.")] = Path(
        "demo"
    ),
) -> None:
    """Carve a small corpus on this machine and write a report; needs no network and no GPU."""
    from pipeline.demo import run_demo

    _log_to_stderr()
    with _errors_as_lines():
        for line in run_demo(output):
            print(line)


def evaluate_fidelity(
    config: Annotated[Path, typer.Option("--config", help="YAML file of one evaluation.")],
    output: Annotated[str | None, typer.Option("--output", help="Folder of the results.")] = None,
    overrides: Overrides = None,
) -> None:
    """Measure what carving costs on the actors of a Ray cluster; else as `carve evaluate`."""
    from pipeline.evaluation import resolve_evaluation
    from pipeline.ray_runner import evaluate_on_ray

    _log_to_stderr()
    with _errors_as_lines():
        checked = evaluate_command.read_config(config, {"output": output}, overrides)
        task = resolve_evaluation(checked)
        summary = evaluate_on_ray(task, on_batch=evaluate_command.progress())
        evaluate_command.report(task, summary)


def plan_lines(plan: Plan, coming: Estimate | None) -> Iterator[str]:
    """Yield what a run would do in words."""
    yield (
        f"{len(plan.shards)} shards: {plan.num_done} done, {len(plan.todo)} to do "
        f"({plan.todo_bytes / 1e6:.1f} MB)"
    )
    if plan.todo:
        yield f"of those to do {plan.num_new} are new, {len(plan.todo) - plan.num_new} changed"
    if plan.changed and not {*plan.changed} & {*plan.todo}:
        yield f"{len(plan.changed)} changed shards stay as they were carved"
    if plan.removed:
        yield (
            f"{len(plan.removed)} shards are in the cache and no longer in the input; they stay: "
            f"{', '.join(plan.removed[:5])}{', ...' if len(plan.removed) > 5 else ''}"
        )
    if plan.todo and coming is not None:
        yield (
            f"like run {coming.run_id}: about {coming.images} images, {coming.hours:.2f} hours, "
            f"{coming.output_bytes / 1e6:.1f} MB of tokens"
        )
    elif plan.todo:
        yield "no earlier run of this cache tells how long that takes"


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
        yield f"failed: {failure.shard} ({failure.reason}): {failure.message}"
    if report.num_not_started:
        yield f"{report.num_not_started} shards were not started"
    if report.snapshot_error:
        yield f"no snapshot was made: {report.snapshot_error}"
    if report.num_duplicates:
        yield f"{report.num_duplicates} rows are hidden by an equal key of an earlier shard"
    if report.interrupted:
        yield "interrupted; the same command resumes"


def _with_lines(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command of another module, its errors as lines and its log on stderr."""

    @functools.wraps(command)
    def run_command(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        _log_to_stderr()
        with _errors_as_lines():
            command(*args, **kwargs)

    return run_command


app.command("evaluate")(_with_lines(evaluate_command.evaluate))
app.command("choose")(_with_lines(choose_command.choose))
app.command("show")(_with_lines(show_command.show))


def main() -> None:
    """Run the `carve` command."""
    app()


def _with_flags(overrides: list[str] | None, flags: Mapping[str, object]) -> list[str]:
    """Return the overrides, and behind them what flags say that were given."""
    given = [f"{key}={value}" for key, value in flags.items() if value is not None]
    return [*(overrides or ()), *given]


def _read_config(
    config: Path, input_shards: str | None, output: str | None, overrides: list[str] | None
) -> JobConfig:
    return load_config(
        config, input_shards=input_shards, output_url=output, overrides=overrides or ()
    )


@contextmanager
def _errors_as_lines() -> Iterator[None]:
    """Turn our own errors into one line and exit code 2; others keep their traceback."""
    try:
        yield
    except PipelineError as err:
        print(f"error: {err}", file=sys.stderr)
        raise typer.Exit(int(ExitCode.CONFIG)) from err


def _log_to_stderr() -> None:
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("pipeline").setLevel(logging.INFO)
