"""What stored keys and values cost and save, beside stored tokens.

    python benchmarks/kv_prefix.py --work-dir DIR --write-page

Carves drawn pictures that the demo's model never saw, twice: all tokens, and few of them; makes the
artefact `kv_prefix` of both with every codec, asks every question from both, and times the first
token of an answer. Caches and artefacts in the work directory are kept: the same command goes on.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import random
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from hardware import processor as hardware
from kv_prefix_shapes import SHAPES, Shape, shape_tables
from PIL import Image

from pipeline import codecs
from pipeline.cache.commit import claim_identity
from pipeline.cache.snapshot import build_snapshot
from pipeline.carve_shard import ShardCarver
from pipeline.carved_cache import CarvedCache, open_cache
from pipeline.config import parse_config
from pipeline.consumers.hf import prepare, weighted_generate
from pipeline.consumers.kv_artefact import PrefixArtefact, open_prefixes
from pipeline.consumers.kv_prefix import prepare_prefixed
from pipeline.consumers.kv_writer import write_prefixes
from pipeline.demo.corpus import read_images, read_photos
from pipeline.demo.model import copy_model
from pipeline.demo.quiz import draw_quiz
from pipeline.evaluation.answers import load_model
from pipeline.evaluation.questions import is_right
from pipeline.job import resolve_job
from pipeline.source import expand_shards
from pipeline.storage import open_store
from pipeline.types import Placement

PAGE = Path(__file__).with_suffix(".md")
SEED = "kv_prefix"
PROMPT, QUESTION = "<image>", " {prompt}"
MAX_NEW_TOKENS = 4  # the longest answers have 3 words and an end
TIMED = ("int8", "int4")  # codecs of prefixes whose first token is timed
BATCH = 64  # prompts

log = logging.getLogger("kv_prefix")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to carve."""

    name: str
    carver: Mapping[str, Any]
    placement: Placement


