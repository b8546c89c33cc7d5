"""This pipeline beside Ray Data, the bare tower and its own bound, on the same shards.

    python benchmarks/throughput.py --work-dir /tmp/throughput --write-page

Makes its shards and its checkpoint of random weights, starts a local Ray session, and then lets
all take turns: bare tower, cost of each stage alone, pipeline, Ray Data; the same without a tower;
and one long run of a single actor whose memory is watched. `throughput.md` explains the numbers.
Needs Linux and the package installed (`pip install -e .`).
"""

import argparse
import json
import logging
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: one thread per process everywhere
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # as the yardsticks: others may compete
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it warns of actor arguments
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import numpy as np
import ray
import ray_data_baseline as baseline
import throughput_page as page
import torch
from process_watch import CpuTime, watch_commits, watch_cpu
from ray_data_baseline import Form, Setting
from stage_costs import bound, measure_stages, measure_tower, work_shares
from throughput_inputs import TOWERS, NoOpEncoder, write_checkpoint, write_shards

from pipeline import open_cache
from pipeline.cache.commit import Commit, read_commits
from pipeline.config import parse_config
from pipeline.errors import ExitCode
from pipeline.job import Job, resolve_job
from pipeline.ray_runner import run_job
from pipeline.storage import open_store

IN_FLIGHT = 2  # shards an actor has at a time: so many commits at either end are no steady state
TUNING_SHARDS = 6
NO_TOWER_FACTOR = 4  # images are done so fast without a tower: larger shards, for a steady state
MEMORY_MARKS = (2, 20)  # commits after which an actor's memory is read
KEEP_TOKENS = 64
FORMS: dict[str, Form] = {
    "ray_data": "usual",
    "ray_data_encoder": "encoder",
    "ray_data_lean": "lean",
}
NO_OP_FORMS: dict[str, Form] = {"ray_data": "encoder", "ray_data_lean": "lean"}  # no tower to run


@dataclass(frozen=True, kw_only=True)
class Run:
    """Images per second of one run."""

    steady: float
    whole: float  # with the start of the actors
    cpu_seconds: float  # of all its processes per image, in the steady state
    cores: float  # that they used of the machine
    cores_of_others: float  # that other processes took meanwhile

    @classmethod
    def of(cls, done: float, since: float, until: float, cpu: CpuTime, *, whole: float) -> "Run":
        """Return a run that did the work of so many images between two moments."""
        own, others = cpu.between(since, until)
        seconds = until - since
        return cls(
            steady=done / seconds,
            whole=whole,
            cpu_seconds=own / done,
            cores=own / seconds,
            cores_of_others=others / seconds,
        )


