"""Trainers of others over the dataset: every row once, on any ranks, and on from a checkpoint."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from pipeline import Batch, CarvedDataset, open_cache
from pipeline.cache.commit import claim_identity
from pipeline.cache.snapshot import build_snapshot
from pipeline.carved_cache import CarvedCache
from pipeline.dataset import PackedRow
from pipeline.storage import open_store
from tests.cache.rows import IDENTITY, commit_rows, make_row
from tests.servers.process import free_ports

ROOT = Path(__file__).parents[2]
NUM_ROWS = 40
BATCH_SIZE = 4
NUM_STEPS = 10  # an epoch, of one rank


class Probe(nn.Module):
    """Learns a number of each image from the mean of its tokens; notes whose it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 1)
        self.seen: list[list[int]] = []

    def forward(self, features: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.seen.append(labels.int().tolist())
        weights_BK1 = mask[:, :, None].to(features.dtype)
        mean_BD = (features * weights_BK1).sum(dim=1) / weights_BK1.sum(dim=1)
        return {"loss": nn.functional.mse_loss(self.head(mean_BD)[:, 0], labels / NUM_ROWS)}

    @property
    def rows(self) -> list[int]:
        return [row for batch in self.seen for row in batch]


class BatchLoader(DataLoader):
    """Gives what the model takes, and knows where the epoch stands after what it gave last."""

    def __init__(self, dataset: CarvedDataset, **options: Any) -> None:
        super().__init__(dataset, batch_size=None, **options)
        self.state: Any = dataset.state_dict()
        self.num_steps: int | None = None

    def __len__(self) -> int:
        """Return the steps of a whole epoch: what trainers count by, resumed or not."""
        if self.num_steps is None:
            self.num_steps = len(self.dataset)
        return self.num_steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in super().__iter__():
            self.state = batch.state
            yield model_inputs(batch)

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dataset.load_state_dict(state)
        if not len(self.dataset):
            self.set_epoch(state["epoch"] + 1)


class BatchTrainer(Trainer):
    def get_train_dataloader(self) -> BatchLoader:
        return BatchLoader(self.train_dataset, num_workers=self.args.dataloader_num_workers)


class KeepPlace(TrainerCallback):
    """Saves the place in the epoch beside each checkpoint, and begins where one says."""

    def __init__(self, checkpoint: str | None = None) -> None:
        self.checkpoint = checkpoint

    def on_save(self, args, state, control, train_dataloader, **_) -> None:
        if state.is_world_process_zero:
            path = Path(args.output_dir, f"checkpoint-{state.global_step}", "dataset.json")
            path.write_text(json.dumps(train_dataloader.state_dict()))

    def on_train_begin(self, args, state, control, train_dataloader, **_) -> None:
        if self.checkpoint is not None:
            saved = Path(self.checkpoint, "dataset.json").read_text()
            train_dataloader.load_state_dict(json.loads(saved))


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_) -> None:
        control.should_training_stop = state.global_step == self.step


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    tokens = batch.padded()
    labels = torch.tensor([float(text) for text in batch.columns["txt"]])
    return {"features": tokens.features, "mask": tokens.mask, "labels": labels}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    given = {
        "per_device_train_batch_size": BATCH_SIZE,
        "num_train_epochs": 2,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,  # there is no accelerator
    }
    return TrainingArguments(output_dir=str(folder), **{**given, **options})


def make_cache(folder: Path) -> CarvedCache:
    store = open_store(str(folder))
    claim_identity(store, IDENTITY)
    rows = [
        make_row(f"k{i:02d}", seed=i, num_tokens=10 + i % 7, text=f"{i}") for i in range(NUM_ROWS)
    ]
    commit_rows(store, "a", rows[:20], row_group_bytes=12_000)
    commit_rows(store, "b", rows[20:], row_group_bytes=12_000)
    build_snapshot(store)
    return open_cache(store.url)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> CarvedCache:
    return make_cache(tmp_path_factory.mktemp("trained"))


