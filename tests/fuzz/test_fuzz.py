"""Damaged bytes are refused by name or read rightly: no other error, no crash, no hang.

`pytest -m fuzz` tries 20,000 inputs of each reader, as `python -m benchmarks.fuzz` does.
"""

import pytest

from tests.fuzz.driver import Report, fuzz
from tests.fuzz.target import BrokenPromiseError, Target
from tests.fuzz.worker import TARGETS

SEED = 1


def told(report: Report) -> str:
    """Return what to look at: how to try an input again, and what it does."""
    number, what = report.broken[0]
    again = f"python -m tests.fuzz.worker {report.target} {report.seed} {number} 1"
    return f"{len(report.broken)} of {report.count} broken; again: {again}\n{what}"


@pytest.mark.parametrize(
    ("target", "count"),
    [
        ("tar", 500),
        ("image", 500),
        ("row", 500),
        # These open a whole cache for each input.
        *(pytest.param(t, 170, marks=pytest.mark.slow) for t in ("part", "table", "record")),
    ],
)
def test_some_hundred_damaged_inputs(target: str, count: int) -> None:
    report = fuzz(target, seed=SEED, count=count)

    assert report.count == count
    assert not report.broken, told(report)
    assert len(report.outcomes) > 1  # some are read, some are refused


@pytest.mark.fuzz
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("target", TARGETS)
def test_twenty_thousand_damaged_inputs(target: str) -> None:
    report = fuzz(target, seed=SEED + 1, count=20_000)

    assert report.count == 20_000
    assert not report.broken, told(report)


class Faulty(Target):
    """A reader with one fault of each kind; input n has fault n."""

    name = "faulty"

    def make(self, seed: int, number: int) -> object:
        return number

    def mutated(self, random: object) -> object:
        raise NotImplementedError

    def check(self, made: object) -> str:
        if made == 1:
            raise BrokenPromiseError("a wrong row")
        if made == 2:
            raise KeyError("an error of another kind")
        if made == 3:
            bytearray(8 << 30)
        if made == 4:
            import ctypes

            ctypes.string_at(0)
        if made == 5:
            while True:
                pass
        return "read"


@pytest.mark.slow
def test_every_kind_of_fault_is_found_and_costs_only_its_input() -> None:
    report = fuzz("faulty", seed=SEED, count=8, hang_s=10)

    assert report.outcomes == {"read": 3, "broken": 3, "crash": 1, "hang": 1}
    assert sorted(number for number, _ in report.broken) == [1, 2, 3, 4, 5]
    found = dict(report.broken)
    assert "a wrong row" in found[1]
    assert "KeyError" in found[2]
    assert "MemoryError" in found[3]
    assert "ended with -11" in found[4]
    assert "no end" in found[5]


@pytest.mark.parametrize("target", TARGETS)
def test_an_input_can_be_made_again(target: str) -> None:
    one, other = TARGETS[target](), TARGETS[target]()

    for number in range(20):
        assert repr(one.make(SEED, number)) == repr(other.make(SEED, number))