@dataclass(kw_only=True)
class Bench:
    """The work, and where it is done."""

    options: argparse.Namespace
    shards: Sequence[Path]
    model: Path
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def num_actors(self) -> int:
        """One per GPU, or one per core."""
        return torch.cuda.device_count() if self.options.device == "cuda" else self.options.cores

    @property
    def dtype(self) -> str:
        """Of weights and features."""
        return "bfloat16" if self.options.device == "cuda" else "float32"

    def job(self, *, no_op: bool, num_actors: int | None = None, name: str = "pipeline") -> Job:
        """Return the work of the pipeline; its cache is new."""
        cache = self.options.work_dir / name
        shutil.rmtree(cache, ignore_errors=True)
        on_gpu = self.options.device == "cuda"
        budget = {"keep_tokens": KEEP_TOKENS}
        signals = {"information": "attention_output", "attention": "cls_attention"}
        model = {"model": str(self.model), "resize": self.options.resize}
        config = parse_config(
            {
                "input": {"shards": [str(path) for path in self.shards], "columns": ["txt"]},
                "output": {"url": str(cache)},
                "encoder": {"name": "llava", "options": model},
                "carver": {"name": "uniform_grid", "options": budget}
                if no_op
                else {"name": "tokencarve", "options": {**budget, **signals}},
                "codec": {"name": "int8"},
                "runner": {
                    "num_actors": num_actors or self.num_actors,
                    "gpus_per_actor": 1 if on_gpu else 0,
                    "cpus_per_actor": self.options.cores // self.num_actors,
                    "dtype": self.dtype,
                    "batch_size": self.options.batch_size,
                },
            }
        )
        return resolve_job(config, encoder=NoOpEncoder(**model) if no_op else None)

    def settings(self) -> list[Setting]:
        """Return the ways to lay the work of Ray Data out on this machine."""
        cores, size = self.options.cores, self.options.batch_size
        if self.options.device == "cuda":
            one = Setting(
                actors=self.num_actors, actor_cpus=1, task_cpus=1, batch_size=size, actor_gpus=1
            )
            return [one, replace(one, task_cpus=0.5)]
        return [
            Setting(actors=max(1, cores // 2), actor_cpus=1, task_cpus=1, batch_size=size),
            Setting(actors=cores, actor_cpus=0.5, task_cpus=1, batch_size=size),
            Setting(actors=cores, actor_cpus=0.5, task_cpus=0.5, batch_size=size),
        ]


def run_pipeline(job: Job) -> tuple[Run, list[Commit]]:
    """Run the pipeline over the shards of its job.

    Steady is from the moment when every actor has made two commits to the moment when the first
    has two left to make: it has as many shards under way at both.
    """
    started = time.time()
    with watch_cpu() as cpu:
        report = run_job(job)
    whole = report.num_images / (time.time() - started)
    if report.exit_code is not ExitCode.OK:
        raise SystemExit(f"the pipeline ended with {report.exit_code!r}: {report.failed}")
    commits = sorted(read_commits(open_store(job.config.output.url)), key=lambda c: c.committed_at)
    workers: dict[int, list[tuple[float, int]]] = {}
    for commit in commits:
        found = workers.setdefault(commit.details["pid"], [])
        found.append((commit.committed_at, commit.num_written))
    since = max(series[IN_FLIGHT - 1][0] for series in workers.values())
    until = min(series[-1 - IN_FLIGHT][0] for series in workers.values())
    done = 0.0
    for series in workers.values():  # a shard counts by its share of time in the window
        times, images = zip(*series, strict=True)
        at_end, at_start = np.interp([until, since], times, np.cumsum(images))
        done += float(at_end - at_start)
    return Run.of(done, since, until, cpu, whole=whole), commits


def run_ray_data(
    job: Job,
    shards: Sequence[Path],
    output: Path,
    setting: Setting,
    *,
    shares: tuple[float, float, float],
) -> Run:
    """Run Ray Data over shards.

    Steady is from the first sixth of the images to the last shard. Ray prepares images far ahead
    and writes late, so an image counts in each stage by that stage's share of the work.
    """
    started = time.time()
    with watch_cpu() as cpu:
        baseline.run(job, shards, output, setting)
    found = baseline.progress(output)
    count = len(found.written)
    whole = count / (time.time() - started)
    since, until = found.carved[count // 6], found.carved[-1 - count // len(shards)]
    done = found.work_done(until, shares) - found.work_done(since, shares)
    return Run.of(done, since, until, cpu, whole=whole)


def tune(bench: Bench, job: Job, form: Form) -> tuple[Setting, list[dict[str, Any]]]:
    """Return the best setting for Ray Data, and all that were tried with their rates."""
    tried: list[tuple[float, Setting]] = []
    shards = bench.shards[:TUNING_SHARDS]
    shares = work_shares(measure_costs(bench, job, processes=1))

    def attempt(setting: Setting) -> None:
        output = bench.options.work_dir / "tuning"
        run = run_ray_data(job, shards, output, setting, shares=shares)
        print(f"  Ray Data with {setting}: {run.steady:.1f} images/s", flush=True)
        tried.append((run.steady, setting))

    for setting in bench.settings():
        attempt(replace(setting, form=form))
    best = max(tried, key=lambda pair: pair[0])[1]
    attempt(replace(best, batch_size=best.batch_size * 4))
    best = max(tried, key=lambda pair: pair[0])[1]
    return best, [{"setting": str(s), "images_per_second": rate} for rate, s in tried]


def compare_pipeline_and_ray_data(bench: Bench, *, no_op: bool) -> dict[str, Any]:
    """Run both by turns, with the bare tower and the cost of each stage before every turn."""
    options, name = bench.options, "no_op" if no_op else "tower"
    forms = NO_OP_FORMS if no_op else FORMS
    setting, tried = tune(bench, bench.job(no_op=no_op), forms["ray_data"])
    rounds: list[dict[str, Any]] = []
    agreement: list[float] = []
    for number in range(options.repeats):
        job = bench.job(no_op=no_op)
        measured = measure_yardsticks(bench, job, no_op=no_op)
        run, commits = run_pipeline(job)
        output = options.work_dir / "ray_data"
        shares = work_shares(measured["stages_alone"])
        others: dict[str, Run] = {}
        for label, form in forms.items():
            others[label] = run_ray_data(
                job, bench.shards, output, replace(setting, form=form), shares=shares
            )
            agreement.append(check_same_work(job, output))
        rounds.append(
            {
                **measured,
                "pipeline": asdict(run),
                **{label: asdict(other) for label, other in others.items()},
                "pipeline_stage_seconds": stage_seconds(commits),
            }
        )
        print(f"  round {number + 1}: {page.round_line(rounds[-1])}", flush=True)
    return {
        "name": name,
        "setting": str(setting),
        "tried": tried,
        "rounds": rounds,
        "agreement": min(agreement),
    }


def measure_yardsticks(bench: Bench, job: Job, *, no_op: bool) -> dict[str, Any]:
    """Return the bare tower's rate, the cost of each stage and the bounds that follow."""
    options = bench.options
    on_gpu = options.device == "cuda"
    found: dict[str, Any] = {}
    if not no_op:
        found["bare_tower"] = measure_tower(
            str(bench.model),
            batch_size=options.batch_size,
            num_batches=max(2, options.bare_images // options.batch_size),
            device=options.device,
            dtype=bench.dtype,
            processes=bench.num_actors,
        )
    for label, processes in (("alone", 1), ("together", 1 if on_gpu else options.cores)):
        costs = measure_costs(bench, job, processes=processes)
        found[f"stages_{label}"] = costs
        found[f"bound_{label}"] = bound(costs, cores=options.cores, gpus=bench.num_actors * on_gpu)
    return found


def measure_costs(bench: Bench, job: Job, *, processes: int) -> dict[str, float]:
    """Return the cost of each stage; see `measure_stages`."""
    options = bench.options
    return measure_stages(
        job, num_images=options.stage_images, device=options.device, processes=processes
    )


def stage_seconds(commits: Sequence[Commit]) -> dict[str, float]:
    """Return the wall seconds per image that the pipeline's own stages report."""
    images = sum(commit.num_written for commit in commits)
    stages = sorted({stage for c in commits for stage in c.details["stage_seconds"]})
    return {s: sum(c.details["stage_seconds"][s] for c in commits) / images for s in stages}


def check_same_work(job: Job, output: Path) -> float:
    """Return the share of kept positions that both agree on; other batches, other last bits."""
    theirs = baseline.read_tokens(output)
    cache = open_cache(job.config.output.url)
    if sorted(theirs) != list(cache.keys()):
        raise SystemExit(f"{len(theirs)} images by Ray Data, {len(cache)} by the pipeline")
    shared = []
    for key in sorted(theirs)[:: max(1, len(theirs) // 64)]:
        aux = np.frombuffer(theirs[key][1], "<u4", count=KEEP_TOKENS, offset=8)
        shared.append(len(np.intersect1d(aux, cache[key].positions)) / KEEP_TOKENS)
    agreement = statistics.mean(shared)
    if agreement < 0.98:
        raise SystemExit(f"pipeline and Ray Data keep the same tokens in {agreement:.1%} only")
    return agreement


def measure_memory(bench: Bench) -> dict[str, Any]:
    """Run one actor over all shards; return its memory in bytes after the marked commits."""
    job = bench.job(no_op=False, num_actors=1)
    marks = [min(mark, len(bench.shards) - 2) for mark in MEMORY_MARKS]
    with watch_commits(Path(job.config.output.url) / "commits", marks) as readings:
        run, _ = run_pipeline(job)
    first, last = readings
    growth = {name: last[name] / first[name] - 1 for name in ("peak_bytes", "resident_bytes")}
    return {"readings": readings, "growth": growth, "images_per_second": run.steady}


@contextmanager
def ray_session(options: argparse.Namespace) -> Iterator[None]:
    """Run Ray on this machine alone, with files of its own."""
    with tempfile.TemporaryDirectory(prefix="cc-ray-") as folder:  # short: it holds socket paths
        ray.init(
            address="local",
            num_cpus=options.cores,
            num_gpus=torch.cuda.device_count() if options.device == "cuda" else 0,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=folder,
        )
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        try:
            yield
        finally:
            ray.shutdown()


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True, help="for shards and outputs")
    parser.add_argument("--encoder", choices=sorted(TOWERS), default="small")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="default: all")
    parser.add_argument("--num-shards", type=int, default=24)
    parser.add_argument("--images-per-shard", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--resize",
        choices=["torchvision", "pillow"],
        default="torchvision",
        help="backend of transformers' image processor that both sides' pixels equal",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="images per encoder call")
    parser.add_argument("--bare-images", type=int, default=96, help="through the bare tower")
    parser.add_argument("--stage-images", type=int, default=64, help="to measure stages on")
    parser.add_argument("--skip-memory", action="store_true", help="no run of a single actor")
    parser.add_argument("--write-page", action="store_true", help="write the page beside this file")
    options = parser.parse_args()
    actors = torch.cuda.device_count() if options.device == "cuda" else options.cores
    if not actors:
        parser.error("--device cuda: this machine has no CUDA device")
    if options.num_shards < (2 * IN_FLIGHT + 2) * actors:
        parser.error(f"--num-shards must be at least {(2 * IN_FLIGHT + 2) * actors} here")
    options.work_dir = options.work_dir.absolute()
    return options


def corpus(options: argparse.Namespace, factor: int) -> list[Path]:
    """Return shards with so many times the images that the options ask for."""
    return write_shards(
        options.work_dir / f"shards-{factor}",
        num_shards=options.num_shards,
        images_per_shard=options.images_per_shard * factor,
    )


def main() -> None:
    """Run the whole benchmark, print it, and write it down."""
    options = parse_options()
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    model = write_checkpoint(options.work_dir / f"model-{options.encoder}", options.encoder)
    bench, no_tower = (
        Bench(options=options, shards=corpus(options, factor), model=model)
        for factor in (1, NO_TOWER_FACTOR)
    )
    results: dict[str, Any] = {
        "machine": page.machine(options.device),
        "options": {k: v for k, v in vars(options).items() if k not in ("work_dir", "write_page")},
        "no_tower_images_per_shard": options.images_per_shard * NO_TOWER_FACTOR,
        "shard_bytes": sum(path.stat().st_size for path in bench.shards),
        "load_at_start": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    started = time.time()
    with ray_session(options):
        print("with the tower", flush=True)
        results["tower"] = compare_pipeline_and_ray_data(bench, no_op=False)
        print("without the tower", flush=True)
        results["no_op"] = compare_pipeline_and_ray_data(no_tower, no_op=True)
        results["memory"] = None if options.skip_memory else measure_memory(bench)
    results["minutes"] = (time.time() - started) / 60
    results["load_at_end"] = os.getloadavg()[0]
    (options.work_dir / "results.json").write_text(json.dumps(results, indent=1))
    text = page.render(results)
    print(text)
    if options.write_page:
        name = "throughput.md" if options.device == "cpu" else "throughput_cuda.md"
        Path(__file__).with_name(name).write_text(text)


if __name__ == "__main__":
    main()
