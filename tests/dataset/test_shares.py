"""Who reads which rows: together every row once, in steps that do not depend on who takes part."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset import shares
from pipeline.dataset.shares import Ends, Reader, Share

ENDS: list[Ends] = ["exact", "pad", "drop"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everybody who shares an epoch; `size` is None where rows are given one by one."""

    length: int
    start: int
    world_size: int
    workers: int
    size: int | None
    ends: Ends

    def shares_of(self, reader: Reader) -> Iterator[Share]:
        if self.size is None:
            return shares.one_by_one(self.length, self.start, reader, ends=self.ends)
        return shares.in_batches(self.length, self.start, reader, size=self.size, ends=self.ends)

    @property
    def step_rows(self) -> int:
        return self.world_size * (self.size or 1)

    @property
    def left(self) -> int:
        """Rows behind the last full step."""
        return (self.length - self.start) % self.step_rows

    @property
    def counted(self) -> dict:
        return {"size": self.size or 1, "ends": self.ends}


Step = tuple[list[int], int]
"""Positions of one step of a rank, and where the epoch stands after it."""


def steps_of_share(share: Share, *, by_row: bool) -> list[Step]:
    if by_row:
        return [
            ([p], e) for p, e in zip(share.positions.tolist(), share.ends.tolist(), strict=True)
        ]
    return [(share.positions.tolist(), int(share.ends[-1]))]


def in_turn(per_worker: list[list[Step]]) -> list[Step]:
    """Return steps in the order that a DataLoader takes them from its workers."""
    queue, taken = deque(map(deque, per_worker)), []
    while queue:
        mine = queue.popleft()
        if mine:
            taken.append(mine.popleft())
            queue.append(mine)
    return taken


def steps_of(
    readers: Callable[[Reader], Iterator[Share]],
    *,
    world_size: int,
    workers: int,
    by_row: bool = False,
) -> list[list[Step]]:
    """Return the steps of each rank."""
    return [
        in_turn(
            [
                [
                    step
                    for share in readers(
                        Reader(rank=rank, world_size=world_size, worker=worker, num_workers=workers)
                    )
                    for step in steps_of_share(share, by_row=by_row)
                ]
                for worker in range(workers)
            ]
        )
        for rank in range(world_size)
    ]


def steps_of_job(job: Job) -> list[list[Step]]:
    return steps_of(
        job.shares_of,
        world_size=job.world_size,
        workers=job.workers,
        by_row=job.size is None,
    )


def together(ranks: list[list[Step]]) -> list[list[int]]:
    """Return the positions of each global step, rank after rank."""
    return [
        [p for step in steps if step is not None for p in step[0]]
        for steps in itertools.zip_longest(*ranks)
    ]


@st.composite
def jobs(draw, *, ends: Ends | None = None) -> Job:
    length = draw(st.integers(0, 400))
    return Job(
        length=length,
        start=draw(st.integers(0, length)),
        world_size=draw(st.integers(1, 9)),
        workers=draw(st.integers(1, 5)),
        size=draw(st.none() | st.integers(1, 12)),
        ends=ends or draw(st.sampled_from(ENDS)),
    )


@settings(max_examples=400, deadline=None)
@given(job=jobs(ends="exact"))
def test_exact_gives_every_position_once_and_in_the_order_of_the_steps(job: Job) -> None:
    ranks = steps_of_job(job)

    found = [p for step in together(ranks) for p in step]

    assert found == list(range(job.start, job.length))


@settings(max_examples=200, deadline=None)
@given(job=jobs(ends="exact"))
def test_the_last_batches_of_exact_differ_by_one_row_at_most(job: Job) -> None:
    ranks = steps_of_job(job)
    full = (job.length - job.start) // job.step_rows

    last = [sum(len(rows) for rows, _ in steps[full:]) for steps in ranks]

    assert sum(last) == job.left
    assert max(last) - min(last) <= 1
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


