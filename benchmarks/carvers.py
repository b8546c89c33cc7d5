"""Time every carver beside the forward pass of a ViT-L/14-336 tower, and measure its memory.

    python benchmarks/carvers.py > benchmarks/carvers.md

Each round times the tower and then each carver once, so that a busy machine slows all of them.
Medians over rounds are printed as a page in Markdown. The tokens are synthetic: clusters of similar
tokens around a common mean, as towers give them; signals have the shapes of ViT-L/14.
"""

import argparse
import ctypes
import dataclasses
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from hardware import processor
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from pipeline import carvers
from pipeline.carvers import Carver
from pipeline.types import TileLayout, VisualTokens

TARGET = 0.15  # share of the tower's forward that a carver may take

VARIANTS: Mapping[str, list[dict[str, Any]]] = {
    "cenprune": [{"rule": "zoo_prune"}],
    "tokencarve": [{"solver": "subspace"}, {"information": "features"}],
    "todre": [{"rule": "k_center"}],
    "vqtoken": [{"form": "elbow"}],
}
"""Options beside the defaults whose cost is another."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One set of inputs."""

    images: int
    views: int
    side: int  # rows and columns of a view
    width: int
    keep: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return self.views * self.side**2


SHAPES = [
    Shape(images=32, views=1, side=24, width=1024, keep=(64, 128)),
    Shape(images=8, views=5, side=24, width=1024, keep=(288,)),
]


def make_tokens(shape: Shape, device: torch.device) -> VisualTokens:
    """Return clustered tokens with every signal that a carver may need."""
    generator = torch.Generator().manual_seed(0)
    images, count, width = shape.images, shape.num_tokens, shape.width

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    centres = normal(images, 40, width)
    members = torch.randint(0, 40, (images, count), generator=generator)
    clustered = centres.gather(1, members[:, :, None].expand(-1, -1, width))
    features = normal(images, 1, width) + clustered + 0.5 * normal(images, count, width)
    attention = {
        name: torch.softmax(2 * normal(images, count), dim=1)
        for name in ("cls_attention", "received_attention", "shallow_attention",
                     "last_cls_attention", "llm_attention", "projector_sensitivity")
    }  # fmt: skip
    signals = {
        **attention,
        "cls_logits": normal(images, count),
        "keys": normal(images, count, width),
        "mean_keys": normal(images, count, 64),
        "shallow_keys": normal(images, count, width),
        "last_keys": normal(images, count, width),
        "attention_output": features + normal(images, count, width),
        "attention_flow": torch.rand(images, count, 23, 3, generator=generator),
    }
    tiles = None
    if shape.views == 5:
        tiles = TileLayout(rows=2, columns=2, unpadded=(4, 44, 0, 48))
    return VisualTokens(
        features=features.to(device),
        grid=(shape.side, shape.side),
        signals={name: signal.to(device) for name, signal in signals.items()},
        num_views=shape.views,
        tiles=tiles,
    )


def make_tower(device: torch.device) -> Callable[[int], None]:
    """Return a forward pass of a ViT-L/14-336 with random weights over so many images."""
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14, projection_dim=768,
    )  # fmt: skip
    tower = CLIPVisionModel(config).eval().to(device)

    def forward(images: int) -> None:
        with torch.inference_mode():
            tower(torch.zeros(images, 3, 336, 336, device=device))

    return forward


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """Return how long one call takes, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def extra_memory(step: Callable[[], object], device: torch.device) -> float:
    """Return by how many MB one call raises the peak of memory in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # Freed memory goes back first, or a call would reuse it unseen.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def candidates(keep: int) -> dict[str, Carver]:
    """Return every carver at this budget, by the name that the table shows."""
    found = {}
    for name in carvers.names():
        fields = {field.name for field in dataclasses.fields(carvers.load(name))}
        budget_field = next((f for f in ("keep_tokens", "mean_tokens") if f in fields), None)
        budget = {budget_field: keep} if budget_field else {}
        for options in [{}, *VARIANTS.get(name, [])]:
            label = ", ".join([f"`{name}`", *(f"{k}={v}" for k, v in options.items())])
            found[label] = carvers.build(name, {**options, **budget})
    return found


def report(shape: Shape, keep: int, options: argparse.Namespace) -> None:
    """Print the table of one shape and budget."""
    device = torch.device(options.device)
    tokens = make_tokens(shape, device)
    tower = make_tower(device)
    every = candidates(keep)
    memory = {}
    for label, carver in every.items():
        carver.carve(tokens)  # warm
        memory[label] = extra_memory(lambda c=carver: c.carve(tokens), device)
    forward: list[float] = []
    times: dict[str, list[float]] = {label: [] for label in every}
    tower(1)
    for _ in range(options.rounds):
        forward.append(seconds(lambda: tower(options.tower_images), device) / options.tower_images)
        for label, carver in every.items():
            took = seconds(lambda c=carver: c.carve(tokens), device)
            times[label].append(took / shape.images)
    tower_views = statistics.median(forward) * shape.views
    print(
        f"\n## {shape.images} images of {shape.num_tokens} tokens, width {shape.width}, K = {keep}"
    )
    views = f"{shape.views} views of the tower" if shape.views > 1 else "the tower"
    print(f"\nThe forward of {views} takes {1000 * tower_views:.0f} ms an image. ", end="")
    print(f"Load at the end {os.getloadavg()[0]:.1f}.\n")
    print("| carver | ms per image | share of the forward | kept (mean) | extra memory, MB |")
    print("|---|--:|--:|--:|--:|")
    for label, taken in sorted(times.items(), key=lambda item: statistics.median(item[1])):
        share = statistics.median(taken) / tower_views
        kept = statistics.mean(len(r.positions) for r in every[label].carve(tokens))
        over = " **over**" if share > TARGET else ""
        print(
            f"| {label} | {1000 * statistics.median(taken):.2f} | {share:.2%}{over} | {kept:.0f} "
            f"| {memory[label]:.0f} |"
        )


def main() -> None:
    """Parse the options and print the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tower-images", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    command = "python benchmarks/carvers.py"
    command += f" --device {options.device} --rounds {options.rounds} --threads {options.threads}"
    print("# What each carver costs beside the tower\n\nWritten by\n")
    print(f"    {command} > benchmarks/carvers.md\n")
    where = torch.cuda.get_device_name() if options.device == "cuda" else processor()
    print(f"Hardware: {where}, {os.cpu_count()} logical cores. torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, Python {platform.python_version()}.\n")
    print(
        "The tower is a CLIP ViT-L/14-336 in float32 with random weights, timed in turns with the "
        f"carvers; the aim is at most {TARGET:.0%} of its forward at K = 128. Signals are given: "
        "what an encoder needs for them is not counted. Extra memory is the peak above what was "
        "in use before the call, results included, for the whole batch; a batch is cut so that "
        "no (B, N, N) matrix exceeds 256 MB. Medians of "
        f"{options.rounds} rounds."
    )
    for shape in SHAPES:
        for keep in shape.keep:
            report(shape, keep, options)


if __name__ == "__main__":
    main()
