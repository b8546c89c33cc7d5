"""The pictures and questions that `fidelity.py` measures on: held out, and drawn for it alone.

Training draws its pictures from the seeds `train` and `heldout`, see `yardstick/train.py`.
"""

import json
import random
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "yardstick"))

from pictures import PER_SHARD, write_pictures

TEST_SEED, SAMPLE_SEED = "fidelity", "fidelity calibration"

ASKED = {"read": 3, "attribute": 3, "count": 2, "relation": 3, "page": 5}
"""Questions of each family per picture, at most: many pictures tell more than many questions."""

_SCENE_SHARE = 2 / 3


def draw_pictures(folder: Path, num_images: int, *, processes: int) -> tuple[list[str], Path]:
    """Draw scenes and pages, and write the questions that are asked; what is there is kept.

    Returns:
        The shards, and the file of questions of the first pictures of each kind.
    """
    scenes = round(num_images * _SCENE_SHARE)
    wanted = {"scene": scenes, "page": num_images - scenes}
    shards: list[Path] = []
    for kind, count in wanted.items():
        whole = -(-count // PER_SHARD) * PER_SHARD
        write_pictures(folder, kind=kind, num_images=whole, seed=TEST_SEED, processes=processes)
        shards += [folder / f"{kind}-{n:05d}.tar" for n in range(whole // PER_SHARD)]
    questions = folder / f"questions-{num_images}.jsonl"
    lines = [json.dumps(row) for row in _questions(shards, wanted)]
    questions.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [str(path) for path in shards], questions


def draw_sample(folder: Path, *, processes: int) -> list[str]:
    """Draw other pictures of both kinds, for carvers that are calibrated; return their shards."""
    write_pictures(folder, kind="quiz", num_images=PER_SHARD, seed=SAMPLE_SEED, processes=processes)
    return [str(folder / "quiz-00000.tar")]


def count_questions(questions: Path) -> dict[str, int]:
    """Return the number of questions of each family."""
    lines = questions.read_text(encoding="utf-8").splitlines()
    return dict(sorted(Counter(json.loads(line)["family"] for line in lines).items()))


def _questions(shards: Sequence[Path], wanted: dict[str, int]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    taken = Counter[str]()
    for shard in shards:
        kind = shard.name.split("-")[0]
        with tarfile.open(shard) as tar:
            for member in tar:
                if not member.name.endswith(".json") or taken[kind] == wanted[kind]:
                    continue
                content = tar.extractfile(member)
                if content is None:
                    raise ValueError(f"{shard}: {member.name} is not a file")
                key = member.name.removesuffix(".json")
                rows += _choose(key, json.load(content)["questions"])
                taken[kind] += 1
    return rows


def _choose(key: str, questions: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Return some questions of each family, chosen by the picture's key."""
    rng = random.Random(f"{TEST_SEED}/questions/{key}")
    chosen = []
    for family, most in ASKED.items():
        own = [question for question in questions if question["family"] == family]
        chosen += rng.sample(own, min(most, len(own)))
    return [{"key": key, **question} for question in chosen]
