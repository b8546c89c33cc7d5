"""Compare TokenCarve's two solvers: how near the subspace solver comes, and what it costs.

    python benchmarks/information_solvers.py > benchmarks/information_solvers.md

Scores and kept sets are compared on matrices of known spectrum and on the attention output of an
untrained ViT-L/14-336 tower for the photos of the demo. Times are of the scores alone, on one
thread; every round times all solvers once. The page is printed in Markdown.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hardware import processor
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import logging

from pipeline import encoders
from pipeline.carvers._information import contributions
from pipeline.carvers._subspace import contributions_from_subspace

PHOTOS = Path(__file__).parents[1] / "pipeline" / "demo" / "photos"
RANKS = (32, 64, 128)
BUDGETS = (64, 128)
NUM_TOKENS, WIDTH = 576, 1024

BEGIN = """# TokenCarve's information score: exact against subspace iteration

    python benchmarks/information_solvers.py > benchmarks/information_solvers.md

`exact` decomposes the Gram matrix of all tokens in float64. `subspace r` iterates on r directions
with batched products and estimates what the others add to a token from its residual norm
(`pipeline/carvers/_subspace.py` derives how). `leading r only` is the same without that estimate,
and `token norm` ranks by length alone: both are here to show what the estimate is worth.

"kept" is the share of the exact solver's K best-scored tokens that the solver finds too, mean over
images; "worst" is that of the worst image at K = 128. Spearman's rank correlation is over all
tokens. TokenCarve adds the points of the attention ranking, which is the same for both, so that its
kept sets differ less than these.
"""
END = """
## What to make of it

- The faster singular values fall, the nearer the result. Where all directions matter alike (decay
  0.25) no small subspace can tell the best tokens apart; their scores are nearly equal there.
- On the photos 32 directions with the estimate find more of the kept tokens than 64 without it.
  On the synthetic spectra it improves the ranking as a whole, but not the choice of the best.
- The error that is left does not shrink much with more iterations: it is that of taking the other
  directions for random.
- **Not measured here: any GPU.** There `exact` may decompose matrix by matrix, which is what this
  solver is for; whether it is faster on a given GPU and library is to be measured before it is
  chosen (`benchmarks/carvers.py`). On a CPU the gain is small, and `exact` is the default.
- The tower is untrained: its features follow the pictures, but not as those of a trained one do.
  Measure on your own features before you rely on these shares."""


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """Matrices of one kind."""

    name: str
    values: Tensor  # (B, N, D)


def synthetic(decay: float, images: int) -> Matrices:
    """Return matrices with singular values 1 / j^decay, random directions and uneven rows."""
    generator = torch.Generator().manual_seed(0)

    def directions(length: int) -> Tensor:
        noise = torch.randn(images, length, NUM_TOKENS, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(noise).Q

    singular = torch.arange(1, NUM_TOKENS + 1, dtype=torch.float64) ** -decay
    rows = (directions(NUM_TOKENS) * singular) @ directions(WIDTH).mT
    lengths = 0.5 + torch.rand(images, NUM_TOKENS, 1, generator=generator, dtype=torch.float64)
    return Matrices(name=f"singular values 1 / j^{decay}", values=(rows * lengths).float())


def save_tower(folder: Path, layers: int) -> None:
    """Write an untrained CLIP tower of ViT-L/14-336's widths, its attention as peaked as a real."""
    edge = 336
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=WIDTH,
                intermediate_size=4 * WIDTH,
                num_hidden_layers=layers,
                num_attention_heads=16,
                image_size=edge,
                patch_size=14,
            )
        )
        with torch.no_grad():
            for name, weight in tower.named_parameters():
                if weight.ndim == 2 and "embedding" not in name:
                    gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
                    weight.normal_(0, gain / weight.shape[1] ** 0.5)
    tower.save_pretrained(folder)
    size = {"height": edge, "width": edge}
    CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size=size).save_pretrained(folder)


