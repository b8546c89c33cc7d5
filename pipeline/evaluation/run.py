"""Run an evaluation in one process, or put together what several have measured."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from pipeline.errors import ConfigError
from pipeline.evaluation.findings import summarize
from pipeline.evaluation.images import Batches
from pipeline.evaluation.measure import Measurer
from pipeline.evaluation.results import (
    FORMAT_VERSION,
    ResultWriter,
    read_tables,
    write_summary,
)
from pipeline.evaluation.statistics import CONFIDENCE
from pipeline.evaluation.task import EvaluationTask

logger = logging.getLogger(__name__)

Tables = tuple[pa.Table, pa.Table]


class Share:
    """One of several equal shares of an evaluation, in this process.

    Args:
        task: what to measure.
        share: of `num_shares`, from 0.
        num_shares: that there are.
        device: a torch device; None for a GPU where there is one.
    """

    def __init__(
        self,
        task: EvaluationTask,
        *,
        share: int = 0,
        num_shares: int = 1,
        device: str | None = None,
    ) -> None:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.measurer = Measurer(task, device=device)
        self.batches = Batches(
            source=task.source,
            questions=task.questions,
            batch_size=task.config.runner.batch_size,
            share=share,
            num_shares=num_shares,
        )

    @property
    def device(self) -> str:
        """That it works on."""
        return self.measurer.device

    @property
    def rejected(self) -> Counter[str]:
        """Images that could not be used, by reason."""
        return self.batches.rejected + self.measurer.rejected

    def load(self) -> None:
        """Load the models; see `Measurer.load`."""
        self.measurer.load()

    def tables(self) -> Iterator[Tables | None]:
        """Yield the rows of each batch; None for one of which no image can be used."""
        for batch in self.batches:
            yield self.measurer.measure(batch)


def evaluate(
    task: EvaluationTask,
    *,
    device: str | None = None,
    on_batch: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure every variant on every image, and write the tables and `summary.json`.

    Args:
        task: of `resolve_evaluation`.
        device: a torch device; None for a GPU where there is one.
        on_batch: called with the images measured so far.

    Returns:
        The summary.

    Raises:
        ConfigError: weights cannot be loaded, or no image can be used.
        ShardError: a shard is damaged.
        StorageError: the input cannot be read.
    """
    share = Share(task, device=device)
    share.load()
    return write_results(
        task,
        share.tables(),
        rejected=lambda: share.rejected,
        device=share.device,
        on_batch=on_batch,
    )


def write_results(
    task: EvaluationTask,
    batches: Iterable[Tables | None],
    *,
    rejected: Callable[[], Counter[str]],
    device: str,
    on_batch: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Write what was measured; arguments and errors as for `evaluate`.

    Args:
        task: that was measured.
        batches: rows, batch after batch in the order of the input.
        rejected: asked after the last batch for the images left out.
        device: they were measured on.
        on_batch: called with the images measured so far.
    """
    started = time.perf_counter()
    folder, asked = Path(task.config.output), task.config.evaluation
    num_variants, num_images = len(task.grid.variants), 0
    with ResultWriter(folder) as writer:
        for tables in batches:
            if tables is None:
                continue
            writer.write(*tables)
            num_images += len(tables[1]) // num_variants
            on_batch(num_images)
        left_out = dict(rejected().most_common())
        if not num_images:
            reasons = ", ".join(f"{reason} {count}" for reason, count in left_out.items())
            raise ConfigError(
                f"no image has questions and can be used ({reasons or 'none was rejected'}): check "
                "the input, and the keys of the questions"
            )
    measured = time.perf_counter()
    answers, images = read_tables(folder)
    found = summarize(answers, images, resamples=asked.resamples, seed=asked.seed)
    summary = {
        "version": FORMAT_VERSION,
        "confidence": CONFIDENCE,
        "resamples": asked.resamples,
        "device": device,
        "rejected": left_out,
        "seconds": {
            "measure": measured - started,
            "summarize": time.perf_counter() - measured,
        },
        **task.identity,
        **found,
    }
    write_summary(folder, summary)
    return summary
