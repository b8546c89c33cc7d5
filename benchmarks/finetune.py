"""Fine-tuning from a cache beside fine-tuning from pixels: images/s, memory, losses.

Both train the same LoRA (and projector) of the yardstick on the same questions in the same order,
with the code of `examples/finetune_from_cache.py`; each measurement is a process of its own. From
pixels, the encoded pictures lie in memory, are decoded by Pillow, prepared by the model's own
processor, and go through its frozen tower in every step.
"""

import argparse
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tarfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hardware import processor
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import finetune_from_cache as finetune  # noqa: E402
from cached_model import batched, load_cached_model  # noqa: E402

from pipeline import open_cache  # noqa: E402
from pipeline.cache.commit import claim_identity  # noqa: E402
from pipeline.carve_shard import ShardCarver  # noqa: E402
from pipeline.carved_cache import CarvedCache  # noqa: E402
from pipeline.config import parse_config  # noqa: E402
from pipeline.demo.corpus import read_images, read_photos, write_if_changed  # noqa: E402
from pipeline.demo.model import TEMPLATE, copy_model  # noqa: E402
from pipeline.demo.quiz import draw_quiz  # noqa: E402
from pipeline.evaluation.answers import load_model  # noqa: E402
from pipeline.evaluation.questions import ColumnQuestions  # noqa: E402
from pipeline.job import resolve_job  # noqa: E402
from pipeline.plan import make_plan  # noqa: E402
from pipeline.storage import open_store  # noqa: E402

PAGE = ROOT / "benchmarks" / "finetune.md"
WARM_UP = 2  # steps that are not timed
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "pyarrow", "pillow", "numpy")


@dataclass(frozen=True, kw_only=True)
class Cache:
    """One way to carve the pictures."""

    label: str
    stage: str
    carver: Mapping[str, Any]
    codec: str


CACHES: Mapping[str, Cache] = {
    "exact": Cache(
        label="all 144 tokens, before the projector, fp32",
        stage="pre_projector",
        carver={"name": "identity"},
        codec="fp32",
    ),
    "all": Cache(
        label="all 144 tokens, projected, int8",
        stage="projected",
        carver={"name": "identity"},
        codec="int8",
    ),
    "carved": Cache(
        label="`carve_default` to 32 tokens, projected, int8",
        stage="projected",
        carver={"name": "carve_default", "options": {"keep_tokens": 32}},
        codec="int8",
    ),
}
TRAINED = {"projected": "LoRA", "pre_projector": "LoRA and projector"}
MODES = (
    ("pixels", "exact"),
    ("cache", "exact"),
    ("pixels", "all"),
    ("cache", "all"),
    ("cache", "carved"),
)
"""What is measured in each round, in this order. For pixels, the cache says what is trained."""
AGAINST = {"exact": "exact", "all": "all", "carved": "all"}
"""The pixels that a cache is compared with: those whose training is the same."""