def photos(layers: int) -> Matrices:
    """Return the attention output of the last but one layer for the demo's photos."""
    logging.disable_progress_bar()
    pictures = [np.asarray(Image.open(p).convert("RGB")) for p in sorted(PHOTOS.glob("*.jpg"))]
    with tempfile.TemporaryDirectory() as folder:
        save_tower(Path(folder), layers)
        encoder = encoders.build("vit", {"model": folder, "layer": -2})
        encoder.load(signals=frozenset({"attention_output"}))
        rows = [encoder.encode([p])[0].signals["attention_output"] for p in pictures]
    return Matrices(name=f"{len(pictures)} photos, untrained tower", values=torch.cat(rows))


def leading_only(matrix_BND: Tensor, rank: int) -> Tensor:
    """Return the part of the score that lies in the leading directions, from a full SVD."""
    left, singular, _ = torch.linalg.svd(matrix_BND.double(), full_matrices=False)
    return (left[:, :, :rank] * singular[:, None, :rank]).abs().sum(dim=2).float()


def compare(exact_BN: Tensor, near_BN: Tensor) -> list[str]:
    """Return the cells that say how near scores are to the exact ones."""
    shares = {}
    for budget in BUDGETS:
        best = [
            scores.argsort(dim=1, descending=True)[:, :budget] for scores in (exact_BN, near_BN)
        ]
        pairs = zip(*best, strict=True)
        shares[budget] = [float(torch.isin(a, b).double().mean()) for a, b in pairs]
    places = [scores.argsort(dim=1).argsort(dim=1).double() for scores in (exact_BN, near_BN)]
    rank_correlation = statistics.mean(
        float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(*places, strict=True)
    )
    cells = [f"{statistics.mean(shares[budget]):.3f}" for budget in BUDGETS]
    return [*cells, f"{min(shares[BUDGETS[-1]]):.3f}", f"{rank_correlation:.4f}"]


def timed(
    forms: dict[str, Callable[[Tensor], Tensor]], matrices: Tensor, rounds: int
) -> dict[str, float]:
    """Return each form's median milliseconds per image over rounds in which all take turns."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            start = time.perf_counter()
            form(matrices)
            times[name].append(1000 * (time.perf_counter() - start) / len(matrices))
    return {name: statistics.median(values) for name, values in times.items()}


def report(matrices: Matrices, rounds: int) -> None:
    """Print the table of one kind of matrices."""
    forms: dict[str, Callable[[Tensor], Tensor]] = {"exact": contributions}
    for rank in RANKS:
        forms[f"subspace {rank}"] = lambda x, rank=rank: contributions_from_subspace(x, rank)
    times = timed(forms, matrices.values, rounds)
    untimed = {
        f"leading {RANKS[1]} only": leading_only(matrices.values, RANKS[1]),
        "token norm": matrices.values.norm(dim=2),
    }
    exact_BN = contributions(matrices.values)
    print(f"\n## {matrices.name[0].upper() + matrices.name[1:]}\n")
    print("| scores | kept, K = 64 | kept, K = 128 | worst | Spearman | ms per image |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, form in forms.items():
        cells = compare(exact_BN, form(matrices.values))
        print(f"| {name} | {' | '.join(cells)} | {times[name]:.1f} |")
    for name, scores_BN in untimed.items():
        print(f"| {name} | {' | '.join(compare(exact_BN, scores_BN))} | |")


def main() -> None:
    """Parse the options and print the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=4, help="per synthetic spectrum")
    parser.add_argument("--layers", type=int, default=8, help="of the tower")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(BEGIN)
    print(
        f"Hardware: {processor()}, {os.cpu_count()} logical cores, one thread; load "
        f"{os.getloadavg()[0]:.1f}. torch {torch.__version__}, NumPy {np.__version__}.\nN = "
        f"{NUM_TOKENS}, D = {WIDTH}, float32; {options.images} matrices per spectrum, a tower of "
        f"{options.layers} layers, {options.rounds} rounds."
    )
    for decay in (0.25, 0.5, 1.0, 2.0):
        report(synthetic(decay, options.images), options.rounds)
    report(photos(options.layers), options.rounds)
    print(END)


if __name__ == "__main__":
    main()
