"""What carving costs the yardstick: every carver, every codec, and TokenCarve's online form.

    python benchmarks/fidelity.py --work-dir DIR --write-page

Draws pictures that training never saw, measures group after group of variants with the engine of
`carve evaluate`, and writes the page, its numbers as Parquet, and plots. Each group is kept in the
work directory: the same command goes on where it was stopped, and after a change of the code it
measures what changed (`fidelity_groups.py` says what it notices).
"""

import argparse
import importlib.metadata
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: groups are measured side by side

import fidelity_page
from fidelity_groups import (
    CALIBRATED,
    CODEC_BUDGET,
    DEFAULT,
    OWN_FORMS,
    PLACEMENTS,
    Group,
    budget_options,
    carver_cuts,
    cut,
    full_cuts,
    measure,
    rehearse,
    with_cuts,
)
from fidelity_online import BUDGETS, CODEC
from fidelity_pictures import (
    SAMPLE_SEED,
    TEST_SEED,
    count_questions,
    draw_pictures,
    draw_sample,
)
from fidelity_results import read_results, write_numbers
from hardware import processor

from pipeline import carvers, codecs
from pipeline.calibration import calibrate
from pipeline.carvers import Carver
from pipeline.config import parse_config
from pipeline.demo.model import TEMPLATE
from pipeline.evaluation.settings import parse_evaluation
from pipeline.evaluation.task import EvaluationTask, resolve_evaluation
from pipeline.evaluation.variants import BASELINES, FULL, UNCOMPRESSED, with_budget
from pipeline.job import resolve_job

ROOT = Path(__file__).parents[1]
NEUTRAL_PROMPT = "<image> what is the"  # for signals of the language model: no question is known
MAX_NEW_TOKENS = 4  # the longest answers have 3 words and an end
SAMPLE_IMAGES = 256

log = logging.getLogger("fidelity")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured, and where."""

    options: argparse.Namespace
    task: EvaluationTask
    sample: Sequence[str]

    @property
    def groups(self) -> Path:
        """Folder of the tables."""
        return self.options.work_dir / "groups"

    def plan(self) -> list[Group]:
        """Return every group, those of the baselines first."""
        full = [("full", full_cuts())]
        made = [
            (f"carver-{_slug(name, options)}", carver_cuts(name, options, self.calibrated(name)))
            for name, options in self._forms()
        ]
        stored = [(f"codecs-{name}", self._codec_cuts(name)) for name in self.options.codec_carvers]
        read = [(f"reads-{name}", self._read_cuts(name)) for name in self.options.read_carvers]
        groups = [
            Group(name=name, task=with_cuts(self.task, cuts))
            for name, cuts in (*full, *made, *stored, *read)
        ]
        return [*groups, Group(name="online", task=with_cuts(self.task, []), online=True)]

    def calibrated(self, name: str) -> list[Carver]:
        """Return a carver calibrated for each budget, where it has something to calibrate."""
        if name not in CALIBRATED:
            return []
        path = self.options.work_dir / "calibrated.json"
        known: dict[str, list[float]] = json.loads(path.read_text()) if path.is_file() else {}
        digest = self.task.encoder.describe()["digest"]
        entry = f"{name} {digest}"
        if entry not in known:
            known[entry] = [self._calibrate(name, budget) for budget in BUDGETS]
            path.write_text(json.dumps(known, indent=1) + "\n")
        pairs = zip(known[entry], BUDGETS, strict=True)
        return [
            carvers.build(name, {CALIBRATED[name]: value, **budget_options(name, budget)})
            for value, budget in pairs
        ]

    def _calibrate(self, name: str, budget: float) -> float:
        """Do as `carve calibrate` does."""
        config = self.task.config
        values = {
            "input": {"shards": list(self.sample)},
            "output": {"url": str(self.options.work_dir / "never-written")},
            "encoder": config.encoder.model_dump(),
            "carver": {"name": name, "options": budget_options(name, budget)},
        }
        job = resolve_job(parse_config(values, where="fidelity.py"))
        found = calibrate(job, num_samples=SAMPLE_IMAGES, device="cpu")
        return float(getattr(found.carver, CALIBRATED[name]))

    def _forms(self) -> Iterator[tuple[str, dict[str, Any]]]:
        known = [name for name in carvers.names() if name != FULL]
        chosen = self.options.carvers or known
        for name in dict.fromkeys([*BASELINES, *chosen]):
            needs = carvers.build(name).needs
            if missing := needs - self.task.encoder.yields:
                raise SystemExit(f"carver {name!r} needs {sorted(missing)}, which the model lacks")
            yield name, {}
            for options in OWN_FORMS.get(name, []):
                yield name, options

    def _codec_cuts(self, name: str) -> list[Any]:
        names = [codec for codec in codecs.names() if codec != CODEC]
        carver = with_budget(name, {}, CODEC_BUDGET)
        placements = ("packed", *PLACEMENTS) if name == DEFAULT else ("packed",)
        return [cut(carver, name, {}, CODEC_BUDGET, codecs=names, placements=placements)]

    def _read_cuts(self, name: str) -> list[Any]:
        return [cut(with_budget(name, {}, BUDGETS[0]), name, {}, BUDGETS[0], reads=BUDGETS[1:])]


def run(bench: Bench, groups: Sequence[Group]) -> None:
    """Measure the groups that are not done, several at once, and say how long it takes."""
    todo = [group for group in groups if not group.is_done(bench.groups)]
    log.info("%d of %d groups to measure", len(todo), len(groups))
    if not todo:
        return
    num_images, started = bench.options.images, time.monotonic()
    batches = -(-num_images // bench.task.config.runner.batch_size)
    workers = bench.options.threads
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        trial = dict(_finished(pool, rehearse, todo))
        left = {name: seconds * batches for name, seconds in trial.items()}
        log.info("one batch of each: the rest takes about %s", _span(sum(left.values()) / workers))
        started, whole = time.monotonic(), sum(left.values())
        for place, (name, seconds) in enumerate(_finished(pool, measure, todo, bench.groups), 1):
            del left[name]
            elapsed = time.monotonic() - started
            done = whole - sum(left.values())
            eta = elapsed / done * sum(left.values())
            log.info(
                "%d/%d %s: %s; about %s left", place, len(todo), name, _span(seconds), _span(eta)
            )


def _finished(
    pool: ProcessPoolExecutor, work: Callable[..., float], groups: Sequence[Group], *args: Path
) -> Iterator[tuple[str, float]]:
    """Yield each group's name and seconds as it ends; an error ends the run."""
    names = {pool.submit(work, group, *args): group.name for group in groups}
    try:
        for future in as_completed(names):
            yield names[future], future.result()
    finally:
        for future in names:
            future.cancel()