@settings(max_examples=400, deadline=None)
@given(job=jobs(ends="pad"))
def test_pad_gives_all_ranks_equal_steps_and_the_epochs_first_rows_again(job: Job) -> None:
    ranks = steps_of_job(job)

    found = [p for step in together(ranks) for p in step]

    shapes = [[len(rows) for rows, _ in steps] for steps in ranks]
    extra = found[job.length - job.start :]
    assert found[: job.length - job.start] == list(range(job.start, job.length))
    assert extra == [n % job.length for n in range(len(extra))]
    assert len(extra) < job.world_size
    assert all(shape == shapes[0] for shape in shapes)


@settings(max_examples=200, deadline=None)
@given(job=jobs(ends="drop"))
def test_drop_leaves_out_what_is_less_than_a_step_of_all(job: Job) -> None:
    ranks = steps_of_job(job)

    found = [p for step in together(ranks) for p in step]

    assert found == list(range(job.start, job.length - job.left))
    assert {len(rows) for steps in ranks for rows, _ in steps} <= {job.size or 1}
    assert len({len(steps) for steps in ranks}) == 1


@settings(max_examples=200, deadline=None)
@given(job=jobs())
def test_the_steps_of_a_rank_say_where_the_epoch_stands_in_the_order_they_are_taken(
    job: Job,
) -> None:
    for steps in steps_of_job(job):
        ends = [end for _, end in steps]
        after = [job.start + (n + 1) * job.step_rows for n in range(len(steps))]
        assert ends == [min(job.length, end) for end in after]


