"""Webdataset shards of pictures with questions, and beside each shard its targets for the tower."""

import io
import json
import os
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image
from targets import image_targets, patch_targets

from pipeline.demo.corpus import read_photos
from pipeline.demo.quiz import Quiz, draw_page, draw_quiz, draw_scene

PER_SHARD = 500
_QUALITY = (85, 95)  # of the JPEGs

DRAW: dict[str, Callable[[random.Random, Sequence[Image.Image]], Quiz]] = {
    "quiz": draw_quiz,
    "scene": draw_scene,
    "page": lambda rng, _: draw_page(rng),
}


def write_pictures(folder: Path, *, kind: str, num_images: int, seed: str, processes: int) -> None:
    """Write `KIND-00000.tar` with members jpg and json, and `KIND-00000.npz` with the targets.

    The same bytes for the same arguments and version of Pillow. Shards that are there are kept.

    Args:
        folder: made if it does not exist.
        kind: of `DRAW`.
        num_images: a multiple of `PER_SHARD`.
        seed: of everything random; training and held-out pictures differ in it.
        processes: that draw at once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write = partial(_write_shard, folder, kind, seed)
    with ProcessPoolExecutor(processes) as pool:
        list(pool.map(write, range(num_images // PER_SHARD)))


def read_pixels(shard: Path) -> Iterator[tuple[np.ndarray, dict]]:
    """Yield the pixels (EDGE, EDGE, 3) uint8 and the JSON of each picture of a shard."""
    with tarfile.open(shard) as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is None:
                raise ValueError(f"{shard}: {member.name} is not a file")
            if member.name.endswith(".jpg"):
                with Image.open(content) as image:
                    pixels = np.asarray(image.convert("RGB"))
            else:
                yield pixels, json.load(content)


def _write_shard(folder: Path, kind: str, seed: str, number: int) -> None:
    path = folder / f"{kind}-{number:05d}.tar"
    if path.exists():
        return
    patches, images = [], []
    unfinished = path.with_suffix(".unfinished")
    with tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT) as tar:
        for place in range(PER_SHARD):
            key = f"{kind}-{number:05d}-{place:03d}"
            rng = random.Random(f"{seed}/{key}")
            quiz = DRAW[kind](rng, _photos())
            patches.append(patch_targets(quiz))
            images.append(image_targets(quiz))
            sink = io.BytesIO()
            quiz.image.save(sink, "JPEG", quality=rng.randint(*_QUALITY))
            asked = [asdict(question) for question in quiz.questions]
            _add(tar, f"{key}.jpg", sink.getvalue())
            _add(tar, f"{key}.json", json.dumps({"questions": asked}).encode())
    np.savez(path.with_suffix(".npz"), patches=np.stack(patches), images=np.stack(images))
    os.replace(unfinished, path)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@cache
def _photos() -> list[Image.Image]:
    return list(read_photos().values())
