"""Time TokenCarve's scores as published (full SVD, image by image) against ours, side by side.

    python benchmarks/tokencarve_svd.py > benchmarks/tokencarve_svd.md

Every round times each form once, one after the other, so that a busy machine slows all of them;
medians and minima over rounds are printed as a page in Markdown. Asserts first that both forms keep
the same tokens of every image.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from hardware import processor
from numpy.typing import NDArray
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor

from pipeline import carvers
from pipeline.carvers._information import contributions
from pipeline.heap import keep_freed_memory
from pipeline.types import VisualTokens

Forms = dict[str, Callable[[], object]]
Matrix = NDArray[np.float64]

PUBLISHED = "published: full SVD, float32"
BEGIN = """# TokenCarve's scores: full SVD against our eigen-decomposition

    python benchmarks/tokencarve_svd.py > benchmarks/tokencarve_svd.md

"Published" is one `torch.linalg.svd` per image with `full_matrices=True`, as the published code
calls it; torch gives it all threads. Ours gives each image one core and as many images as there are
threads at once, so that no score depends on the number of threads or on batch-mates. All forms run
with the heap of an actor (`pipeline/heap.py`).
"""
LIMIT = """
## What the limit is

Per image and core there remain the float64 Gram matrix (half a product: N^2 D operations, near the
peak of the core) and the float64 `eigh` of 576 x 576, half of which waits for memory, not for
arithmetic. Both are NumPy's, so how far this comes depends on the kernels that its OpenBLAS takes.
`OPENBLAS_CORETYPE` in the environment can hold it below what the processor has: set to `Haswell`
(AVX2), this command gives about 12 x on the processor named above, which has AVX-512, and earlier
versions of this page, unaware of it, said 13 x. The full SVD is torch's and takes the same time
either way. On a busy machine the minima say more than the medians.

Float32 would save about half of both steps but is not accurate enough: squaring
the matrix squares the ratio of its singular values, and on the stored outputs of the published code
(`tests/data/golden/tokencarve` and two larger cases) a float32 Gram matrix and `eigh` are off by up
to 5e-3 (tolerance 1e-4) and reorder up to 99 of 576 tokens; a float64 Gram matrix with a float32
`eigh` is no better. In float64 the largest error is 1.6e-5."""


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
    """Return our form, and its steps one image after the other, to see where its time goes."""
    rows_BND = tokens.features.double().numpy()
    grams_BNN = [rows_ND @ rows_ND.T for rows_ND in rows_BND]
    return {
        "all of `contributions`": lambda: contributions(tokens.features),
        "all of `carve`: scores, prune, merge": lambda: carver.carve(tokens),
        "- to float64": lambda: tokens.features.double(),
        "- Gram matrix, one core": lambda: [on_one_core(lambda r: r @ r.T, r) for r in rows_BND],
        "- its eigh, one core": lambda: [on_one_core(np.linalg.eigh, g) for g in grams_BNN],
    }


def on_one_core(step: Callable[[Matrix], object], matrix: Matrix) -> None:
    """Do one step as the carver does it."""
    with threadpool_limits(limits=1, user_api="blas"):
        step(matrix)


def timed(forms: Forms, rounds: int) -> dict[str, list[float]]:
    """Return each form's seconds in rounds in which all take turns."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            times[name].append(time.perf_counter() - start)
    return times


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
        PUBLISHED: lambda: svd_scores(tokens.features, full=True),
        "reduced SVD, float32": lambda: svd_scores(tokens.features, full=False),
        **parts(tokens, carver),
    }
    load = os.getloadavg()[0]
    times = timed(forms, options.rounds)
    print(
        f"\n## Threads: {threads}\n\nLoad {load:.1f} before and {os.getloadavg()[0]:.1f} after. ",
        end="",
    )
    print(f"Kept sets are equal, scores within {difference:.1e} (relative).\n")
    print("| form | ms per image, median | minimum | ratio of medians | of minima |")
    print("|---|--:|--:|--:|--:|")
    for name, seconds in times.items():
        cells = []
        for pick in (statistics.median, min):
            cells.append((pick(seconds), pick(times[PUBLISHED]) / pick(seconds)))
        (median, ratio), (least, least_ratio) = cells
        milliseconds = [f"{1000 * value / options.images:.1f}" for value in (median, least)]
        print(f"| {name} | {' | '.join(milliseconds)} | {ratio:.1f} x | {least_ratio:.1f} x |")


def blas() -> str:
    """Return in words which kernels NumPy's products and decompositions use."""
    kernels = {
        f"{found['internal_api']} {found['version']}, kernels {found['architecture']}"
        for found in threadpool_info()
        if found["user_api"] == "blas" and "numpy" in found["filepath"]
    }
    forced = os.environ.get("OPENBLAS_CORETYPE")
    said = f" (OPENBLAS_CORETYPE={forced})" if forced else ""
    return f"NumPy's BLAS: {'; '.join(sorted(kernels))}{said}."


def main() -> None:
    """Parse the options, print where this runs, and one table per number of threads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, action="append", help="default: 1 and 2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--num-tokens", type=int, default=576)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--keep", type=int, default=128)
    options = parser.parse_args()
    keep_freed_memory()
    print(BEGIN)
    print(
        f"Hardware: {processor()}, {os.cpu_count()} logical cores. torch {torch.__version__}, ",
        end="",
    )
    print(f"NumPy {np.__version__}, Python {platform.python_version()}.")
    print(
        f"{options.images} images of N = {options.num_tokens}, D = {options.width}, float32, ",
        end="",
    )
    print(f"K = {options.keep}; {options.rounds} rounds. {blas()}")
    for threads in options.threads or [1, 2]:
        report(options, threads)
    print(LIMIT)


if __name__ == "__main__":
    main()
