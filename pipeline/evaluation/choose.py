"""The cheapest way to store tokens that keeps a model's answers, by an evaluation of a sample."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from pipeline.config import JobConfig
from pipeline.evaluation.findings import ALL
from pipeline.evaluation.statistics import CONFIDENCE
from pipeline.evaluation.variants import FULL, UNCOMPRESSED, budget_option


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One carver, budget and codec, and what it came to."""

    carver: str
    carver_options: Mapping[str, Any]  # without the budget
    budget: float
    codec: str
    codec_options: Mapping[str, Any]
    placement: str
    tokens: float  # per image, mean
    bytes: float  # per image, mean
    bytes_per_jpeg: float
    agreement: float
    low: float  # of the bootstrap's interval
    high: float
    bound: float  # what the sample shows: `low`, at most what so many images can show at all

    @property
    def name(self) -> str:
        """Carver, share of the tokens and codec in words."""
        options = json.dumps(dict(self.carver_options)) if self.carver_options else ""
        share = "" if self.budget == 1 else f" {self.budget:.4f}"
        placement = "" if self.placement == "packed" else f", {self.placement}"
        return f"{self.carver}{options}{share} {self.codec}{placement}"


def list_candidates(summary: Mapping[str, Any]) -> list[Candidate]:
    """Return every variant that is read whole, the cheapest first.

    Full tokens uncompressed are not one: they are the reference, which agrees by definition.

    Where all of n images agree, every resample agrees too, and the bootstrap's interval has no
    width. So the bound is at most alpha / 2 to the power 1 / n, the exact lower bound of a share
    that was 1 in n trials (Clopper and Pearson, Biometrika 26, 1934): 0.944 for 64 images.

    Args:
        summary: of an evaluation.
    """
    found = [
        _candidate(row)
        for row in summary["variants"]
        if row["family"] == ALL
        and row["read"] == row["budget"]
        and (row["carver"], row["codec"]) != (FULL, UNCOMPRESSED)
    ]
    return sorted(found, key=lambda c: (c.bytes, -c.bound, c.name))


def choose(candidates: Sequence[Candidate], keep_agreement: float) -> Candidate | None:
    """Return the cheapest candidate whose bound is at least `keep_agreement`; None if none is."""
    return next((c for c in candidates if c.bound >= keep_agreement), None)


def best(candidates: Sequence[Candidate]) -> Candidate:
    """Return the candidate of the highest bound; of equal ones the cheapest."""
    return max(candidates, key=lambda c: (c.bound, -c.bytes))


def chosen_config(run: JobConfig, chosen: Candidate) -> str:
    """Return the YAML of a run with the carver and codec that were chosen.

    Args:
        run: says everything else.
        chosen: a candidate.
    """
    values = run.model_dump(mode="json")
    option = budget_option(chosen.carver)
    budget = {} if option is None else {option: chosen.budget}
    values["carver"] = {"name": chosen.carver, "options": {**chosen.carver_options, **budget}}
    values["codec"] = {"name": chosen.codec, "options": dict(chosen.codec_options)}
    said = f"# Chosen for tokens handed over with placement={chosen.placement!r}.\n"
    return said + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def evidence(candidates: Sequence[Candidate], keep_agreement: float) -> Iterator[str]:
    """Yield the lines of a table of all candidates, the cheapest first."""
    width = max(len(c.name) for c in candidates)
    yield (
        f"{'':>5}  {'carver, share, codec':<{width}}  {'tokens':>7}  {'bytes':>9}  {'of JPEG':>8}  "
        f"agreement [{CONFIDENCE:.0%} interval]  shown"
    )
    for c in candidates:
        mark = "meets" if c.bound >= keep_agreement else ""
        yield (
            f"{mark:>5}  {c.name:<{width}}  {c.tokens:>7.1f}  {c.bytes:>9.0f}  "
            f"{c.bytes_per_jpeg:>8.2f}  {c.agreement:>6.1%} [{c.low:>6.1%}, {c.high:>6.1%}]"
            f"{'':>6}  {c.bound:>6.1%}"
        )


def _candidate(row: Mapping[str, Any]) -> Candidate:
    agreement = row["agreement"]
    most = ((1 - CONFIDENCE) / 2) ** (1 / agreement["images"])
    # NaN from a single image compares as false everywhere: it shows nothing.
    low = agreement["low"] if agreement["low"] == agreement["low"] else 0.0
    return Candidate(
        carver=row["carver"],
        carver_options=json.loads(row["carver_options"]),
        budget=row["budget"],
        codec=row["codec"],
        codec_options=json.loads(row["codec_options"]),
        placement=row["placement"],
        tokens=row["tokens"]["mean"],
        bytes=row["bytes"]["mean"],
        bytes_per_jpeg=row["bytes_per_jpeg"]["mean"],
        agreement=agreement["mean"],
        low=low,
        high=agreement["high"],
        bound=min(low, most),
    )
