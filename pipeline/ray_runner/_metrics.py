"""The metrics of a run, for Prometheus by way of Ray. The driver sets all of them.

Actors tell the driver what they know once a second, and what a shard came to with its commit. So
an actor that ends takes no count with it. What the driver itself counts in its last seconds may be
lost when it ends before Ray has fetched it: `summary.json` is the authority.
"""

import time
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ray.util import metrics

from pipeline.ray_runner._fleet import Fleet
from pipeline.run_report import RunReport

_INTERVAL_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One metric, as `docs/runs.md` lists it."""

    kind: Literal["counter", "gauge"]
    tag: str = ""  # beside `run`
    about: str


METRICS: Mapping[str, Metric] = {
    "carve_images": Metric(kind="counter", about="images committed"),
    "carve_samples_rejected": Metric(
        kind="counter", tag="reason", about="samples rejected in committed shards"
    ),
    "carve_shards": Metric(
        kind="counter", tag="outcome", about="shards settled: committed or failed"
    ),
    "carve_shards_failed": Metric(kind="counter", tag="reason", about="shards given up"),
    "carve_retries": Metric(kind="counter", tag="reason", about="attempts begun again"),
    "carve_tail_duplicates": Metric(
        kind="counter", about="second attempts at late shards, at the end of a run"
    ),
    "carve_actors_lost": Metric(
        kind="counter", tag="reason", about="actors that died or were ended and replaced"
    ),
    "carve_read_bytes": Metric(kind="counter", about="bytes of encoded images read"),
    "carve_token_bytes": Metric(kind="counter", about="bytes of packed tokens committed"),
    "carve_tokens": Metric(
        kind="counter", tag="kind", about="tokens: full before carving, kept after it"
    ),
    "carve_stage_seconds": Metric(
        kind="counter", tag="stage", about="seconds spent in a stage, over all actors and threads"
    ),
    "carve_shards_left": Metric(kind="gauge", about="shards of the run that are not settled"),
    "carve_images_in_flight": Metric(
        kind="gauge", about="images carved in shards that are not committed yet"
    ),
    "carve_queue_bytes": Metric(
        kind="gauge", tag="stage", about="bytes waiting for a stage, over all actors"
    ),
    "carve_batch_size": Metric(kind="gauge", about="images an encoder call takes at most"),
    "carve_actors": Metric(kind="gauge", tag="state", about="actors: loading, working or idle"),
    "carve_actor_peak_rss_bytes": Metric(
        kind="gauge", about="largest resident memory an actor has had"
    ),
}
"""By the name given to Ray, which puts `ray_` in front, and `_total` behind a counter."""


class RunMetrics:
    """Sets the metrics of one run from its report and its actors.

    Args:
        report: counted on; each update exports what has changed.
    """

    def __init__(self, report: RunReport) -> None:
        self._report = report
        kinds = {"counter": metrics.Counter, "gauge": metrics.Gauge}
        self._metrics = {
            name: kinds[m.kind](name, description=m.about, tag_keys=("run", *_tag(m)))
            for name, m in METRICS.items()
        }
        self._exported: defaultdict[tuple[str, str], float] = defaultdict(float)  # of counters
        self._updated_at = 0.0

    def update(self, fleet: Fleet, batch_size: int, *, at_end: bool = False) -> None:
        """Export what has changed since the last time, once a second and at the end."""
        now = time.monotonic()
        if not at_end and now - self._updated_at < _INTERVAL_S:
            return
        self._updated_at = now
        for name, value in self._counters().items():
            for tag, total in value.items():
                if grown := total - self._exported[name, tag]:
                    self._exported[name, tag] = total
                    self._metrics[name].inc(grown, tags=self._tags(name, tag))
        for name, value in self._gauges(fleet, batch_size).items():
            for tag, now in value.items():
                self._metrics[name].set(now, tags=self._tags(name, tag))

    def _counters(self) -> Mapping[str, Mapping[str, float]]:
        report = self._report
        return {
            "carve_images": {"": report.num_images},
            "carve_samples_rejected": report.num_rejected,
            "carve_shards": {"committed": report.num_committed, "failed": len(report.failed)},
            "carve_shards_failed": Tally(failure.reason for failure in report.failed),
            "carve_retries": report.retries,
            "carve_tail_duplicates": {"": report.num_doubled},
            "carve_actors_lost": report.actors_lost,
            "carve_read_bytes": {"": report.bytes_in},
            "carve_token_bytes": {"": report.bytes_tokens},
            "carve_tokens": {"full": report.tokens_full, "kept": report.tokens_kept},
            "carve_stage_seconds": report.stage_seconds,
        }

    def _gauges(self, fleet: Fleet, batch_size: int) -> Mapping[str, Mapping[str, float]]:
        report, members = self._report, fleet.members
        settled = report.num_done_before + report.num_committed + len(report.failed)
        queued: Tally[str] = Tally(encode=0, write=0)
        for member in members:
            queued.update(member.latest.queued_bytes)
        loading = sum(member.loading is not None for member in members)
        idle = sum(member.is_idle for member in members)
        return {
            "carve_shards_left": {"": report.num_shards - settled},
            "carve_images_in_flight": {"": report.num_in_flight},
            "carve_queue_bytes": queued,
            "carve_batch_size": {"": batch_size},
            "carve_actors": {
                "loading": loading,
                "idle": idle,
                "working": len(members) - loading - idle,
            },
            "carve_actor_peak_rss_bytes": {"": report.peak_rss_bytes},
        }

    def _tags(self, name: str, value: str) -> dict[str, str]:
        return {"run": self._report.run_id, **dict.fromkeys(_tag(METRICS[name]), value)}


def _tag(metric: Metric) -> tuple[str, ...]:
    return (metric.tag,) if metric.tag else ()
