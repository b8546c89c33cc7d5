"""Put one prompt to images of a cache, and print what the model says; pixels are not needed.

    python examples/generate_from_cache.py --cache demo/cache --model demo/model \
        --template '<image> {prompt}' --prompt 'what color is the star' --first 8

prints a line of key and answer for each image, on stdout; the progress bar is on stderr.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cached_model import add_model_options, batched, load_cached_model, run
from rich.console import Console
from rich.progress import track

from pipeline import open_cache
from pipeline.errors import ConfigError


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_model_options(parser)
    parser.add_argument("--prompt", required=True, help="what is asked of every image")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--keys", nargs="+", metavar="KEY", help="of the images")
    which.add_argument("--first", type=int, default=16, help="so many images; default: 16")
    parser.add_argument("--trained", type=Path, help="folder of finetune_from_cache.py")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of an answer; default: 64")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0, the default, for the likeliest words"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the words, at a temperature")
    options = parser.parse_args(arguments)
    for name in ("batch_size", "first", "max_new_tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.temperature < 0:
        parser.error("--temperature must be at least 0")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer, batch by batch."""
    options = parse_options(arguments)
    cache = open_cache(options.cache, keep_tokens=options.keep_tokens)
    keys = options.keys or list(itertools.islice(cache.keys(), options.first))
    if not keys:
        raise ConfigError(f"{options.cache} holds no image")
    language = load_cached_model(cache, options, trained=options.trained)
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature:
        sampling = {"do_sample": True, "temperature": options.temperature}
    torch.manual_seed(options.seed)
    batches = list(batched(keys, options.batch_size))
    for batch in track(batches, "answering", console=Console(stderr=True)):
        images = cache.get_many(batch, device=options.device)
        prompts = [options.prompt] * len(batch)
        answers = language.answer(
            images, prompts, max_new_tokens=options.max_new_tokens, **sampling
        )
        for key, answer in zip(batch, answers, strict=True):
            print(f"{key}\t{' '.join(answer.text.split())}", flush=True)


if __name__ == "__main__":
    run(main)
