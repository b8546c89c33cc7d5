"""Train the yardstick, the small LLaVA that this project measures carving on; one command.

    python benchmarks/yardstick/train.py --work-dir /tmp/yardstick --output pipeline/demo/model

Draws pictures with questions, trains the tower on what every patch shows, stores the tower's
features with carvecache, trains projector and language model from that cache, and writes the
checkpoint in bfloat16 with `training.json`: held-out accuracy, hardware, versions, time. Everything
random has a seed. Stopped, the same command goes on where it was. `README.md` has the results.
"""

import argparse
import importlib.metadata
import json
import logging
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

sys.path.append(str(Path(__file__).parents[1]))  # hardware.py, which all benchmarks share

import torch
from checkpoint import WIDTH, build_model, build_tokenizer, save_checkpoint
from hardware import processor
from language import PER_FAMILY, align_projector, load_lessons, measure_answers, train_language
from pictures import write_pictures
from steps import Plan, seconds_spent
from tower import Heads, load_pictures, load_targets, measure_heads, train_tower

from pipeline.config import parse_config
from pipeline.errors import ExitCode, PipelineError
from pipeline.job import resolve_job
from pipeline.ray_runner import local_cluster, run_job

log = logging.getLogger("yardstick")


def main() -> None:
    """Train, measure on held-out pictures, and write the checkpoint."""
    args = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    work: Path = args.work_dir
    for name, number in (("train", args.num_images), ("heldout", args.num_heldout)):
        write_pictures(
            work / name, kind="quiz", num_images=number, seed=name, processes=args.threads
        )
    torch.manual_seed(args.seed)
    model = build_model(len(build_tokenizer()))
    heads_right = _train_tower(model, work, args)
    save_checkpoint(model, work / "tower")
    caches = {name: _store_features(work, name, args.threads) for name in ("train", "heldout")}
    right = _train_language(model, work, caches, args)
    save_checkpoint(model.to(torch.bfloat16), args.output)
    report = {
        "heldout_accuracy": right,
        "heldout_patches": heads_right,
        "seconds": {
            part: round(seconds_spent(work / f"{part}.pt"))
            for part in ("tower", "language", "second")
        },
        "hardware": processor(),
        "threads": args.threads,
        "versions": {n: importlib.metadata.version(n) for n in ("torch", "transformers", "pillow")},
        "arguments": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
    }
    (args.output / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    log.info("%s", report)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True, help="Pictures, cache and state.")
    parser.add_argument("--output", type=Path, required=True, help="Folder of the checkpoint.")
    parser.add_argument("--num-images", type=int, default=36000)
    parser.add_argument("--num-heldout", type=int, default=1000)
    parser.add_argument("--tower-steps", type=int, default=2800)
    parser.add_argument("--tower-batch", type=int, default=64)
    parser.add_argument("--align-steps", type=int, default=1000)
    parser.add_argument("--language-steps", type=int, default=5000)
    parser.add_argument("--second-steps", type=int, default=1500, help="of the language model")
    parser.add_argument("--language-batch", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def _train_tower(model: Any, work: Path, args: argparse.Namespace) -> dict[str, float]:  # noqa: ANN401
    """Train the tower; return what share of the patches its heads name right, held out."""
    tower, heads = model.model.vision_tower, Heads(WIDTH)
    lines = train_tower(
        tower,
        heads,
        load_pictures(work / "train"),
        plan=Plan(num_steps=args.tower_steps, batch_size=args.tower_batch, learning_rate=1.5e-3),
        state_path=work / "tower.pt",
    )
    _log_lines("tower", lines)
    right = measure_heads(tower, heads, load_pictures(work / "heldout"))
    log.info("tower, held out: %s", _rounded(right))
    return _rounded(right)


def _store_features(work: Path, name: str, threads: int) -> str:
    """Encode the pictures of a folder with this project's own job; return the cache's URL."""
    values = {
        "input": {"shards": str(work / name), "columns": ["json"]},
        "output": {"url": str(work / f"{name}-cache")},
        "encoder": {
            "name": "llava",
            "options": {"model": str(work / "tower"), "stage": "pre_projector"},
        },
        "carver": {"name": "identity"},
        "codec": {"name": "bf16"},
        "runner": {"num_actors": threads, "gpus_per_actor": 0.0},
    }
    job = resolve_job(parse_config(values, where="train.py"))
    with local_cluster(num_cpus=threads):
        report = run_job(job)
    if report.exit_code is not ExitCode.OK:
        raise PipelineError(f"storing the features of {name} ended as {report.exit_code.name}")
    return job.config.output.url


def _train_language(
    model: Any,  # noqa: ANN401
    work: Path,
    caches: dict[str, str],
    args: argparse.Namespace,
) -> dict[str, float]:
    """Train projector and language model; return the accuracy by family, held out."""
    tokenizer = build_tokenizer()
    lessons = load_lessons(caches["train"], tokenizer)
    patches, _ = load_targets(work / "train")  # in the order of their keys, as lessons are
    plan = Plan(
        num_steps=args.align_steps,
        batch_size=32,
        learning_rate=3e-3,
        gradient_norm=math.inf,
        log_every=200,
    )
    align = align_projector(model, lessons.features, patches, tokenizer.get_vocab(), plan)
    _log_lines("projector", align)
    # A second round, from the full learning rate: with twice the questions on relations, whose
    # answers need two things to be looked up.
    more = {**PER_FAMILY, "relation": 2 * PER_FAMILY["relation"]}
    rounds = (
        ("language", args.language_steps, PER_FAMILY),
        ("second", args.second_steps, more),
    )
    for name, num_steps, per_family in rounds:
        plan = Plan(num_steps=num_steps, batch_size=args.language_batch, learning_rate=1.5e-3)
        path = work / f"{name}.pt"
        lines = train_language(model, lessons, plan=plan, state_path=path, per_family=per_family)
        _log_lines(name, lines)
    right = measure_answers(model, load_lessons(caches["heldout"], tokenizer))
    log.info("held out: %s", _rounded(right))
    return _rounded(right)


def _log_lines(part: str, lines: Iterable[str]) -> None:
    for line in lines:
        log.info("%s: %s", part, line)


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


if __name__ == "__main__":
    main()