@settings(max_examples=200, deadline=None)
@given(job=jobs(), one=st.integers(1, 6), other=st.integers(1, 6))
def test_as_many_rows_a_step_are_the_same_steps_on_any_number_of_ranks(
    job: Job, one: int, other: int
) -> None:
    step = one * other
    shape = {"length": job.length, "start": job.start, "ends": job.ends}
    few = Job(**shape, world_size=one, size=step // one, workers=job.workers)
    many = Job(**shape, world_size=step, size=1, workers=1)

    found = together(steps_of_job(few))

    full = (job.length - job.start) // step
    assert found[:full] == together(steps_of_job(many))[:full]


@settings(max_examples=200, deadline=None)
@given(job=jobs(), taken=st.integers(0, 30), other=jobs(ends="exact"))
def test_any_other_job_goes_on_where_a_step_ended(job: Job, taken: int, other: Job) -> None:
    steps = together(steps_of_job(job))[:taken]
    end = min(job.length, job.start + len(steps) * job.step_rows)

    rest = steps_of_job(
        Job(
            length=job.length,
            start=end,
            world_size=other.world_size,
            workers=other.workers,
            size=other.size,
            ends="exact",
        )
    )

    positions = [p for step in [*steps, *together(rest)] for p in step]
    expected = list(range(job.start, job.length))
    assert [p for p in dict.fromkeys(positions) if p >= job.start] == expected


@settings(max_examples=200, deadline=None)
@given(job=jobs())
def test_the_numbers_that_are_promised_are_the_numbers_that_come(job: Job) -> None:
    for rank, steps in enumerate(steps_of_job(job)):
        reader = Reader(rank=rank, world_size=job.world_size)
        batches = shares.num_batches(job.length, job.start, reader, **job.counted)
        rows = shares.num_rows(job.length, job.start, reader, **job.counted)
        assert batches == len(steps)
        assert rows == sum(len(positions) for positions, _ in steps)


@dataclass(frozen=True, kw_only=True)
class Budgeted:
    """A job whose batches have a budget of tokens."""

    tokens: list[int]
    start: int
    budget: int
    world_size: int
    workers: int
    ends: Ends

    def shares_of(self, reader: Reader) -> Iterator[Share]:
        counts = np.array(self.tokens, np.int64)
        return shares.in_budgets(
            len(self.tokens),
            self.start,
            reader,
            budget=self.budget,
            ends=self.ends,
            num_tokens=lambda positions: counts[positions],
        )

    def steps(self) -> list[list[Step]]:
        return steps_of(self.shares_of, world_size=self.world_size, workers=self.workers)


@st.composite
def budgets(draw, *, ends: Ends | None = None) -> Budgeted:
    tokens = draw(st.lists(st.integers(1, 30), max_size=150))
    return Budgeted(
        tokens=tokens,
        start=draw(st.integers(0, len(tokens))),
        budget=draw(st.integers(30, 200)),
        world_size=draw(st.integers(1, 5)),
        workers=draw(st.integers(1, 4)),
        ends=ends or draw(st.sampled_from(ENDS)),
    )


def greedy(job: Budgeted, start: int) -> list[list[int]]:
    batches: list[list[int]] = []
    filled = job.budget
    for position in range(start, len(job.tokens)):
        if filled + job.tokens[position] > job.budget:
            batches.append([])
            filled = 0
        batches[-1].append(position)
        filled += job.tokens[position]
    return batches


@settings(max_examples=200, deadline=None)
@given(job=budgets(ends="exact"))
def test_budgets_are_filled_greedily_and_every_row_comes_once(job: Budgeted) -> None:
    ranks = job.steps()

    batches = [
        step[0] for steps in itertools.zip_longest(*ranks) for step in steps if step is not None
    ]

    assert batches == greedy(job, job.start)
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


@settings(max_examples=200, deadline=None)
@given(job=budgets())
def test_no_batch_is_above_its_budget(job: Budgeted) -> None:
    sums = [sum(job.tokens[p] for p in rows) for steps in job.steps() for rows, _ in steps]

    assert max(sums, default=0) <= job.budget


@settings(max_examples=200, deadline=None)
@given(job=budgets(ends="pad"))
def test_padded_budgets_are_equal_steps_with_the_epochs_first_batches_again(job: Budgeted) -> None:
    ranks = job.steps()
    own = greedy(job, job.start)

    batches = [step[0] for steps in zip(*ranks, strict=True) for step in steps]

    extra = len(batches) - len(own)
    first = greedy(job, 0)
    assert batches[: len(own)] == own
    assert 0 <= extra < job.world_size
    assert batches[len(own) :][: len(first)] == first[:extra]


@settings(max_examples=200, deadline=None)
@given(job=budgets(ends="drop"))
def test_dropped_budgets_are_less_than_a_step_of_all(job: Budgeted) -> None:
    own = greedy(job, job.start)

    batches = [step[0] for steps in zip(*job.steps(), strict=True) for step in steps]

    assert batches == own[: len(own) // job.world_size * job.world_size]


@settings(max_examples=200, deadline=None)
@given(job=budgets())
def test_a_budgeted_step_ends_where_the_last_batch_of_it_does(job: Budgeted) -> None:
    own = greedy(job, job.start)

    ends = [[end for _, end in steps] for steps in job.steps()]

    for mine in ends:
        lasts = own[job.world_size - 1 :: job.world_size]
        expected = [*(batch[-1] + 1 for batch in lasts), len(job.tokens)]
        assert mine == expected[: len(mine)]


@settings(max_examples=100, deadline=None)
@given(job=budgets(), taken=st.integers(0, 10), world_size=st.integers(1, 5))
def test_budgets_go_on_after_any_step_as_if_there_had_been_no_break(
    job: Budgeted, taken: int, world_size: int
) -> None:
    shape = {"tokens": job.tokens, "budget": job.budget, "workers": 1, "ends": "exact"}
    before = Budgeted(**shape, start=job.start, world_size=job.world_size)
    steps = list(zip(*before.steps(), strict=False))[:taken]
    end = steps[-1][0][1] if steps else job.start

    rest = Budgeted(**shape, start=end, world_size=world_size)

    assert greedy(job, job.start)[: len(steps) * job.world_size] + [
        step[0]
        for some in itertools.zip_longest(*rest.steps())
        for step in some
        if step is not None
    ] == greedy(job, job.start)


def test_a_row_above_the_budget_is_refused_with_what_to_do() -> None:
    job = Budgeted(tokens=[3, 11], start=0, budget=10, world_size=1, workers=1, ends="exact")

    with pytest.raises(ValueError, match=r"batch_tokens=10: a row has 11 tokens; give more, or"):
        job.steps()
