"""One process of a job of several: run as `python -m tests.dataset.ranks`, it trains and reports.

Lean on purpose: it is started many times.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.utils.data import DataLoader

from pipeline import Batch, CarvedDataset, open_cache


def dataset_of(url: str, **options: Any) -> CarvedDataset:
    """Return the job's dataset; rank and world size are for it to find out."""
    return CarvedDataset(open_cache(url), shuffle=True, seed=3, window=16, **options)


def loader_of(dataset: CarvedDataset, num_workers: int, start: str | None) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context=start if num_workers else None,
    )


def train(batches: Iterator[Batch] | DataLoader, width: int) -> dict[str, Any]:
    """Train a linear layer on every batch, in step with the other ranks; return its weights."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(width, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    keys = []
    for batch in batches:
        packed = batch.packed()
        model(packed.features).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        keys.append(batch.keys)
    return {"steps": keys, "weights": model.module.weight.detach().flatten().tolist()}


def collect(loader: DataLoader, limit: int | None) -> dict[str, Any]:
    """Return the keys of each batch, and the state of the last."""
    steps: list[list[str]] = []
    state = None
    for batch in loader:
        steps.append(batch.keys)
        state = batch.state
        if len(steps) == limit:
            break
    return {"steps": steps, "state": state}


def one_run(url: str, run: dict[str, Any], given: CarvedDataset | None) -> dict[str, Any]:
    dataset = dataset_of(url, **run["options"]) if given is None else given
    if run.get("state") is not None:
        dataset.load_state_dict(run["state"])
    loader = loader_of(dataset, run.get("workers", 0), run.get("start"))
    length = len(loader) if dataset.batch_size is not None else None
    if run.get("train"):
        found = train(loader, dataset.cache.width)
    else:
        found = collect(loader, run.get("limit"))
    return {**found, "length": length, "place": [dataset.rank, dataset.world_size]}


def work(
    rank: int, world_size: int, folder: str, job: dict[str, Any], given: CarvedDataset | None = None
) -> None:
    """Join the others, do the runs of the job, and write what came of each."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size
    )
    found = [one_run(job["url"], run, given) for run in job["runs"]]
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
