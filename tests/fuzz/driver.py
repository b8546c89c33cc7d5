"""Run many inputs of a target in processes that may be killed, and say how each ended."""

import json
import os
import select
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
HANG_S = 120.0  # without a new input; the slowest takes a second on a quiet machine
START_S = 240.0  # until its first input
BATCH = 2500


@dataclass(kw_only=True)
class Report:
    """How the inputs of a target ended."""

    target: str
    seed: int
    outcomes: Counter[str] = field(default_factory=Counter)
    broken: list[tuple[int, str]] = field(default_factory=list)  # number, what happened
    slowest: tuple[float, int] = (0.0, 0)  # seconds, number

    @property
    def count(self) -> int:
        return sum(self.outcomes.values())


def fuzz(target: str, *, seed: int, first: int = 0, count: int, hang_s: float = HANG_S) -> Report:
    """Try inputs `first` to `first + count` of a target.

    A process that ends, or does not come to its next input, costs that input; the rest is tried in
    another.
    """
    report = Report(target=target, seed=seed)
    number, end = first, first + count
    while number < end:
        number = _run(report, number, min(BATCH, end - number), hang_s)
    return report


def _run(report: Report, first: int, count: int, hang_s: float) -> int:
    """Run one process; return the number to go on with."""
    command = [sys.executable, "-m", "tests.fuzz.worker", report.target]
    command += [str(report.seed), str(first), str(count)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        current, result, hung = _follow(process, first - 1, hang_s)
        if hung:
            process.kill()
        errors = process.stderr.read().decode(errors="replace") if process.stderr else ""
    if result is not None:
        report.outcomes.update(result["outcomes"])
        report.broken += [(number, text) for number, text in result["broken"]]
        report.slowest = max(report.slowest, tuple(result["slowest"]))
        return first + count
    if current < first:
        raise RuntimeError(f"the worker of {report.target} did not start: {errors[-3000:]}")
    what = f"no end in {hang_s} s" if hung else f"the process ended with {process.returncode}"
    report.outcomes["hang" if hung else "crash"] += 1
    # The outcomes of those before it went with the process: they are tried again, without it.
    report.broken.append((current, f"{what}\n{errors[-3000:]}"))
    if current > first:
        _run(report, first, current - first, hang_s)
    return current + 1


def _follow(process: subprocess.Popen[bytes], current: int, hang_s: float):
    """Read numbers until the result, the end, or silence."""
    pending = b""
    stream = process.stdout
    assert stream is not None
    first = current
    # Imports take longer than any input where many processes share few cores.
    while select.select([stream], [], [], hang_s if current > first else START_S + hang_s)[0]:
        piece = os.read(stream.fileno(), 1 << 16)
        if not piece:
            return current, None, False
        *lines, pending = (pending + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"{"):
                return current, json.loads(line), False
            current = int(line)
    return current, None, True
