"""Connect to a Ray cluster, and see how many actors it can hold."""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from pipeline.config import RunnerConfig
from pipeline.errors import ConfigError
from pipeline.stop_signal import StopRequestedError, StopSignals

logger = logging.getLogger(__name__)


@contextmanager
def local_cluster(*, num_cpus: int) -> Iterator[None]:
    """Run a Ray cluster of this machine alone for the block; it reports no usage to anybody."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        num_cpus=num_cpus,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def connected(signals: StopSignals | None = None) -> Iterator[None]:
    """Connect to a cluster unless the caller is connected; leave things as they were.

    Args:
        signals: Ray takes the signals for itself when it connects; here they are taken back.

    Raises:
        ConfigError: no cluster answers.
        StopRequestedError: Ray had the signals when one came.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    is_local = address in (None, "", "local")
    try:
        ray.init(
            log_to_driver=False,
            include_dashboard=False if is_local else None,
            logging_level=logging.ERROR,
        )
    except ConnectionError as err:
        reason = " ".join(str(err).split())
        raise ConfigError(
            f"no Ray cluster answers at {address or 'this machine'}: {reason}; set RAY_ADDRESS to "
            "one that runs, or to `local` to start one here"
        ) from err
    except SystemExit as err:
        if signals is None:
            raise
        signals.request()
        raise StopRequestedError from err
    if signals is not None:
        signals.take()
    try:
        yield
    finally:
        ray.shutdown()


def actor_shape(runner: RunnerConfig, num_shards: int) -> tuple[float, float, int]:
    """Return (GPUs per actor, CPUs per actor, actors).

    With `num_actors: auto`, as many as the nodes that are there can hold.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = runner.gpus_per_actor
    if gpus == "auto":
        gpus = 1.0 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0.0
    cpus = float(runner.cpus_per_actor)
    room = sum(_room(node, gpus, cpus) for node in nodes)
    if room == 0:
        largest = max(nodes, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)))
        logger.warning(
            "no node of the cluster can hold an actor of %g GPU and %g CPU (the largest has %g GPU "
            "and %g CPU); waiting %.0f s for one that can: see runner.gpus_per_actor, "
            "runner.cpus_per_actor",
            gpus,
            cpus,
            largest.get("GPU", 0),
            largest.get("CPU", 0),
            runner.actor_start_s,
        )
    count = max(1, room) if runner.num_actors == "auto" else runner.num_actors
    return gpus, cpus, max(1, min(count, num_shards))


def _room(node: dict[str, float], gpus: float, cpus: float) -> int:
    by_gpu = math.floor(node.get("GPU", 0) / gpus) if gpus else math.inf
    by_cpu = math.floor(node.get("CPU", 0) / cpus) if cpus else math.inf
    if gpus == cpus == 0:
        by_cpu = node.get("CPU", 0)
    return int(min(by_gpu, by_cpu))