def write_pictures(folder: Path, num_images: int) -> Path:
    """Write a shard of pictures with questions; the same bytes every time."""
    photos = list(read_photos().values())
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(num_images):
            quiz = draw_quiz(random.Random(f"finetune/{number}"), photos)
            encoded = io.BytesIO()
            quiz.image.save(encoded, "JPEG", quality=90)
            about = {"questions": [asdict(question) for question in quiz.questions]}
            members = {"jpg": encoded.getvalue(), "json": json.dumps(about).encode()}
            for suffix, content in members.items():
                entry = tarfile.TarInfo(f"q{number:05d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    write_if_changed(folder / "shard-00000.tar", sink.getvalue())
    return folder / "shard-00000.tar"


def carve(work: Path, shard: Path, name: str) -> None:
    """Carve the pictures in one of the ways, unless that is done."""
    torch.set_num_threads(1)
    cache = CACHES[name]
    options = {"model": str(work / "model"), "stage": cache.stage, "resize": "pillow"}
    config = parse_config(
        {
            "input": {"shards": str(shard), "columns": ["json"]},
            "output": {"url": str(work / name)},
            "encoder": {"name": "llava", "options": options},
            "carver": dict(cache.carver),
            "codec": {"name": cache.codec},
            "runner": {"batch_size": 16, "num_actors": 1, "gpus_per_actor": 0},
        }
    )
    job = resolve_job(config)
    store = open_store(job.config.output.url)
    claim_identity(store, job.identity)
    todo = make_plan(job, store).todo
    carver = ShardCarver(job)
    if todo:
        carver.load()
    for found in todo:
        carver.carve(found)
    carver.close()


def pixel_batches(
    its_processor: Any,  # noqa: ANN401
    cache: CarvedCache,
    options: Namespace,
    spent: list[float],
) -> Iterator[finetune.Sequences]:
    """Yield the batches of a training from pixels; add the CPU seconds of preparing each."""
    encoded = read_images([options.shard], list(cache))
    tokenizer = its_processor.tokenizer
    lessons = finetune.read_lessons(cache, ColumnQuestions(column="json"), options)
    for batch in batched(lessons, options.batch_size):
        prompts = [TEMPLATE.format(prompt=lesson.prompt) for lesson in batch]
        texts = finetune.write_sequences(prompts, [lesson.answer for lesson in batch], tokenizer)
        started = time.process_time()
        images = [Image.open(io.BytesIO(encoded[lesson.row.key])) for lesson in batch]
        inputs = its_processor(images=images, text=texts, padding=True, return_tensors="pt")
        spent.append(time.process_time() - started)
        labels = finetune.label_answers(inputs["input_ids"], prompts, texts, tokenizer)
        yield finetune.Sequences(dict(inputs), labels)


def measure(work: Path, shard: Path, mode: str, name: str, arguments: argparse.Namespace) -> Any:  # noqa: ANN401
    """Train for some steps in this process; return speed, memory and losses."""
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _status("VmRSS")
    given = {
        "cache": work / name,
        "model": work / "model",
        "template": TEMPLATE,
        "column": "json",
        "output": "unused",
        "device": "cpu",
        "batch-size": arguments.batch_size,
        "steps": arguments.steps,
    }
    options = finetune.parse_options([f"--{key}={value}" for key, value in given.items()])
    options.shard = shard
    cache = open_cache(options.cache)
    stage, spent = CACHES[name].stage, list[float]()
    if mode == "pixels":
        model, its_processor = load_model(options.model)
        batches = pixel_batches(its_processor, cache, options, spent)
    else:
        language = load_cached_model(cache, options)
        model = language.model
        lessons = finetune.read_lessons(cache, ColumnQuestions(column="json"), options)
        batches = finetune.cached_batches(language, cache, lessons, options)
    trained = finetune.make_trainable(model, stage=stage, options=options)
    plan = finetune.Plan(steps=options.steps, learning_rate=options.learning_rate, warm_up=0)
    losses, ends = [], []
    for loss, _ in finetune.train(trained, batches, plan):
        losses.append(loss)
        ends.append(time.process_time())
    num_timed = options.steps - WARM_UP
    images = num_timed * options.batch_size
    return {
        "losses": losses,
        "images_per_core_s": images / (ends[-1] - ends[WARM_UP - 1]),
        "prepare_ms": 1000 * sum(spent[WARM_UP:]) / images if spent else 0.0,
        "peak_kib": _status("VmHWM"),
        "own_kib": _status("VmHWM") - before,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _status(field: str) -> int:
    """Return a field of the process's memory, in KiB. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def in_own_process(work: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401
    """Do some work in a process that ends afterwards; the imports were done before it parted."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(work, arguments)


def render(results: Sequence[Mapping[str, Any]], command: str, arguments: Namespace) -> str:
    """Return the page as Markdown."""
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    first = results[0]
    difference = max(
        abs(a - b)
        for found in results
        for a, b in zip(
            found["cache", "exact"]["losses"], found["pixels", "exact"]["losses"], strict=True
        )
    )
    lines = [
        "# Fine-tuning from a cache, and from pixels",
        "",
        "Written by this command, nothing on it by hand:",
        "",
        f"    {command}",
        "",
        f"- CPU: {processor()}, {os.cpu_count()} logical cores, one used; load average "
        f"{arguments.load[0]:.1f} at the start, {os.getloadavg()[0]:.1f} at the end",
        f"- system: {platform.system()} {platform.release()}, Python {platform.python_version()}",
        f"- packages: {packages}",
        f"- model: the [yardstick](yardstick/README.md), {first['pixels', 'all']['parameters']:,} "
        f"parameters with its tower and LoRA, {first['cache', 'all']['parameters']:,} without the "
        "tower; float32",
        f"- {arguments.num_images} JPEG pictures of 168 x 168 pixels with questions; "
        f"{arguments.steps} steps of {arguments.batch_size}, {arguments.rounds} rounds in turns; "
        f"{time.strftime('%Y-%m-%d', time.gmtime())}",
        "",
        "| input | trained | images/s of a core | / pixels | peak memory, MB | / pixels | of it "
        "above the imports | / pixels |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [_row(results, mode, name) for mode, name in MODES]
    lines += [
        "",
        f"The losses from all tokens in fp32 are those from pixels: over the {arguments.steps} "
        f"steps of all rounds they differ by at most {difference:.0e}. From pixels, "
        f"{_median(results, 'pixels', 'all', 'prepare_ms'):.1f} ms an image go to decoding and "
        "preparing it, of "
        f"{1000 / _median(results, 'pixels', 'all', 'images_per_core_s'):.1f} in all.",
        "",
        "## How it is measured",
        "",
        *_METHOD.format(warm_up=WARM_UP).splitlines(),
    ]
    return "\n".join(lines) + "\n"


_METHOD = """\
- **Speed** is images over the CPU time of the process, one thread, without the first {warm_up}
  steps: what else runs on the machine counts little. *Images* are sequences of one picture, one
  question and its answer.
- **Memory** is the peak resident size of a process of its own (`VmHWM`). Python and its libraries
  are most of it with so small a model; *above the imports* is what loading and training added.
- **Ratios** are taken within a round, to the pixels with the same training; medians of the rounds.
- From pixels the tower is frozen too, and runs without gradients; its features are not kept from
  one epoch to the next.
- **What carries over.** A step costs the language model's forward and backward passes, and from
  pixels decoding and the tower besides. The first shrink with the tokens, the others go. Of the
  yardstick's weights the tower is more than half; of LLaVA-1.5-7B's it is 4 % (0.3 of 7 billion),
  so there most memory is saved by shorter sequences."""


def _row(results: Sequence[Mapping[str, Any]], mode: str, name: str) -> str:
    cache = CACHES[name]
    label = "pixels" if mode == "pixels" else f"cache: {cache.label}"
    cells = [label, TRAINED[cache.stage]]
    for field, unit, digits in (
        ("images_per_core_s", 1.0, 1),
        ("peak_kib", 1024 / 1e6, 0),
        ("own_kib", 1024 / 1e6, 0),
    ):
        cells.append(f"{unit * _median(results, mode, name, field):.{digits}f}")
        ratios = [r[mode, name][field] / r["pixels", AGAINST[name]][field] for r in results]
        spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if mode == "cache" else ""
        cells.append(f"{statistics.median(ratios):.2f}{spread}")
    return f"| {' | '.join(cells)} |"


def _median(results: Sequence[Mapping[str, Any]], mode: str, name: str, field: str) -> float:
    return statistics.median(found[mode, name][field] for found in results)


def main() -> None:
    """Make pictures and caches, measure in rounds, and print or write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write-page", action="store_true", help=f"to {PAGE.name}")
    arguments = parser.parse_args()
    if arguments.steps <= WARM_UP:
        parser.error(f"--steps must be above {WARM_UP}, which are not timed")
    arguments.load = os.getloadavg()
    work: Path = arguments.work_dir
    copy_model(work / "model")
    shard = write_pictures(work / "pictures", arguments.num_images)
    for name in CACHES:
        in_own_process(carve, work, shard, name)
    results = []
    for number in range(arguments.rounds):
        found = {m: in_own_process(measure, work, shard, *m, arguments) for m in MODES}
        results.append(found)
        speeds = {" ".join(m): round(f["images_per_core_s"], 1) for m, f in found.items()}
        print(f"round {number + 1}: {speeds}", file=sys.stderr, flush=True)
    shown = ["DIR" if given == str(work) else given for given in sys.argv[1:]]
    page = render(results, " ".join(["python benchmarks/finetune.py", *shown]), arguments)
    if arguments.write_page:
        PAGE.write_text(page)
    else:
        print(page)


if __name__ == "__main__":
    main()
