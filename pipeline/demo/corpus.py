"""A small image corpus made on the spot: webdataset shards, the same bytes every time.

Real photographs cropped and re-encoded in many ways, drawn scenes, text, pictures with questions,
and a few samples that are broken on purpose. Which bytes come out depends on the seed and on the
version of Pillow only.
"""

import io
import json
import os
import random
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.demo.quiz import draw_quiz
from pipeline.demo.scenes import draw_scene, draw_text

NUM_SHARDS = 6
IMAGES_PER_SHARD = 40

PHOTOS: Mapping[str, str] = {
    "astronaut": "a smiling astronaut in an orange suit before a flag",
    "brick": "a wall of bricks",
    "camera": "a man with a camera on a tripod in the grass",
    "chelsea": "the face of a ginger cat",
    "coffee": "a cup of coffee on a saucer with a spoon",
    "coins": "old coins in rows",
    "grass": "a lawn of short grass",
    "hubble_deep_field": "many galaxies in a black sky",
    "rocket": "a white rocket that stands on its launch pad",
}
"""What each photograph shows; credits are in `photos/README.md`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """One way to break a sample."""

    name: str
    suffix: str  # of the image member
    reason: str  # what a job must reject it for


DAMAGES: Sequence[Damage] = (
    Damage(name="half_jpeg", suffix="jpg", reason="corrupt_image"),
    Damage(name="text", suffix="jpg", reason="not_an_image"),
    Damage(name="half_png", suffix="png", reason="corrupt_image"),
    Damage(name="no_bytes", suffix="jpg", reason="empty_image"),
    Damage(name="half_webp", suffix="webp", reason="corrupt_image"),
    Damage(name="text", suffix="png", reason="not_an_image"),
)
"""One sample of each shard is broken, in these ways by turns."""

_DAMAGED_PLACE = 17  # of the images of a shard
_PERIOD = 20  # of the kinds of image: photographs, then
_FIRST_SCENE, _FIRST_QUIZ, _FIRST_TEXT = 11, 13, 18
_MIN_SIDE, _MAX_SIDE, _MAX_ASPECT = 200, 900, 2.0
_SUFFIXES = {"jpeg": "jpg", "png": "png", "webp": "webp"}
_FORMATS = {suffix: name for name, suffix in _SUFFIXES.items()}
_ORIENTATION_TAG, _QUARTER_TURN = 0x0112, 6


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusSample:
    """One sample of a shard."""

    key: str
    members: Mapping[str, bytes]  # by suffix: the image, json and txt
    caption: str
    format: str  # of the image: jpeg, png, webp
    damage: Damage | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """What `write_corpus` wrote."""

    shards: Sequence[Path]
    num_images: int  # the broken ones among them
    num_bytes: int  # of the shards
    formats: Mapping[str, int]  # whole images by format
    broken: Mapping[str, int]  # broken samples by the reason a job must reject them for
    captions: Sequence[str]


def write_corpus(
    folder: Path,
    *,
    num_shards: int = NUM_SHARDS,
    images_per_shard: int = IMAGES_PER_SHARD,
    seed: int = 0,
) -> Corpus:
    """Write the shards `shard-00000.tar`, ... of a corpus.

    A shard that is there with the same bytes is left alone, so that a job that has carved it
    finds it unchanged.

    Args:
        folder: made if it does not exist.
        num_shards: at least 1.
        images_per_shard: at least 1; from 18 on, one image of each shard is broken.
        seed: of everything random.
    """
    photos = read_photos()
    shards, samples = [], []
    with ThreadPoolExecutor(2) as pool:
        for shard in range(num_shards):
            made = pool.map(
                lambda place, shard=shard: _make_sample(
                    photos, random.Random(f"{seed}/{shard}/{place}"), shard, place
                ),
                range(images_per_shard),
            )
            samples += (of_shard := list(made))
            shards.append(folder / f"shard-{shard:05d}.tar")
            write_if_changed(shards[-1], _tar(of_shard))
    return Corpus(
        shards=shards,
        num_images=len(samples),
        num_bytes=sum(path.stat().st_size for path in shards),
        formats=Counter(s.format for s in samples if s.damage is None),
        broken=Counter(s.damage.reason for s in samples if s.damage is not None),
        captions=[s.caption for s in samples],
    )


def read_images(shards: Sequence[Path], keys: Sequence[str]) -> dict[str, bytes]:
    """Return the encoded images of some keys."""
    wanted = {f"{key}.{suffix}": key for key in keys for suffix in _FORMATS}
    found = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                content = tar.extractfile(member) if member.name in wanted else None
                if content is not None:
                    found[wanted[member.name]] = content.read()
    return found


def write_if_changed(path: Path, content: bytes) -> None:
    """Write a file whole, unless it holds these very bytes; then its time stays what it was."""
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def read_photos() -> dict[str, Image.Image]:
    """Return the photographs that come with the package, in their own modes, by name."""
    folder = resources.files("pipeline.demo") / "photos"
    photos = {}
    for name in PHOTOS:
        with Image.open(io.BytesIO((folder / f"{name}.jpg").read_bytes())) as photo:
            photo.load()
            photos[name] = photo.copy()  # in its own mode: four of them are grey
    return photos


def _make_sample(
    photos: Mapping[str, Image.Image], rng: random.Random, shard: int, place: int
) -> CorpusSample:
    kind = _kind(place)
    damage = DAMAGES[shard % len(DAMAGES)] if kind == "broken" else None
    image, caption, about = _draw(kind, photos, rng)
    encoding = _choose_encoding(kind, rng) if damage is None else _plain_encoding(damage.suffix)
    data = _encode(image, encoding)
    about |= {"kind": kind, "size": list(image.size), "encoding": encoding}
    if damage is not None:
        data = _break(data, damage)
        about["damage"] = damage.name
    suffix = _SUFFIXES[encoding["format"]]
    described = json.dumps(about, sort_keys=True).encode()
    return CorpusSample(
        key=f"{kind}-{shard:02d}{place:02d}",
        members={suffix: data, "json": described, "txt": caption.encode()},
        caption=caption,
        format=encoding["format"],
        damage=damage,
    )


def _kind(place: int) -> str:
    if place == _DAMAGED_PLACE:
        return "broken"
    if place % _PERIOD < _FIRST_SCENE:
        return "photo"
    if place % _PERIOD < _FIRST_QUIZ:
        return "scene"
    return "quiz" if place % _PERIOD < _FIRST_TEXT else "text"


def _draw(
    kind: str, photos: Mapping[str, Image.Image], rng: random.Random
) -> tuple[Image.Image, str, dict[str, Any]]:
    """Return an image, its caption, and where it comes from."""
    if kind == "quiz":
        return _draw_quiz(photos, rng)
    width = rng.randint(_MIN_SIDE, _MAX_SIDE)
    height = rng.randint(
        max(_MIN_SIDE, round(width / _MAX_ASPECT)), min(_MAX_SIDE, round(width * _MAX_ASPECT))
    )
    if kind == "scene":
        return (*draw_scene(rng, width, height), {"source": "drawn"})
    if kind == "text":
        return (*draw_text(rng, width, height), {"source": "drawn"})
    name = rng.choice(sorted(PHOTOS))
    photo = photos[name]
    box = _crop_box(rng, photo.size, width / height)
    image = photo.resize((width, height), Image.Resampling.BICUBIC, box=box)
    about: dict[str, Any] = {"source": f"{name}.jpg", "crop": list(box)}
    if rng.random() < 0.3:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        about["mirrored"] = True
    return image, PHOTOS[name], about


def _draw_quiz(
    photos: Mapping[str, Image.Image], rng: random.Random
) -> tuple[Image.Image, str, dict[str, Any]]:
    quiz = draw_quiz(rng, list(photos.values()))
    asked = [asdict(question) for question in quiz.questions]
    about = {"source": "drawn", "questions": asked}
    return quiz.image, f"a picture with {len(asked)} questions", about


def _crop_box(
    rng: random.Random, size: tuple[int, int], aspect: float
) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom of a random part of a photograph."""
    largest = min(size[0], size[1] * aspect)
    wide = largest * rng.uniform(0.5, 1)
    tall = wide / aspect
    left, top = rng.uniform(0, size[0] - wide), rng.uniform(0, size[1] - tall)
    return int(left), int(top), int(left + wide), int(top + tall)


