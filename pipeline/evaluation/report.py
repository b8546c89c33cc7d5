"""What people read of an evaluation: `results.md` and `results.html`, beside its tables."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from pipeline import encoders
from pipeline.decode import decode_image
from pipeline.errors import ConfigError
from pipeline.evaluation.drawing import SeenImage
from pipeline.evaluation.images import AskedImage
from pipeline.evaluation.markdown import render_markdown
from pipeline.evaluation.means import Means, parse_summary
from pipeline.evaluation.page import render_page
from pipeline.evaluation.records import POSITIONS_OF
from pipeline.evaluation.results import read_summary, read_tables
from pipeline.evaluation.show import see_images
from pipeline.evaluation.task import EvaluationTask
from pipeline.evaluation.worst import WorstCase, find_worst

MARKDOWN_FILE, PAGE_FILE = "results.md", "results.html"


def write_report(task: EvaluationTask, *, device: str | None = None) -> list[Path]:
    """Write both files from the tables and the summary that an evaluation left.

    Images of the worst answers are read, and encoded once more to learn where their tokens lie.

    Args:
        task: that was measured; its output holds the results.
        device: a torch device; None for a GPU where there is one.

    Returns:
        The files.

    Raises:
        CacheFormatError: there are no results, or of another version.
        ConfigError: the weights cannot be loaded.
        StorageError: the images cannot be read.
    """
    folder = Path(task.config.output)
    means = parse_summary(read_summary(folder))
    images = _first_images(task)
    worst = _worst(task, means, images)
    problem, seen = "", dict[str, SeenImage]()
    try:
        seen = _see(task, [images[key] for key in dict.fromkeys(c.key for c in worst)], device)
    except ConfigError as err:
        problem = str(err)  # stands on the page: the numbers do not depend on pictures
    contents = {
        MARKDOWN_FILE: render_markdown(means),
        PAGE_FILE: render_page(means, worst=worst, seen=seen, problem=problem),
    }
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")
    return [folder / name for name in contents]


def _first_images(task: EvaluationTask) -> dict[str, AskedImage]:
    """Return the images of which the kept tokens are stored, still encoded, by key."""
    asked = itertools.islice(task.source.asked(task.questions, Counter()), POSITIONS_OF)
    return {image.sample.key: image for image in asked}


def _worst(task: EvaluationTask, means: Means, images: Mapping[str, AskedImage]) -> list[WorstCase]:
    prompts = {
        (key, index): question.prompt
        for key, image in images.items()
        for index, question in enumerate(image.questions)
    }
    return find_worst(means, *read_tables(task.config.output), keys=images.keys(), prompts=prompts)


def _see(
    task: EvaluationTask, images: Sequence[AskedImage], device: str | None
) -> dict[str, SeenImage]:
    """Return what the model saw of some images, by key."""
    if not images:
        return {}
    encoder = encoders.build(task.config.encoder.name, task.config.encoder.options)
    dtype = getattr(torch, task.config.runner.dtype)
    encoder.load(device=device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype=dtype)
    samples = [image.sample for image in images]
    prepared = [
        encoder.preprocess(decode_image(sample.image, key=sample.key, options=task.decode))
        for sample in samples
    ]
    seen = see_images(encoder, prepared, batch_size=task.config.runner.batch_size)
    return {sample.key: image for sample, image in zip(samples, seen, strict=True)}
