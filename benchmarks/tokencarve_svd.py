"""Time TokenCarve's scores as published (full SVD, image by image) against ours, side by side.

    python benchmarks/tokencarve_svd.py --threads 1 --threads 2

Every round times each form once, one after the other, so that a busy machine slows all of them;
the medians over rounds are printed as a Markdown table. Asserts first that both forms keep the
same tokens of every image.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pipeline import carvers
from pipeline.carvers.tokencarve import contributions
from pipeline.types import VisualTokens

Forms = dict[str, Callable[[], object]]


def make_tokens(images: int, num_tokens: int, width: int) -> VisualTokens:
    """Return features like hidden states: a common mean, a few strong directions, and noise."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mean = 4 * normal(images, 1, width)
    strong = normal(images, num_tokens, 48) @ normal(images, 48, width) / 48**0.5
    features = (mean + strong + 0.3 * normal(images, num_tokens, width)) * (
        0.5 + torch.rand(images, num_tokens, 1, generator=generator)
    )
    attention = torch.rand(images, num_tokens, generator=generator)
    return VisualTokens(
        features=features, grid=(1, num_tokens), signals={"llm_attention": attention}
    )


def svd_scores(features_BND: Tensor, *, full: bool) -> Tensor:
    """Return the scores from one float32 SVD per image; `full` builds the D x D factor too."""
    scores = []
    for features_ND in features_BND:
        left, singular, _ = torch.linalg.svd(features_ND, full_matrices=full)
        scores.append((left @ torch.diag(singular)).abs().sum(dim=1))
    return torch.stack(scores)


def kept_positions(scores_N: Tensor, attention_N: Tensor, features_ND: Tensor, k: int) -> list[int]:
    """Return what one image keeps, step by step as the paper's code goes, in plain lists."""
    n = len(scores_N)

    def points(values_N: Tensor) -> dict[int, int]:
        order = sorted(range(n), key=lambda i: (-float(values_N[i]), i))
        return {token: n - place for place, token in enumerate(order)}

    information, attention = points(scores_N), points(attention_N)
    ranked = sorted(range(n), key=lambda i: (-(information[i] + attention[i]), i))
    pruned = ranked[: k + k // 2]
    upper, lower = pruned[: len(pruned) // 2], pruned[len(pruned) // 2 :]
    unit_ND = features_ND / features_ND.norm(dim=1, keepdim=True)
    best = (unit_ND[lower] @ unit_ND[upper].T).max(dim=1).values
    by_similarity = sorted(range(len(lower)), key=lambda i: -float(best[i]))
    merged = {lower[i] for i in by_similarity[: len(pruned) - k]}
    return sorted(set(pruned) - merged)


def check(tokens: VisualTokens, carver: carvers.Carver, keep_tokens: int) -> float:
    """Assert equal kept sets; return the largest relative difference of the scores."""
    published_BN = svd_scores(tokens.features, full=True)
    for image, result in enumerate(carver.carve(tokens)):
        attention_N = tokens.signals["llm_attention"][image]
        expected = kept_positions(
            published_BN[image], attention_N, tokens.features[image], keep_tokens
        )
        assert result.positions.tolist() == expected, f"image {image} keeps other tokens"
    return float(((contributions(tokens.features) - published_BN).abs() / published_BN).max())


def parts(tokens: VisualTokens, carver: carvers.Carver) -> Forms:
    """Return the steps of our form, to see where its time goes."""
    features64_BND = tokens.features.double()
    gram_BNN = features64_BND @ features64_BND.mT
    return {
        "to float64": lambda: tokens.features.double(),
        "Gram matrix (N x D x N, float64)": lambda: features64_BND @ features64_BND.mT,
        "eigh of the N x N Gram matrix": lambda: torch.linalg.eigh(gram_BNN),
        "all of `contributions`": lambda: contributions(tokens.features),
        "all of `carve`: scores, prune, merge": lambda: carver.carve(tokens),
    }


def medians(forms: Forms, rounds: int) -> dict[str, float]:
    """Return each form's median seconds over rounds in which all take turns."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def processor() -> str:
    """Return the processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def report(options: argparse.Namespace, threads: int) -> None:
    """Print the table for one number of threads."""
    torch.set_num_threads(threads)
    tokens = make_tokens(options.images, options.num_tokens, options.width)
    carver = carvers.build(
        "tokencarve",
        {"information": "features", "attention": "llm_attention", "keep_tokens": options.keep},
    )
    difference = check(tokens, carver, options.keep)
    forms: Forms = {
        "published: full SVD": lambda: svd_scores(tokens.features, full=True),
        "reduced SVD": lambda: svd_scores(tokens.features, full=False),
        **parts(tokens, carver),
    }
    seconds = medians(forms, options.rounds)
    published = seconds["published: full SVD"]
    print(f"\n{threads} thread(s): kept sets equal, scores within {difference:.1e} (relative)\n")
    print("| form | ms per image | published / this |\n|---|--:|--:|")
    for name, value in seconds.items():
        print(f"| {name} | {1000 * value / options.images:.1f} | {published / value:.1f} x |")


def main() -> None:
    """Parse the options, print where this runs, and one table per number of threads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, action="append", help="default: 1 and 2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--num-tokens", type=int, default=576)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--keep", type=int, default=128)
    options = parser.parse_args()
    print(f"{processor()}, {os.cpu_count()} logical cores; torch {torch.__version__}, ", end="")
    print(f"Python {platform.python_version()}; load {os.getloadavg()[0]:.1f} at the start")
    print(f"{options.images} images of N={options.num_tokens}, D={options.width}, ", end="")
    print(f"K={options.keep}; medians of {options.rounds} rounds")
    for threads in options.threads or [1, 2]:
        report(options, threads)


if __name__ == "__main__":
    main()
