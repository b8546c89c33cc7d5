"""What a storm will do, drawn from its seed alone."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tests.chaos.corpus import SHARDS, Change, draw_changes

Store = Literal["local", "s3"]

NUM_LONG = 21
"""Storms of the long run on each store: of the seeds from 1 on."""

PROCESS_FAULTS = ("kill_actor", "kill_driver", "stop_driver", "kill_node")
STORE_FAULTS = ("refuse", "black_hole", "slow_down", "lose_replies", "cut_requests", "kill_gateway")
_ENDINGS = ("kill_driver", "stop_driver")  # faults after which a run is over


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One thing that goes wrong, and when."""

    kind: str
    after: Literal["start", "attempts", "commits"]  # what is counted since the phase began
    share: float  # of the shards to do; not of `start`
    delay_s: float  # after that
    lasts_s: float  # node or store away for so long
    times: int  # requests harmed
    pick: float  # in [0, 1): which of the processes that there are


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """Some runs on one cache at once, and what goes wrong while they are at work."""

    changes: tuple[Change, ...]  # to the corpus, before
    num_jobs: int
    faults: tuple[Fault, ...]
    pause_s: float  # of the encoder, an image


@dataclass(frozen=True, kw_only=True, slots=True)
class StormPlan:
    """A storm; its last, undisturbed run is not part of it."""

    seed: int
    store: Store
    first: tuple[str, ...]  # shards of the corpus at the start
    phases: tuple[Phase, ...]
    last_changes: tuple[Change, ...]  # before the last run

    @property
    def faults(self) -> list[Fault]:
        return [fault for phase in self.phases for fault in phase.faults]

    @property
    def kinds(self) -> set[str]:
        """Return what this storm is made of."""
        changes = [c for phase in self.phases for c in phase.changes] + list(self.last_changes)
        kinds = {fault.kind for fault in self.faults} | {kind for kind, _, _ in changes}
        return kinds | {"two_jobs" for phase in self.phases if phase.num_jobs > 1}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def draw_storm(seed: int, store: Store, *, is_short: bool = False) -> StormPlan:
    """Return the storm of a seed; the same for ever, unless this module or `corpus.py` changes.

    Args:
        seed: any whole number.
        store: where corpus and cache are.
        is_short: of one phase; else of one or two.
    """
    rng = random.Random(f"{seed} {store} {is_short}")
    first = tuple(sorted(rng.sample(SHARDS, rng.randint(11, 14))))
    history = {shard: [0] for shard in first}
    phases = []
    for number in range(1 if is_short else rng.choice((1, 1, 2, 2))):
        phases.append(
            Phase(
                changes=draw_changes(rng, history) if number else (),
                num_jobs=2 if rng.random() < 0.3 else 1,
                faults=_draw_faults(rng, store, is_short=is_short),
                pause_s=rng.choice((0.02, 0.03, 0.05)),
            )
        )
    last = draw_changes(rng, history) if rng.random() < 0.7 else ()
    return StormPlan(seed=seed, store=store, first=first, phases=tuple(phases), last_changes=last)


def kinds_of(plans: Sequence[StormPlan]) -> set[str]:
    """Return what some storms are made of together."""
    return set().union(*(plan.kinds for plan in plans))


def _draw_faults(rng: random.Random, store: Store, *, is_short: bool) -> tuple[Fault, ...]:
    kinds = rng.sample(PROCESS_FAULTS, k=rng.randint(1, 2))
    if store == "s3":
        kinds += rng.sample(STORE_FAULTS, k=3 if is_short else rng.randint(1, 2))
        rng.shuffle(kinds)
    kinds.sort(key=lambda kind: kind in _ENDINGS)
    shares = sorted(_draw_share(rng) for _ in kinds)
    return tuple(_draw_fault(rng, *both) for both in zip(kinds, shares, strict=True))


def _draw_share(rng: random.Random) -> float:
    """Return how much is done by then; now and then all, and only the snapshot is to be made."""
    return 1.0 if rng.random() < 0.1 else round(rng.uniform(0.0, 0.85), 3)


def _draw_fault(rng: random.Random, kind: str, share: float) -> Fault:
    is_early = kind != "stop_driver" and rng.random() < 0.1
    return Fault(
        kind=kind,
        after="start" if is_early else rng.choice(("attempts", "commits")),
        share=share,
        delay_s=rng.choice((0.0, round(rng.uniform(0.0, 0.4), 3))) + 2 * is_early * rng.random(),
        lasts_s=round(rng.uniform(0.2, 3.0), 3),
        times=rng.randint(2, 20),
        pick=round(rng.random(), 4),
    )
