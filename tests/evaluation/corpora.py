"""A corpus with questions, and the evaluation of a tiny model on it."""

import json
from pathlib import Path
from typing import Any

from pipeline.evaluation.settings import EvaluationConfig, parse_evaluation
from tests.fakes import encoded_image, write_tar

TEMPLATE = "USER: <image> {prompt} ASSISTANT:"
QUESTIONS = [
    {"prompt": "how many dogs ?", "answer": "w30", "family": "count"},
    {"prompt": "what is in this picture ?", "answer": "cats", "family": "name"},
    {"prompt": "is this right ?", "family": "name"},
]


def write_images(folder: Path, *, num_images: int = 6, broken: int = 0) -> Path:
    """Write one shard of images with their questions, and some that cannot be decoded."""
    members: list[tuple[str, bytes]] = []
    for place in range(num_images + broken):
        image = encoded_image(place)
        key = f"i{place:03d}"
        members.append((f"{key}.jpg", image if place < num_images else image[: len(image) // 2]))
        content = {"caption": "any", "questions": QUESTIONS[: 1 + place % 3]}
        members.append((f"{key}.json", json.dumps(content).encode()))
    return write_tar(folder / "shard.tar", members)


def config(
    model: Path, shards: Path, output: Path, *, batch_size: int = 4, **evaluation: Any
) -> EvaluationConfig:
    return parse_evaluation(
        {
            "input": {"shards": str(shards)},
            "output": str(output),
            "encoder": {
                "name": "llava",
                "options": {"model": str(model), "stage": "projected"},
            },
            "evaluation": {
                "carvers": ["divprune", "tome"],
                "budgets": ["1/2", "1/4"],
                "column": "json",
                "template": TEMPLATE,
                "max_new_tokens": 3,
                "resamples": 100,
                "stability_images": 2,
                **evaluation,
            },
            "runner": {
                "batch_size": batch_size,
                "num_actors": 2,
                "gpus_per_actor": 0,
            },
        }
    )