def prepare(options: argparse.Namespace) -> Bench:
    """Draw the pictures and check the model."""
    folder = options.work_dir / "pictures"
    shards, questions = draw_pictures(folder, options.images, processes=options.threads)
    encoder = {
        "name": "llava",
        "options": {
            "model": str(options.model),
            "stage": "projected",
            "prompt": NEUTRAL_PROMPT,
        },
    }
    values = {
        "input": {"shards": shards},
        "output": str(options.work_dir),
        "encoder": encoder,
        "evaluation": {
            "carvers": [],
            "budgets": list(BUDGETS),
            "codecs": [CODEC, UNCOMPRESSED],
            "questions": str(questions),
            "template": TEMPLATE,
            "max_new_tokens": MAX_NEW_TOKENS,
            "resamples": options.resamples,
        },
        "runner": {"batch_size": 32},
    }
    task = resolve_evaluation(parse_evaluation(values, where="fidelity.py"))
    return Bench(options=options, task=task, sample=draw_sample(folder, processes=options.threads))


def facts_of(bench: Bench) -> dict[str, Any]:
    """Return what the page says of the run."""
    options, config = bench.options, bench.task.config
    training = options.model / "training.json"
    calibrated = options.work_dir / "calibrated.json"
    names = ("torch", "transformers", "pillow", "numpy", "pyarrow")
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": f"{processor()}, {options.threads} processes of one thread",
        "versions": {name: importlib.metadata.version(name) for name in names},
        "model": bench.task.encoder.describe()["digest"],
        "training": json.loads(training.read_text()) if training.is_file() else None,
        "seeds": {"pictures": TEST_SEED, "calibration": SAMPLE_SEED, "bootstrap": 0},
        "resamples": options.resamples,
        "batch_size": config.runner.batch_size,
        "questions": count_questions(Path(config.evaluation.questions)),
        "images": options.images,
        "sample_images": SAMPLE_IMAGES,
        "template": TEMPLATE,
        "neutral_prompt": NEUTRAL_PROMPT,
        "calibrated": json.loads(calibrated.read_text()) if calibrated.is_file() else {},
    }


def _slug(name: str, options: dict[str, Any]) -> str:
    return "-".join([name, *(str(value) for value in options.values())])


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True, help="pictures, tables, plots")
    parser.add_argument("--model", type=Path, default=ROOT / "pipeline/demo/yardstick")
    parser.add_argument(
        "--images", type=int, default=1500, help="two thirds scenes, the rest pages"
    )
    parser.add_argument("--carvers", type=_names, default=[], help="A,B; default: all")
    parser.add_argument(
        "--codec-carvers", type=_names, default=[DEFAULT, "tokencarve", "divprune", "average_pool"]
    )
    parser.add_argument(
        "--read-carvers",
        type=_names,
        default=[
            DEFAULT,
            "tokencarve",
            "tokencarve_floor",
            "divprune",
            "visionzip",
            "uniform_grid",
        ],
        help="read also in part of what 1/3 stored",
    )
    parser.add_argument("--threads", type=int, default=2, help="groups measured at once")
    parser.add_argument("--resamples", type=int, default=2000, help="of the bootstrap")
    parser.add_argument("--write-page", action="store_true", help="write the page beside this file")
    options = parser.parse_args()
    options.work_dir = options.work_dir.absolute()
    if options.carvers:
        options.codec_carvers = [n for n in options.codec_carvers if n in options.carvers]
        options.read_carvers = [n for n in options.read_carvers if n in options.carvers]
    return options


def main() -> None:
    """Measure what is missing, print the page, and write it down."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    options = parse_options()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    bench = prepare(options)
    groups = bench.plan()
    run(bench, groups)
    results = read_results(groups, bench.groups, resamples=options.resamples)
    target = Path(__file__).parent if options.write_page else options.work_dir
    page = target / "fidelity.md"
    known = page.read_text(encoding="utf-8") if page.is_file() else ""
    page.write_text(fidelity_page.render(results, facts_of(bench), known), encoding="utf-8")
    write_numbers(results, target / "fidelity.parquet")
    plots = options.work_dir / "fidelity.html"
    plots.write_text(fidelity_page.render_plots(results), encoding="utf-8")
    log.info("wrote %s and %s", page, plots)


if __name__ == "__main__":
    main()
