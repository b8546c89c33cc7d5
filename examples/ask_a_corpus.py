"""Ask every image of a cache the same question, and store the answers as Parquet.

    python examples/ask_a_corpus.py --cache demo/cache --model demo/model \
        --template '<image> {prompt}' --question 'what color is the star' --output answers

writes `answers/part-00000.parquet`, ... with the columns key, answer, num_tokens (of the answer,
its end token among them) and num_visual_tokens. The output may be on any store. Stopped, even
killed, the same command goes on with the images that have no stored answer; so it also answers
what a cache gained since. `answers/_question.json` holds what was asked: other options are refused.
"""

import argparse
import io
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from cached_model import CachedModel, add_model_options, batched, load_cached_model, run
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline import open_cache
from pipeline.carved_cache import CachedImage, CarvedCache
from pipeline.errors import AlreadyExistsError, ConfigError
from pipeline.stop_signal import StopSignals
from pipeline.storage import Store, open_store

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("num_visual_tokens", pa.int32(), nullable=False),
    ]
)
_ASKED = "_question.json"  # readers of a folder of Parquet files pass over the underscore
_PART = re.compile(r"part-(\d{5,})\.parquet")
# What decides an answer, but for the last bits: not how many images are asked at once, or where.
_DECIDING = (
    "cache", "model", "revision", "trained", "question", "template", "keep_tokens", "placement",
    "dtype", "max_new_tokens",
)  # fmt: skip


@dataclass(kw_only=True)
class AnswerParts:
    """The answers on a store: parts that are written whole, once, and never changed."""

    store: Store
    rows_per_part: int
    next_number: int = 0
    rows: list[dict[str, object]] = field(default_factory=list)

    def read_keys(self) -> set[str]:
        """Return the keys that have answers; some 100 bytes of memory each."""
        keys: set[str] = set()
        for entry in self.store.list():
            if found := _PART.fullmatch(entry.path):
                self.next_number = max(self.next_number, int(found[1]) + 1)
                table = pq.read_table(io.BytesIO(self.store.read(entry.path)), columns=["key"])
                keys.update(table["key"].to_pylist())
        return keys

    def add(self, rows: Sequence[dict[str, object]]) -> None:
        """Take answers; write a part when there are enough."""
        self.rows += rows
        if len(self.rows) >= self.rows_per_part:
            self.write()

    def write(self) -> None:
        """Write what was taken since the last part.

        Raises:
            ConfigError: another process writes here too.
        """
        if not self.rows:
            return
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self.rows, schema=SCHEMA), sink, compression="zstd")
        path = f"part-{self.next_number:05d}.parquet"
        try:
            self.store.put_once(path, sink.getvalue())
        except AlreadyExistsError as err:
            raise ConfigError(
                f"{self.store.url_of(path)} is there already: another process is writing answers "
                "here; let it end, or choose another --output"
            ) from err
        self.next_number += 1
        self.rows = []


def claim(store: Store, options: argparse.Namespace) -> None:
    """Write down what is asked, or check that it is what was asked here before.

    Raises:
        ConfigError: it is not; names the first option that differs.
    """
    asked = {name: getattr(options, name) for name in _DECIDING}
    asked = json.loads(json.dumps(asked, default=str))
    try:
        store.put_once(_ASKED, json.dumps(asked, indent=1).encode())
    except AlreadyExistsError as err:
        before = json.loads(store.read(_ASKED))
        for name, value in asked.items():
            if before.get(name) != value:
                raise ConfigError(
                    f"{store.url} holds answers with {name} {before.get(name)!r}, not {value!r}; "
                    "choose another --output"
                ) from err


def read_ahead(
    cache: CarvedCache, batches: Sequence[Sequence[str]], device: str
) -> Iterator[list[CachedImage]]:
    """Yield the images of each batch; the next batch is fetched while one is answered."""
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for batch in batches:
            now, coming = coming, pool.submit(cache.get_many, batch, device=device)
            if now is not None:
                yield now.result()
        if coming is not None:
            yield coming.result()


def ask(
    language: CachedModel, images: Sequence[CachedImage], options: argparse.Namespace
) -> list[dict[str, object]]:
    """Return a row of `SCHEMA` for each image."""
    answers = language.answer(
        images,
        [options.question] * len(images),
        max_new_tokens=options.max_new_tokens,
        do_sample=False,
    )
    return [
        {
            "key": image.key,
            "answer": answer.text,
            "num_tokens": answer.num_tokens,
            "num_visual_tokens": len(image.positions),
        }
        for image, answer in zip(images, answers, strict=True)
    ]


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_model_options(parser)
    parser.add_argument("--question", required=True)
    parser.add_argument("--output", required=True, help="folder for the answers; a path or URL")
    parser.add_argument("--trained", type=Path, help="folder of finetune_from_cache.py")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of an answer; default: 64")
    parser.add_argument(
        "--rows-per-part", type=int, default=1000, help="what a kill may cost; default: 1000"
    )
    options = parser.parse_args(arguments)
    for name in ("batch_size", "rows_per_part", "max_new_tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask, batch by batch, until all is answered or a signal comes."""
    options = parse_options(arguments)
    cache = open_cache(options.cache, keep_tokens=options.keep_tokens)
    parts = AnswerParts(store=open_store(options.output), rows_per_part=options.rows_per_part)
    claim(parts.store, options)
    answered = parts.read_keys()
    todo = [key for key in cache if key not in answered]
    console = Console(stderr=True, soft_wrap=True)
    if not todo:
        console.print(f"nothing to do: all {len(cache):,} images have answers in {options.output}")
        return
    language = load_cached_model(cache, options, trained=options.trained)
    batches = list(batched(todo, options.batch_size))
    columns = (TextColumn("asking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with StopSignals() as stop, Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(cache), completed=len(cache) - len(todo))
        try:
            for images in read_ahead(cache, batches, options.device):
                parts.add(ask(language, images, options))
                progress.advance(bar, len(images))
                if stop.requested:
                    break
        finally:  # a damaged row must not cost the answers before it
            parts.write()
    answered = parts.read_keys()  # of keys, too, that the cache had once and has no more
    left = sum(key not in answered for key in todo)
    console.print(f"{options.output}: {len(cache) - left:,} of {len(cache):,} images answered")
    if left:
        console.print("the same command goes on with the rest")
        raise SystemExit(75)  # as a run of this project that was interrupted


if __name__ == "__main__":
    run(main)
