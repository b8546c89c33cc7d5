"""The demo's model: the yardstick, a small LLaVA trained on the pictures with questions.

`benchmarks/yardstick` trains it; its checkpoint comes with the package and goes through the code
that loads any checkpoint. It knows the pictures of `quiz.py` and nothing else.
"""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pipeline.consumers.hf import prepare, weighted_generate
from pipeline.consumers.placement import HasPlaces
from pipeline.demo.corpus import write_if_changed
from pipeline.evaluation.answers import load_model

TEMPLATE = "<image> {prompt}"
"""How a question is put to the model."""

_MAX_WORDS = 4  # of an answer, its end among them
_BATCH = 64  # prompts


def copy_model(folder: Path) -> None:
    """Write the checkpoint that comes with the package.

    Args:
        folder: made if it does not exist; a file that is there with these bytes is left alone.
    """
    for file in (resources.files("pipeline.demo") / "yardstick").iterdir():
        if file.is_file():
            write_if_changed(folder / file.name, file.read_bytes())


def answer_both_ways(
    folder: Path,
    questions: Sequence[str],
    images: Sequence[Image.Image],
    carved: Sequence[HasPlaces],
) -> list[tuple[str, str]]:
    """Ask the model each question twice: with the image's pixels, and with cached tokens instead.

    Args:
        folder: a checkpoint.
        questions: one for each image.
        images: RGB.
        carved: for each image its projected tokens, as a cache gives them; they stand where they
            stood, and count for as many as they stand for.

    Returns:
        For each question the answer from all tokens and the one from the carved tokens.
    """
    model, processor = load_model(str(folder))
    answers: list[tuple[str, str]] = []
    for start in range(0, len(questions), _BATCH):
        part = slice(start, start + _BATCH)
        prompts = [TEMPLATE.format(prompt=question) for question in questions[part]]
        pixels = list(images[part])
        from_pixels = processor(images=pixels, text=prompts, padding=True, return_tensors="pt")
        from_cache = prepare(
            model, processor, prompts, carved[part], stage="projected", placement="weighted"
        )
        both = [_generate(model, processor, inputs) for inputs in (from_pixels, from_cache)]
        answers += zip(*both, strict=True)
    return answers


def _generate(model: Any, processor: Any, inputs: Any) -> list[str]:  # noqa: ANN401
    with torch.inference_mode():
        output = weighted_generate(model, inputs, max_new_tokens=_MAX_WORDS)
    answers = output[:, inputs["input_ids"].shape[1] :]
    return [str(t) for t in processor.batch_decode(answers, skip_special_tokens=True)]