def _choose_encoding(kind: str, rng: random.Random) -> dict[str, Any]:
    """Return the format and its options in Pillow's words; `colors` and `turned` are ours."""
    if kind == "quiz":
        return {"format": "jpeg", "quality": rng.randint(85, 95)}
    weights = (1, 4, 2) if kind == "text" else (6, 1, 3)
    name = rng.choices(("jpeg", "png", "webp"), weights)[0]
    if name == "png":
        return {"format": "png", "colors": rng.choice([None, 64, 256])}
    if name == "webp":
        is_lossless = kind == "text" or rng.random() < 0.1
        return {"format": "webp", "quality": rng.randint(50, 95), "lossless": is_lossless}
    return {
        "format": "jpeg",
        "quality": rng.randint(50, 95),
        "subsampling": rng.choice([0, 2]),
        "progressive": rng.random() < 0.3,
        "turned": rng.random() < 0.1,
    }


def _plain_encoding(suffix: str) -> dict[str, Any]:
    return {"format": _FORMATS[suffix]}


def _encode(image: Image.Image, encoding: Mapping[str, Any]) -> bytes:
    options = {k: v for k, v in encoding.items() if k not in ("colors", "turned")}
    if encoding.get("colors"):
        image = image.quantize(encoding["colors"])
    if encoding.get("turned"):
        # As a camera held upright stores it: turned, with a note to turn it back.
        exif = Image.Exif()
        exif[_ORIENTATION_TAG] = _QUARTER_TURN
        image, options["exif"] = image.transpose(Image.Transpose.ROTATE_90), exif
    if options["format"] == "webp":
        options["method"] = 2  # of 0 to 6: half the time of the default
    sink = io.BytesIO()
    image.save(sink, **options)
    return sink.getvalue()


def _break(data: bytes, damage: Damage) -> bytes:
    if damage.name == "no_bytes":
        return b""
    if damage.name == "text":
        return b"This is not an image, whatever its name says.\n"
    return data[: len(data) // 2]


def _tar(samples: Sequence[CorpusSample]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for suffix, content in sample.members.items():
                member = tarfile.TarInfo(f"{sample.key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return sink.getvalue()