SETTINGS = (
    Setting(name="all 144", carver={"name": "identity"}, placement="packed"),
    Setting(
        name="32 of 144",
        carver={"name": "carve_default", "options": {"keep_tokens": 32}},
        placement="weighted",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question about one picture."""

    key: str
    prompt: str
    answer: str


@dataclass(kw_only=True)
class Bench:
    """The model, the pictures, and the caches of them."""

    work_dir: Path
    num_images: int
    rounds: int

    def __post_init__(self) -> None:
        copy_model(self.work_dir / "model")
        self.model, self.processor = load_model(str(self.work_dir / "model"))
        self.shard = self.work_dir / f"pictures-{self.num_images}.tar"
        if not self.shard.is_file():
            draw_shard(self.shard, self.num_images)
        self.questions = list(read_questions(self.shard))
        self.caches = {setting.name: self.carve(setting) for setting in SETTINGS}

    def carve(self, setting: Setting) -> CarvedCache:
        """Carve the pictures in this process, or find that done."""
        url = str(self.work_dir / f"cache-{self.num_images}-{setting.name.replace(' ', '-')}")
        values = {
            "input": {"shards": str(self.shard), "columns": ["json"]},
            "output": {"url": url},
            "encoder": {
                "name": "llava",
                "options": {"model": str(self.work_dir / "model"), "stage": "projected"},
            },
            "carver": setting.carver,
            "codec": {"name": "int8"},
        }
        job = resolve_job(parse_config(values, where="kv_prefix.py"))
        store = open_store(url)
        if not store.exists("carve.json"):
            claim_identity(store, job.identity)
            carver = ShardCarver(job)
            carver.load()
            for shard in expand_shards(str(self.shard)):
                carver.carve(shard)
            carver.close()
            build_snapshot(store)
        return open_cache(url)

    def artefact(self, setting: Setting, codec: str) -> PrefixArtefact:
        """Make the prefixes of a cache, or find that done."""
        cache = self.caches[setting.name]
        write_prefixes(
            cache,
            self.model,
            self.processor,
            prompt=PROMPT,
            codec=codec,
            placement=setting.placement,
        )
        return open_prefixes(cache, self.model, self.processor, codec)

    def said(self, inputs: dict[str, Any]) -> list[str]:
        """Answer a batch of prompts greedily."""
        with torch.inference_mode():
            ids = weighted_generate(
                self.model, inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False
            )
        new = ids[:, inputs["input_ids"].shape[1] :]
        return [str(t) for t in self.processor.batch_decode(new, skip_special_tokens=True)]

    def from_tokens(self, setting: Setting) -> list[str]:
        """Answer all questions from the cache."""
        answers = []
        for batch in batches(self.questions, BATCH):
            inputs = prepare(
                self.model,
                self.processor,
                [PROMPT + QUESTION.format(prompt=asked.prompt) for asked in batch],
                each_once(self.caches[setting.name].get_many, [asked.key for asked in batch]),
                placement=setting.placement,
            )
            answers += self.said(inputs)
        return answers

    def from_prefixes(self, prefixes: PrefixArtefact) -> list[str]:
        """Answer all questions from an artefact."""
        answers = []
        for batch in batches(self.questions, BATCH):
            inputs = prepare_prefixed(
                self.model,
                self.processor,
                each_once(prefixes.get_many, [asked.key for asked in batch]),
                [QUESTION.format(prompt=asked.prompt) for asked in batch],
            )
            answers += self.said(inputs)
        return answers


def draw_shard(path: Path, num_images: int) -> None:
    """Write pictures with their questions as one webdataset shard."""
    rng, photos = random.Random(SEED), list(read_photos().values())
    unfinished = path.with_suffix(".unfinished")
    with tarfile.open(unfinished, "w") as tar:
        for number in range(num_images):
            quiz = draw_quiz(rng, photos)
            image = io.BytesIO()
            quiz.image.save(image, "jpeg", quality=rng.randint(85, 95))
            asked = [{"prompt": q.prompt, "answer": q.answer} for q in quiz.questions]
            about = json.dumps({"questions": asked}).encode()
            for suffix, content in (("jpg", image.getvalue()), ("json", about)):
                member = tarfile.TarInfo(f"picture-{number:05d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    unfinished.replace(path)


def read_questions(shard: Path) -> Iterator[Asked]:
    """Yield all questions of a shard."""
    with tarfile.open(shard) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.name.endswith(".json") else None
            if content is not None:
                key = member.name.removesuffix(".json")
                for question in json.load(content)["questions"]:
                    yield Asked(key=key, **question)


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Cut a sequence."""
    return (items[start : start + size] for start in range(0, len(items), size))


def each_once(get_many: Callable[[list[str]], list[Any]], keys: list[str]) -> list[Any]:
    """Return what belongs to each key, read once for those that stand several times."""
    unique = list(dict.fromkeys(keys))
    found = dict(zip(unique, get_many(unique), strict=True))
    return [found[key] for key in keys]


def row_bytes(cache: CarvedCache) -> float:
    """Return the mean bytes of a row of a cache: packed tokens, positions, sizes, checksums."""
    places = cache.reader.find_many(list(cache.keys()))
    return statistics.mean(place.tokens_length + place.aux_length for place in places)


def answers_table(bench: Bench, setting: Setting) -> None:
    """Print what each codec's prefixes take, and what is answered from them."""
    tokens = bench.from_tokens(setting)
    right = [is_right(a, q.answer) for a, q in zip(tokens, bench.questions, strict=True)]
    size = row_bytes(bench.caches[setting.name])
    share = statistics.mean(right)
    print(f"\n### {setting.name} tokens, {setting.placement}\n")
    print("| stored | bytes an image | times the tokens | same answer | right |")
    print("|---|--:|--:|--:|--:|")
    print(f"| tokens, int8 | {size:,.0f} | 1.0 | | {share:.1%} |")
    for codec in codecs.names():
        started = time.perf_counter()
        prefixes = bench.artefact(setting, codec)
        found = bench.from_prefixes(prefixes)
        keys = list(prefixes.keys())
        stored = statistics.mean(prefixes.row_bytes(key) for key in keys)
        same = statistics.mean(a == b for a, b in zip(found, tokens, strict=True))
        good = [is_right(a, q.answer) for a, q in zip(found, bench.questions, strict=True)]
        print(
            f"| keys and values, {codec} | {stored:,.0f} | {stored / size:.1f} | {same:.2%} | "
            f"{statistics.mean(good):.1%} |",
            flush=True,
        )
        log.info("%s, %s: %.0f s", setting.name, codec, time.perf_counter() - started)


def timed(forms: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Return each form's seconds of CPU in rounds of all; the first round is not counted.

    One thread does all there is to do, and files lie in memory: on a machine that does nothing else
    it takes that long.
    """
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(rounds + 1):
        for name, form in forms.items():
            started = time.process_time()
            form()
            if turn:
                seconds[name].append(time.process_time() - started)
    return seconds


def times_table(seconds: Mapping[str, Sequence[float]], base: str) -> None:
    """Print medians in milliseconds, and the median of the ratios within a round."""
    print("| from | ms, median | times the tokens' |\n|---|--:|--:|")
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds[base], strict=True)]
        print(f"| {name} | {1000 * statistics.median(own):.1f} | {statistics.median(ratios):.2f} |")


def first_token(bench: Bench, setting: Setting) -> None:
    """Print how long a first token takes from pixels, from tokens and from prefixes."""
    cache, rng = bench.caches[setting.name], random.Random(SEED)
    chosen = rng.sample(bench.questions, bench.rounds + 1)
    encoded = read_images([bench.shard], [asked.key for asked in chosen])
    turns = {name: iter(chosen) for name in ("pixels", "tokens, int8", *TIMED)}
    artefacts = {codec: bench.artefact(setting, codec) for codec in TIMED}

    def first(inputs: dict[str, Any]) -> None:
        with torch.inference_mode():
            weighted_generate(bench.model, inputs, max_new_tokens=1, do_sample=False)

    def from_pixels() -> None:
        asked = next(turns["pixels"])
        with Image.open(io.BytesIO(encoded[asked.key])) as image:
            text = PROMPT + QUESTION.format(prompt=asked.prompt)
            first(bench.processor(images=image.convert("RGB"), text=text, return_tensors="pt"))

    def from_tokens() -> None:
        asked = next(turns["tokens, int8"])
        text = PROMPT + QUESTION.format(prompt=asked.prompt)
        images = [cache[asked.key]]
        first(prepare(bench.model, bench.processor, [text], images, placement=setting.placement))

    def from_prefix(codec: str) -> None:
        asked = next(turns[codec])
        prefixes = [artefacts[codec][asked.key]]
        question = QUESTION.format(prompt=asked.prompt)
        first(prepare_prefixed(bench.model, bench.processor, prefixes, [question]))

    forms: dict[str, Callable[[], None]] = {"pixels": from_pixels, "tokens, int8": from_tokens}
    for codec in TIMED:
        forms[f"keys and values, {codec}"] = lambda codec=codec: from_prefix(codec)
    print(f"\n### {setting.name} tokens, the yardstick\n")
    times_table(timed(forms, bench.rounds), "tokens, int8")


def first_token_of_shape(shape: Shape, rounds: int) -> None:
    """Print the same for a decoder of another shape, with random weights, and without pixels."""
    print(f"\n### {shape.timed_tokens} tokens, a decoder of the shape of {shape.name}\n")
    print(SHAPE_NOTE)
    times_table(timed(shape.forms(TIMED), rounds), "tokens, int8")


BEGIN = """# Stored keys and values beside stored tokens

Written by this command; by hand only what stands under *What this means*:

    python benchmarks/kv_prefix.py --work-dir DIR --write-page
"""
SHAPE_NOTE = """\
Random weights, a vocabulary of 16 words, a question of 16; nothing is read from disk.
"""
NOTES = ("<!-- by hand: begin -->\n", "<!-- by hand: end -->")


def with_notes(page: str, known: str) -> str:
    """Return a page with what was written by hand on the one before."""
    begin, end = NOTES
    notes = known.partition(begin)[2].partition(end)[0]
    return page.replace(begin + end, begin + notes + end)


def report(options: argparse.Namespace) -> None:
    """Measure, and print the page."""
    options.work_dir.mkdir(parents=True, exist_ok=True)
    bench = Bench(work_dir=options.work_dir, num_images=options.images, rounds=options.rounds)
    load = os.getloadavg()[0]
    print(BEGIN)
    print(f"- {hardware()}, {os.cpu_count()} logical cores, one thread of them; load {load:.1f}")
    print(f"- torch {torch.__version__}, transformers {transformers.__version__}, float32")
    print(
        f"- {options.images} drawn pictures that training never saw (seed `{SEED}`), "
        f"{len(bench.questions):,} questions; greedy answers"
    )
    encoded = read_images([bench.shard], sorted({asked.key for asked in bench.questions}))
    mean_jpeg = statistics.mean(len(content) for content in encoded.values())
    print(f"- the JPEG of a picture has {mean_jpeg:,.0f} bytes on average")
    print(f"\n## What this means\n\n{NOTES[0]}{NOTES[1]}")
    print("\n## Bytes and answers, measured on the yardstick")
    for setting in SETTINGS:
        answers_table(bench, setting)
    print("\n## Bytes of larger models, computed\n")
    shape_tables()
    print("\n## Time to the first token: CPU time of one thread, measured\n")
    print("Reading (from the page cache), unpacking, tokenizing and the model's work together.")
    for setting in SETTINGS:
        first_token(bench, setting)
    for shape in SHAPES:
        if shape.timed_tokens:
            first_token_of_shape(shape, options.shape_rounds)


def main() -> None:
    """Parse the options, and print the page or write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--shape-rounds", type=int, default=3)
    parser.add_argument("--write-page", action="store_true", help="instead of printing it")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    if not options.write_page:
        report(options)
        return
    page = io.StringIO()
    with contextlib.redirect_stdout(page):
        report(options)
    known = PAGE.read_text() if PAGE.is_file() else ""
    PAGE.write_text(with_notes(page.getvalue(), known))


if __name__ == "__main__":
    main()
