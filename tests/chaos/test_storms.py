"""Nothing is lost and nothing is twice, whatever is killed.

A storm that fails prints its seed and how to see it again. Its plan is the seed's for ever; at
which instruction a kill lands is not.
"""

from collections.abc import Callable

import pytest

from tests.chaos.plan import NUM_LONG, PROCESS_FAULTS, STORE_FAULTS, StormPlan, draw_storm, kinds_of
from tests.chaos.storm import Findings

Rage = Callable[..., Findings]

SHORT = [
    *(draw_storm(seed, "local", is_short=True) for seed in (12, 13, 18)),
    *(draw_storm(seed, "s3", is_short=True) for seed in (14, 30)),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "long_plan" in metafunc.fixturenames:
        seeds = metafunc.config.getoption("--seed", default=None) or range(1, NUM_LONG + 1)
        plans = [draw_storm(seed, store) for seed in seeds for store in ("local", "s3")]
        metafunc.parametrize("long_plan", plans, ids=name)


def name(plan: StormPlan) -> str:
    return f"{plan.store}-{plan.seed}"


@pytest.mark.ray
@pytest.mark.timeout(1800)
@pytest.mark.slow
@pytest.mark.parametrize("plan", SHORT[1:], ids=name)
def test_after_a_storm_the_cache_is_as_if_there_had_been_none(plan: StormPlan, rage: Rage) -> None:
    findings = rage(plan)

    assert len(findings.faults) == len(plan.faults)


@pytest.mark.ray
@pytest.mark.timeout(1800)
@pytest.mark.slow
def test_no_reader_sees_anything_wrong_while_it_rages(rage: Rage) -> None:
    """A reader looks all along, in every storm, and compares each row with the truth."""
    findings = rage(SHORT[0])

    assert findings.looks > 1
    assert findings.looked_rows > 0


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_after_any_storm_the_cache_is_as_if_there_had_been_none(
    long_plan: StormPlan, rage: Rage
) -> None:
    findings = rage(long_plan, compares=long_plan.seed % 4 == 0)

    assert findings.looks >= 1  # in a short storm on a busy machine no more
    assert len(findings.faults) == len(long_plan.faults)


def test_five_storms_are_of_every_kind() -> None:
    changes = {"grow", "change", "remove"}

    assert kinds_of(SHORT) >= {*PROCESS_FAULTS, *STORE_FAULTS, *changes, "two_jobs"}


def test_a_seed_gives_one_storm() -> None:
    assert draw_storm(5, "s3") == draw_storm(5, "s3")
    assert draw_storm(5, "s3") != draw_storm(6, "s3")
