"""`carve demo`: the whole way on one machine, from a corpus made on the spot to a report."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from pipeline.carved_cache import open_cache
from pipeline.config import JobConfig, parse_config
from pipeline.demo.corpus import NUM_SHARDS, Corpus, write_corpus, write_if_changed
from pipeline.demo.model import copy_model
from pipeline.demo.readback import read_report
from pipeline.demo.report import DemoReport, megabytes, render
from pipeline.errors import ConfigError, ExitCode, PipelineError
from pipeline.job import Job, resolve_job
from pipeline.plan import make_plan
from pipeline.ray_runner import local_cluster, run_job
from pipeline.run_report import RunReport
from pipeline.storage import open_store

NUM_ACTORS = 2

_FORMAT_NAMES = {"jpeg": "JPEG", "png": "PNG", "webp": "WebP"}
_MARKER = "carve-demo.json"


def demo_config(output: Path) -> JobConfig:
    """Return the run of the demo; for `Path("demo")` it is `configs/demo.yaml`."""
    shards = f"shard-{{00000..{NUM_SHARDS - 1:05d}}}.tar"
    values = {
        "input": {"shards": str(output / "corpus" / shards), "columns": ["json", "txt"]},
        "output": {"url": str(output / "cache")},
        "encoder": {
            "name": "llava",
            "options": {"model": str(output / "model"), "stage": "projected"},
        },
        "carver": {"name": "carve_default", "options": {"keep_tokens": 32}},
        "codec": {"name": "int8"},
        "runner": {"num_actors": NUM_ACTORS, "gpus_per_actor": 0.0, "batch_size": 16},
    }
    return parse_config(values, where="demo")


def run_demo(output: Path) -> Iterator[str]:
    """Make a corpus and a model, carve, read back, and write `report.html`; no network, no GPU.

    Run again on the same folder, it finds everything done.

    Args:
        output: folder for everything; made if it does not exist.

    Yields:
        What was done, line by line, while it is done.

    Raises:
        ConfigError: the folder holds something else.
        PipelineError: not every shard was carved.
    """
    _claim(output)
    corpus = write_corpus(output / "corpus")
    yield _corpus_line(corpus, output)
    copy_model(output / "model")
    job = resolve_job(demo_config(output))
    yield _run_line(_carve(job), job)
    report = read_report(job, open_cache(job.config.output.url), corpus, model=output / "model")
    write_if_changed(output / "report.html", render(report).encode())
    yield from _summary(report, corpus, output)


def _claim(output: Path) -> None:
    """Refuse a folder that this demo did not make; nothing is ever deleted from it."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file: choose another --output")
    if output.is_dir() and any(output.iterdir()) and not (output / _MARKER).is_file():
        raise ConfigError(f"{output} holds other files: choose another --output, or a new folder")
    write_if_changed(output / _MARKER, json.dumps({"made_by": "carve demo"}).encode())


def _carve(job: Job) -> RunReport:
    todo = make_plan(job, open_store(job.config.output.url)).todo
    with local_cluster(num_cpus=NUM_ACTORS) if todo else nullcontext():
        report = run_job(job)
    if report.exit_code is not ExitCode.OK:
        reasons = "; ".join(f"{f.shard}: {f.message}" for f in report.failed)
        raise PipelineError(
            f"the demo's run ended as {report.exit_code.name.lower()}"
            f"{': ' + reasons if reasons else ''}; the same command resumes it"
        )
    return report


def _corpus_line(corpus: Corpus, output: Path) -> str:
    formats = ", ".join(f"{n} {_FORMAT_NAMES[name]}" for name, n in sorted(corpus.formats.items()))
    return (
        f"corpus: {corpus.num_images} images ({formats}, {sum(corpus.broken.values())} broken on "
        f"purpose) in {len(corpus.shards)} shards, {output / 'corpus'}"
    )


def _run_line(report: RunReport, job: Job) -> str:
    if report.num_done_before == report.num_shards:
        return f"nothing to do: all {report.num_shards} shards are in {job.config.output.url}"
    return (
        f"carved: {report.num_committed} shards, {report.num_images} images in "
        f"{report.seconds:.1f} s on {NUM_ACTORS} processes"
    )


def _summary(report: DemoReport, corpus: Corpus, output: Path) -> Iterator[str]:
    reasons = Counter(sample.reason for sample in report.rejected)
    named = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
    planted = "as planted" if reasons == corpus.broken else f"planted: {dict(corpus.broken)}"
    yield f"rejected: {len(report.rejected)} samples, {planted}: {named}"
    width = max(len(name) for name, _ in report.sizes)
    for name, num_bytes in report.sizes:
        yield f"  {name:<{width}}  {megabytes(num_bytes):>9}"
    yield (
        f"answers: {report.right_carved} of {len(report.answers)} questions right from the carved "
        f"tokens, {report.right_full} from all"
    )
    yield f"report: {output / 'report.html'}"
