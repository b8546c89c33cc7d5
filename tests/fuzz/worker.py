"""Run numbered inputs of one target in a process of its own, of bounded memory.

`python -m tests.fuzz.worker TARGET SEED FIRST COUNT` writes the number of each input before it is
tried, and at the end a line of JSON. With COUNT 1 that is how a single input is tried again.
"""

import faulthandler
import json
import os
import resource
import sys
import time
import traceback
from collections import Counter

from pipeline.errors import PipelineError
from tests.fuzz.cache_targets import PartTarget, RecordTarget, TableTarget
from tests.fuzz.image_target import ImageTarget
from tests.fuzz.row_target import RowTarget
from tests.fuzz.tar_target import TarTarget
from tests.fuzz.target import Target

TARGETS: dict[str, type[Target]] = {
    target.name: target
    for target in (TarTarget, ImageTarget, PartTarget, RowTarget, RecordTarget, TableTarget)
}


def main() -> None:
    faulthandler.enable()
    name, *numbers = sys.argv[1:]
    seed, first, count = map(int, numbers)
    target = _target(name)
    _limit_memory(target.memory_bytes)
    outcomes: Counter[str] = Counter()
    broken: list[tuple[int, str]] = []
    slowest = (0.0, first)
    for number in range(first, first + count):
        os.write(1, b"%d\n" % number)
        started = time.monotonic()
        outcome = _try(target, seed, number, broken)
        outcomes[outcome] += 1
        slowest = max(slowest, (time.monotonic() - started, number))
    result = {"outcomes": outcomes, "broken": broken, "slowest": slowest}
    os.write(1, json.dumps(result).encode() + b"\n")


def _target(name: str) -> Target:
    if name in TARGETS:
        return TARGETS[name]()
    from tests.fuzz.test_fuzz import Faulty  # a target with faults, to test this very process

    return Faulty()


def _try(target: Target, seed: int, number: int, broken: list[tuple[int, str]]) -> str:
    made = target.make(seed, number)
    try:
        return target.check(made)
    except PipelineError as err:
        return type(err).__name__
    except Exception:  # noqa: BLE001  (that there is none is what is tested)
        broken.append((number, traceback.format_exc()))
        return "broken"


def _limit_memory(extra: int) -> None:
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[0])
    limit = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
