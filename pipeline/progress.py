"""Show how a run goes: a bar on a terminal, one log line every few seconds elsewhere."""

import logging
import time
from collections import Counter
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from pipeline.run_report import RunReport

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RunProgress:
    """Called often by the driver; decides itself when to show something.

    Args:
        interval_s: seconds between lines.
        console: where a bar is drawn, if it is a terminal.
    """

    interval_s: float
    console: Console = field(default_factory=lambda: Console(stderr=True))
    _shown_at: float = field(default_factory=lambda: time.monotonic(), init=False)
    _window: list[tuple[float, int]] = field(default_factory=list, init=False)
    _rich: Progress | None = field(default=None, init=False)

    def update(self, report: RunReport, *, images_in_flight: int, actors: str) -> None:
        """Show the state if it is time to.

        Args:
            report: the counts so far.
            images_in_flight: images done in shards that are not committed yet.
            actors: how many actors are at work, in words.
        """
        now = time.monotonic()
        if now - self._shown_at < (0.2 if self.console.is_terminal else self.interval_s):
            return
        self._shown_at = now
        line = self._line(report, images_in_flight, actors, now)
        if not self.console.is_terminal:
            logger.info("%s", line)
            return
        if self._rich is None:
            columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._rich = Progress(*columns, console=self.console, transient=True)
            self._rich.add_task("", total=report.num_shards)
            self._rich.start()
        done = report.num_done_before + report.num_committed + len(report.failed)
        self._rich.update(self._rich.task_ids[0], completed=done, description=line)

    def close(self) -> None:
        """Remove the bar."""
        if self._rich is not None:
            self._rich.stop()

    def _line(self, report: RunReport, in_flight: int, actors: str, now: float) -> str:
        images = report.num_images + in_flight
        self._window = [*self._window[-30:], (now, images)]
        then, before = self._window[0]
        rate = (images - before) / (now - then) if now > then else 0.0
        total = _expected_images(report)
        done = report.num_done_before + report.num_committed
        parts = [
            f"shards {done}/{report.num_shards}",
            f"images {images}/{'?' if total is None else f'~{max(total, images)}'}",
            f"{rate:.1f} img/s",
            f"ETA {_duration(None if total is None or not rate else (total - images) / rate)}",
            actors,
        ]
        if report.failed:
            parts.append("failed " + _counts(Counter(f.reason for f in report.failed)))
        if report.num_rejected:
            parts.append("rejected " + _counts(report.num_rejected))
        return ", ".join(parts)


def _expected_images(report: RunReport) -> int | None:
    """Return how many images this run will write, if its other shards are like the first."""
    if not report.num_committed:
        return None
    to_commit = report.num_shards - report.num_done_before - len(report.failed)
    return round(report.num_images / report.num_committed * to_commit)


def _counts(counter: Counter[str]) -> str:
    return " ".join(f"{reason}:{count}" for reason, count in counter.most_common())


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
