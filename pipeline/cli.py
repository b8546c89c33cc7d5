"""The `carve` command."""

import functools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from pipeline import calibration, carvers, codecs, encoders, plugin_table
from pipeline.cache.artefact import artefact_rows, artefact_store, list_artefacts, read_artefact
from pipeline.cache.commit import read_identity
from pipeline.cache.garbage import find_garbage, remove
from pipeline.cache.verify import THREADS, find_damage
from pipeline.carved_cache import open_cache
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
from pipeline.errors import ExitCode
from pipeline.evaluation import choose_command, evaluate_command, show_command
from pipeline.job import resolve_job
from pipeline.kv_prefix_command import kv_prefix
from pipeline.plan import Estimate, Plan, estimate, given_up, make_plan
from pipeline.rejections import read_rejections
from pipeline.run_command import run
from pipeline.run_log import log_to_stderr
from pipeline.status import read_status, status_lines
from pipeline.storage import Store, open_store

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Encode an image corpus once, keep the tokens that carry information, load the cache.",
)

app.command("run")(run)


@app.command()
def plan(
    config: ConfigPath,
    input_shards: InputShards = None,
    output: OutputUrl = None,
    changed: OnChanged = None,
    overrides: Overrides = None,
) -> None:
    """Show what a run would do; change nothing."""
    with errors_as_lines():
        chosen = with_flags(overrides, {"input.on_changed": changed})
        job = resolve_job(read_config(config, input_shards, output, chosen))
        store = open_store(job.config.output.url)
        found = make_plan(job, store)
        coming = estimate(found, store)
        failed = given_up(found, store)
    for line in plan_lines(found, coming, failed):
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
    log_to_stderr("text")
    with errors_as_lines():
        job = resolve_job(read_config(config, input_shards, output, overrides))
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
def inspect(
    url: str,
    key: Annotated[str | None, typer.Argument()] = None,
    errors: Annotated[
        bool, typer.Option("--errors", help="Print the rejected samples, one JSON object a line.")
    ] = False,
) -> None:
    """Show what a cache holds, one image of it, or the samples that could not be used."""
    if errors:
        _print_rejections(url, key)
        return
    with errors_as_lines():
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
    with errors_as_lines():
        found = read_status(open_store(url), num_runs=runs)
        for line in status_lines(found, url):
            print(line)


@app.command()
def verify(
    url: str,
    threads: Annotated[int, typer.Option(min=1, help="Files checked at a time.")] = THREADS,
) -> None:
    """Read every byte that a cache's commits name and check all checksums."""
    damaged = 0
    with errors_as_lines():
        cache = open_cache(url)
        readers = [cache.reader, *(artefact_rows(s) for s, _ in _artefacts(cache.reader.store))]
        for reader in readers:
            for problem in find_damage(reader, threads=threads):
                damaged += 1
                print(problem, file=sys.stderr)
    print(f"{url}: {sum(map(len, readers))} rows checked, {damaged} problems")
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
    with errors_as_lines():
        found = [(open_store(url), read_identity), *_artefacts(open_store(url))]
        for store, identify in found:
            for garbage in find_garbage(store, grace_s=grace_hours * 3600, identify=identify):
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

    log_to_stderr("text")
    with errors_as_lines():
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

    log_to_stderr("text")
    with errors_as_lines():
        checked = evaluate_command.read_config(config, {"output": output}, overrides)
        task = resolve_evaluation(checked)
        summary = evaluate_on_ray(task, on_batch=evaluate_command.progress())
        evaluate_command.report(task, summary)


def _artefacts(store: Store) -> Iterator[tuple[Store, Callable[[Store], object]]]:
    """Yield the folders of a cache's artefacts, and what tells that they are."""
    for kind, name in list_artefacts(store):
        yield artefact_store(store, kind, name), functools.partial(read_artefact, kind=kind)


def _print_rejections(url: str, key: str | None) -> None:
    with errors_as_lines():
        for shard, sample in read_rejections(open_store(url)):
            if key in (None, sample.key):
                print(json.dumps({"shard": shard, **asdict(sample)}))


def plan_lines(
    plan: Plan, coming: Estimate | None, failed: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Yield what a run would do in words.

    Args:
        plan: what is done and what is to do.
        coming: what that will come to.
        failed: why earlier runs gave up shards that are to do, by URL.
    """
    yield (
        f"{len(plan.shards)} shards: {plan.num_done} done, {len(plan.todo)} to do "
        f"({plan.todo_bytes / 1e6:.1f} MB)"
    )
    if plan.todo:
        yield f"of those to do {plan.num_new} are new, {len(plan.todo) - plan.num_new} changed"
    if failed:
        counts = Counter(failed.values())
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
        urls = sorted(failed)
        yield (
            f"{len(failed)} of those to do failed in earlier runs ({reasons}): "
            f"{', '.join(urls[:5])}{', ...' if len(urls) > 5 else ''}"
        )
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


def _with_lines(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command of another module, its errors as lines and its log on stderr."""

    @functools.wraps(command)
    def run_command(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        log_to_stderr("text")
        with errors_as_lines():
            command(*args, **kwargs)

    return run_command


app.command("evaluate")(_with_lines(evaluate_command.evaluate))
app.command("choose")(_with_lines(choose_command.choose))
app.command("show")(_with_lines(show_command.show))
app.command("kv-prefix")(_with_lines(kv_prefix))


def main() -> None:
    """Run the `carve` command."""
    app()
