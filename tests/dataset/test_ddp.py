"""Several processes train together: each finds its own share, and none waits for another."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import multiprocessing

from tests.conftest import ROOT
from tests.dataset import ranks
from tests.dataset.caches import keys_of, make_cache

NUM_ROWS = 50
ALL = keys_of(NUM_ROWS)

Run = dict[str, Any]
Found = list[Run]
"""What each rank reports of one run."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = make_cache(str(tmp_path_factory.mktemp("ddp")), NUM_ROWS)
    return made.reader.store.url


@pytest.fixture(autouse=True, scope="module")
def _over_loopback():
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    yield
    del os.environ["GLOO_SOCKET_IFNAME"]
    os.environ.update({} if before is None else {"GLOO_SOCKET_IFNAME": before})


def reports(folder: Path, world_size: int) -> list[Found]:
    """Return what the ranks report, run by run."""
    by_rank = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]
    return [list(found) for found in zip(*by_rank, strict=True)]


def run_job(folder: Path, world_size: int, url: str, runs: Sequence[Run]) -> list[Found]:
    """Run a job in processes of its own, as a launcher does."""
    folder.mkdir()
    job = json.dumps({"url": url, "runs": runs})
    begun = [
        subprocess.Popen(
            [
                *(sys.executable, "-W", "error", "-W", "ignore:This DataLoader will create"),
                *("-m", "tests.dataset.ranks", str(rank), str(world_size), str(folder), job),
            ],
            cwd=ROOT,
        )
        for rank in range(world_size)
    ]
    try:
        codes = [process.wait(timeout=120) for process in begun]
    finally:
        for process in begun:
            process.kill()
            process.wait()
    assert codes == [0] * world_size
    return reports(folder, world_size)


def in_steps(found: Found) -> list[str]:
    """Return keys in the order of the steps, rank after rank."""
    steps = itertools.zip_longest(*(rank["steps"] for rank in found), fillvalue=[])
    return [key for step in steps for keys in step for key in keys]


FIRST_RUNS: dict[str, Run] = {
    **{
        f"exact {workers}": {"options": {"batch_size": 4}, "workers": workers, "start": "fork"}
        for workers in range(4)
    },
    "exact spawn": {"options": {"batch_size": 4}, "workers": 1, "start": "spawn"},
    "pad": {"options": {"batch_size": 4, "ends": "pad"}, "workers": 2, "train": True},
    "pad budget": {
        "options": {"batch_tokens": 60, "ends": "pad"},
        "workers": 1,
        "train": True,
    },
    "drop": {"options": {"batch_size": 4, "ends": "drop"}, "workers": 3, "train": True},
    "begun": {"options": {"batch_size": 4}, "workers": 2, "start": "fork", "limit": 2},
}


@pytest.fixture(scope="module")
def three_ranks(url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    folder = tmp_path_factory.mktemp("three") / "job"
    found = run_job(folder, 3, url, list(FIRST_RUNS.values()))
    return dict(zip(FIRST_RUNS, found, strict=True))


@pytest.fixture(scope="module")
def two_ranks(
    url: str, three_ranks: dict[str, Found], tmp_path_factory: pytest.TempPathFactory
) -> list[Found]:
    """What the job that was begun with three ranks goes on with."""
    state = three_ranks["begun"][0]["state"]
    shapes = [(1, {"batch_size": 4}), (3, {"batch_size": 3}), (2, {"batch_tokens": 70})]
    runs = [{"options": o, "workers": w, "start": "fork", "state": state} for w, o in shapes]
    return run_job(tmp_path_factory.mktemp("two") / "job", 2, url, runs)


@pytest.mark.slow
def test_rank_and_world_size_are_found_where_nobody_names_them(three_ranks) -> None:
    places = [[rank["place"] for rank in found] for found in three_ranks.values()]

    assert places == [[[0, 3], [1, 3], [2, 3]]] * len(FIRST_RUNS)


@pytest.mark.parametrize("name", [name for name in FIRST_RUNS if "exact" in name])
@pytest.mark.slow
def test_all_ranks_and_workers_together_give_every_key_once(url, three_ranks, name: str) -> None:
    expected = [key for batch in ranks.dataset_of(url, batch_size=12) for key in batch.keys]

    found = in_steps(three_ranks[name])

    assert sorted(found) == ALL
    assert found == expected


@pytest.mark.parametrize("name", ["pad", "pad budget", "drop"])
@pytest.mark.slow
def test_ranks_that_train_take_equal_steps_and_end_with_equal_weights(three_ranks, name) -> None:
    found = three_ranks[name]

    assert len({len(rank["steps"]) for rank in found}) == 1
    assert found[0]["weights"] == found[1]["weights"] == found[2]["weights"]


@pytest.mark.slow
def test_a_padded_epoch_of_several_ranks_has_every_key_and_fewer_than_ranks_twice(
    three_ranks,
) -> None:
    found = in_steps(three_ranks["pad"])

    assert sorted(set(found)) == ALL
    assert len(found) - len(ALL) < 3
    assert set(in_steps(three_ranks["pad budget"])) == set(ALL)


@pytest.mark.slow
def test_a_dropped_epoch_of_several_ranks_is_whole_steps(three_ranks) -> None:
    found = three_ranks["drop"]

    assert [[len(keys) for keys in rank["steps"]] for rank in found] == [[4] * 4] * 3
    assert len(set(in_steps(found))) == 48


@pytest.mark.parametrize("name", ["exact 0", "exact 2", "exact spawn", "pad", "drop"])
@pytest.mark.slow
def test_a_loader_says_how_many_batches_its_rank_gets(three_ranks, name: str) -> None:
    found = three_ranks[name]

    assert [rank["length"] for rank in found] == [len(rank["steps"]) for rank in found]


@pytest.mark.slow
def test_all_ranks_have_one_state_after_one_step(three_ranks) -> None:
    states = [rank["state"] for rank in three_ranks["begun"]]

    assert states[0]["taken"] == 24
    assert states == [states[0]] * 3


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.slow
def test_two_ranks_go_on_where_three_left_off(three_ranks, two_ranks, number: int) -> None:
    taken = in_steps(three_ranks["begun"])

    rest = in_steps(two_ranks[number])

    assert len(taken) == 24
    assert sorted(taken + rest) == ALL
    assert taken + rest == in_steps(three_ranks["exact 0"])


@pytest.mark.slow
def test_a_dataset_that_was_made_before_the_ranks_is_shared_by_them(url, tmp_path: Path) -> None:
    begun = ranks.dataset_of(url, batch_size=4)
    state = [batch.state for batch in begun][2]
    job = {"url": url, "runs": [{"options": {}, "workers": 1, "start": "fork", "state": state}]}
    begun.load_state_dict(state)

    multiprocessing.spawn(ranks.work, (2, str(tmp_path), job, begun), nprocs=2)

    (found,) = reports(tmp_path, 2)
    assert [rank["place"] for rank in found] == [[0, 2], [1, 2]]
    assert in_steps(found) == [key for batch in begun for key in batch.keys]