@pytest.fixture(autouse=True)
def _no_state_of_accelerate() -> Iterator[None]:
    """Forget what accelerate keeps for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def batches(cache: CarvedCache, **options: Any) -> CarvedDataset:
    given = {"batch_size": BATCH_SIZE, "shuffle": True, "columns": ["txt"]}
    return CarvedDataset(cache, **{**given, **options})


def order(cache: CarvedCache, epoch: int) -> list[int]:
    """Return the rows of an epoch as a plain loop gives them."""
    dataset = batches(cache)
    dataset.set_epoch(epoch)
    return [int(text) for batch in dataset for text in batch.columns["txt"]]


ALL = Counter(range(NUM_ROWS))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_trainer_collates_rows_each_once_an_epoch(
    cache: CarvedCache, tmp_path: Path, workers: int
) -> None:
    dataset = CarvedDataset(cache, shuffle=True, columns=["txt"])

    def collate(rows: list[PackedRow]) -> dict[str, Tensor]:
        return model_inputs(dataset.collate(rows))

    model = Probe()
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, dataloader_num_workers=workers),
        train_dataset=dataset,
        data_collator=collate,
    )
    done = trainer.train()

    first, second = model.rows[:NUM_ROWS], model.rows[NUM_ROWS:]
    assert done.global_step == len(model.seen)
    assert Counter(first) == Counter(second) == ALL
    assert first != second


@pytest.mark.parametrize("workers", [0, 2])
def test_the_trainer_takes_batches_as_they_are_read(
    cache: CarvedCache, tmp_path: Path, workers: int
) -> None:
    model = Probe()
    trainer = BatchTrainer(
        model=model,
        args=arguments(tmp_path, dataloader_num_workers=workers),
        train_dataset=batches(cache),
    )

    done = trainer.train()

    assert done.global_step == 2 * NUM_STEPS
    assert model.rows == order(cache, 0) + order(cache, 1)


@pytest.mark.parametrize(("workers", "micro_batches", "step"), [(0, 1, 3), (2, 2, 3), (0, 2, 5)])
def test_the_trainer_goes_on_from_a_checkpoint_where_the_epoch_stood(
    cache: CarvedCache, tmp_path: Path, workers: int, micro_batches: int, step: int
) -> None:
    options = {
        "dataloader_num_workers": workers,
        "gradient_accumulation_steps": micro_batches,
        "save_strategy": "steps",
        "save_steps": step,
        "ignore_data_skip": True,
    }
    stopped, resumed = Probe(), Probe()
    BatchTrainer(
        model=stopped,
        args=arguments(tmp_path, **options),
        train_dataset=batches(cache),
        callbacks=[KeepPlace(), StopAt(step)],
    ).train()
    checkpoint = str(tmp_path / f"checkpoint-{step}")

    done = BatchTrainer(
        model=resumed,
        args=arguments(tmp_path, **options),
        train_dataset=batches(cache),
        callbacks=[KeepPlace(checkpoint)],
    ).train(resume_from_checkpoint=checkpoint)

    assert len(stopped.seen) == step * micro_batches
    assert stopped.rows + resumed.rows == order(cache, 0) + order(cache, 1)
    assert done.global_step == 2 * NUM_STEPS // micro_batches


def run_rank(folder: str, output: str) -> None:
    """Train as one of several processes, as the environment says; print what it was given."""
    model = Probe()
    args = arguments(Path(output), num_train_epochs=1, ddp_backend="gloo")
    dataset = batches(open_cache(folder), batch_size=6, ends="pad")
    BatchTrainer(model=model, args=args, train_dataset=dataset).train()
    weights = model.head.weight.detach().double().sum().item()
    print(json.dumps({"seen": model.seen, "weights": weights}))  # noqa: T201
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_of_the_trainer_share_the_rows(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    make_cache(folder)
    code = "import sys; from tests.dataset.test_trainers import run_rank; run_rank(*sys.argv[1:])"
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
        "PYTHONPATH": str(ROOT),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(tmp_path / f"out{rank}")],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(2)
    ]

    try:
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()

    assert [rank.returncode for rank in ranks] == [0, 0]
    found = [json.loads(out.splitlines()[-1]) for out in said]
    first, second = ([row for batch in one["seen"] for row in batch] for one in found)
    assert Counter(first + second) == ALL
    assert [len(batch) for batch in found[0]["seen"]] == [6, 6, 6, 2]
    assert [len(batch) for batch in found[1]["seen"]] == [6, 6, 6, 2]
    assert found[0]["weights"] == found[1]["weights"]


def given_to_two_ranks(cache: CarvedCache, **options: Any) -> Counter[int]:
    """Return what two ranks get by loaders that accelerate has prepared."""
    rows: Counter[int] = Counter()
    for rank in range(2):
        here = {name: options.get(name, value) for name, value in place(rank).items()}
        dataset = CarvedDataset(cache, columns=["txt"], **here)
        loader = prepare_data_loader(
            DataLoader(dataset, batch_size=BATCH_SIZE, collate_fn=dataset.collate),
            num_processes=2,
            process_index=rank,
            dispatch_batches=False,
        )
        rows.update(int(text) for batch in loader for text in batch.columns["txt"])
    return rows


def place(rank: int) -> dict[str, int]:
    return {"rank": rank, "world_size": 2}


def test_a_prepared_loader_shares_the_rows_out_a_second_time(cache: CarvedCache) -> None:
    Accelerator(cpu=True)

    twice = given_to_two_ranks(cache)
    once = given_to_two_ranks(cache, rank=0, world_size=1)

    assert set(twice) < set(ALL)  # the others are lost
    assert set(once) == set(ALL)


def test_accelerate_prepares_the_model_and_not_the_loader(
    cache: CarvedCache, tmp_path: Path
) -> None:
    accelerator = Accelerator(cpu=True)
    model = Probe()
    trained, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    dataset = batches(cache)
    accelerator.register_for_checkpointing(dataset)
    before = model.head.weight.detach().clone()

    for step, batch in enumerate(dataset, start=1):
        accelerator.backward(trained(**model_inputs(batch))["loss"])
        optimizer.step()
        optimizer.zero_grad()
        if step == 4:
            accelerator.save_state(str(tmp_path))
            break
    accelerator.load_state(str(tmp_path))
    for batch in dataset:
        trained(**model_inputs(batch))

    assert model.rows == order(cache, 0)
    assert not torch.equal(model.head.weight, before)
