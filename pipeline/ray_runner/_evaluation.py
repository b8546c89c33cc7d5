"""Spread an evaluation over Ray actors: each measures every n-th batch of the images."""

import logging
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from pipeline.errors import ConfigError, PipelineError
from pipeline.evaluation.run import Share, Tables, write_results
from pipeline.evaluation.task import EvaluationTask
from pipeline.heap import ENVIRONMENT
from pipeline.ray_runner._cluster import actor_shape, connected

logger = logging.getLogger(__name__)

_MANY = 1 << 30  # batches there may be: only the cluster and the config bound the actors


class EvaluateActor:
    """Holds the models and measures its share, a batch a call; runs in Ray."""

    def __init__(self, task: EvaluationTask, share: int, num_shares: int) -> None:
        logging.basicConfig(level=logging.WARNING)
        torch.set_num_threads(max(1, task.config.runner.cpus_per_actor))
        on_gpu = bool(ray.get_gpu_ids()) and torch.cuda.is_available()
        self._share = Share(
            task, share=share, num_shares=num_shares, device="cuda" if on_gpu else "cpu"
        )
        self._tables = self._share.tables()

    def load(self) -> tuple[str, str]:
        """Load the models; return the device and where it is, in words."""
        self._share.load()
        return self._share.device, f"{platform.node()}: {self._share.device}"

    def next(self) -> tuple[bool, Tables | None]:
        """Return whether there was a batch left, and its rows; none if no image could be used."""
        for tables in self._tables:
            return True, tables
        return False, None

    def rejected(self) -> Counter[str]:
        """Return the images left out by this share, by reason; after its last batch."""
        return self._share.rejected


def evaluate_on_ray(
    task: EvaluationTask, *, on_batch: Callable[[int], None] = lambda _: None
) -> dict[str, Any]:
    """Measure every variant on every image with the actors of a cluster; write the results here.

    Connects to the Ray cluster of `RAY_ADDRESS` or of this machine, or starts a local one. All
    actors read the shards and cut the same batches, so that the rows do not depend on how many
    there are; on equal devices and threads they are the same as in one process.

    Args:
        task: of `resolve_evaluation`.
        on_batch: called with the images measured so far.

    Returns:
        The summary, as `evaluate` gives it.

    Raises:
        ConfigError: no cluster answers, weights cannot be loaded, or no image can be used.
        PipelineError: an actor ended; nothing is kept.
    """
    with connected():
        runner = task.config.runner
        gpus, cpus, num_actors = actor_shape(runner, _MANY)
        actor_class = ray.remote(
            num_gpus=gpus,
            num_cpus=cpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": ENVIRONMENT},
        )(EvaluateActor)
        task_ref = ray.put(task)
        actors = [actor_class.remote(task_ref, share, num_actors) for share in range(num_actors)]
        try:
            places = _get([actor.load.remote() for actor in actors], timeout=runner.actor_start_s)
            logger.info("%d actors: %s", num_actors, ", ".join(place for _, place in places))
            return write_results(
                task,
                _in_order(actors),
                rejected=lambda: _rejected(actors),
                device=places[0][0],
                on_batch=on_batch,
            )
        finally:
            for actor in actors:
                ray.kill(actor)


def _in_order(actors: Sequence[Any]) -> Iterator[Tables | None]:
    """Yield the batches in the order of the input; each actor works one ahead."""
    calls = {actor: actor.next.remote() for actor in actors}
    while calls:
        for actor, call in list(calls.items()):
            (answer,) = _get([call])
            has_more, tables = answer
            if not has_more:
                del calls[actor]
                continue
            calls[actor] = actor.next.remote()
            yield tables


def _rejected(actors: Sequence[Any]) -> Counter[str]:
    return sum(_get([actor.rejected.remote() for actor in actors]), Counter[str]())


def _get(calls: Sequence[Any], timeout: float | None = None) -> list[Any]:
    """Return answers; an error of our own arrives as itself."""
    try:
        return list(ray.get(list(calls), timeout=timeout))
    except RayTaskError as err:
        if isinstance(err.cause, PipelineError):
            raise err.cause from err
        raise
    except ray.exceptions.GetTimeoutError as err:
        raise ConfigError(
            f"not every actor was ready after {timeout:.0f} s: see runner.num_actors, "
            "runner.cpus_per_actor, runner.actor_start_s"
        ) from err
    except RayError as err:
        reason = " ".join(str(err).split())
        raise PipelineError(f"an actor ended, run the evaluation again: {reason}") from err
