"""The means of an evaluation, looked up by variant, family and measure for tables and plots."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from pipeline.errors import CacheFormatError
from pipeline.evaluation.findings import ALL, MEAN
from pipeline.evaluation.results import VARIANT_COLUMNS
from pipeline.evaluation.variants import BASELINES, FULL, UNCOMPRESSED, Variant


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean with its 95 % interval, which a single image does not have."""

    mean: float
    low: float | None
    high: float | None

    @property
    def floor(self) -> float:
        """Lower end of the interval, or the mean."""
        return self.mean if self.low is None else self.low

    @property
    def ceiling(self) -> float:
        """Upper end of the interval, or the mean."""
        return self.mean if self.high is None else self.high

    def write(self, form: str, *, factor: float = 1) -> str:
        """Return the mean and its interval, each in a format such as `.1f`, times `factor`."""
        if self.low is None or self.high is None:
            return format(self.mean * factor, form)
        mean, low, high = (format(v * factor, form) for v in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"


@dataclass(frozen=True, kw_only=True)
class Means:
    """What an evaluation came to. Made by `parse_summary`."""

    num_images: int
    num_questions: int
    families: Sequence[str]  # of questions; none where there is only one
    estimates: Mapping[tuple[Variant, str, str], Estimate]  # by variant, family and measure
    information: Mapping[str, Sequence[Mapping[str, Any]]]  # correlations, as `findings` has them

    @cached_property
    def variants(self) -> Sequence[Variant]:
        """Each once, in the order of the summary."""
        return list(dict.fromkeys(variant for variant, _, _ in self.estimates))

    @cached_property
    def measure(self) -> str:
        """What variants are ranked by: `accuracy` where answers are given, else `agreement`."""
        measures = {measure for _, _, measure in self.estimates}
        return "accuracy" if "accuracy" in measures else "agreement"

    @cached_property
    def codec(self) -> tuple[str, str]:
        """Name and options of the codec that carvers are compared with: that of most variants."""
        carved = [v for v in self.variants if v.carver != FULL] or list(self.variants)
        counts = Counter((v.codec, v.codec_options) for v in carved)
        return max(counts, key=lambda codec: counts[codec])

    @property
    def budgets(self) -> Sequence[float]:
        """Shares of the tokens that carvers were asked for, the largest first."""
        return sorted({v.budget for v in self.variants if v.budget < 1}, reverse=True)

    @property
    def columns(self) -> Sequence[str]:
        """Families a table shows: the mean over families first, or all questions."""
        return (MEAN, *self.families) if self.families else (ALL,)

    @property
    def reference(self) -> Variant | None:
        """Full tokens, uncompressed."""
        found = (v for v in self.variants if v.carver == FULL and v.codec == UNCOMPRESSED)
        return next(found, None)

    def get(self, variant: Variant, measure: str, family: str = "") -> Estimate | None:
        """Return one mean; None where it was not measured.

        Args:
            variant: of the summary.
            measure: as the summary names it.
            family: of questions; "" for the mean over families where there is one, else all.
        """
        wanted = [family] if family else [self.columns[0], ALL]
        found = (self.estimates.get((variant, name, measure)) for name in wanted)
        return next((estimate for estimate in found if estimate is not None), None)

    def ranked(self, variants: Sequence[Variant]) -> list[Variant]:
        """Return variants from the best to the worst; those of equal means by name."""

        def rank(variant: Variant) -> tuple[float, str]:
            found = self.get(variant, self.measure)
            return (float("inf") if found is None else -found.mean, carver_label(variant))

        return sorted(variants, key=rank)

    def at_budget(self, budget: float) -> list[Variant]:
        """Return carvers at one budget, read whole, with the codec they are compared with."""
        return self.ranked(
            [
                v
                for v in self.variants
                if v.budget == v.read == budget
                and (v.codec, v.codec_options) == self.codec
                and v.carver != FULL
            ]
        )


def parse_summary(content: Mapping[str, Any]) -> Means:
    """Take what `summary.json` holds.

    Raises:
        CacheFormatError: it is not the summary of an evaluation, or holds no results.
    """
    try:
        families = [str(family) for family in content["families"]]
        means = Means(
            num_images=int(content["images"]),
            num_questions=int(content["questions"]),
            families=families if len(families) > 1 else [],
            estimates=dict(item for row in content["variants"] for item in _estimates(row)),
            information=content["information"],
        )
    except (KeyError, TypeError, AttributeError, ValueError) as err:
        raise CacheFormatError(f"not the summary of an evaluation: {err!r}") from err
    if not means.estimates:
        raise CacheFormatError("the summary of the evaluation holds no results: run it again")
    return means


def _estimates(row: Mapping[str, Any]) -> Iterator[tuple[tuple[Variant, str, str], Estimate]]:
    variant = Variant(**{name: row[name] for name in VARIANT_COLUMNS})
    for measure, found in row.items():
        if isinstance(found, Mapping):
            estimate = Estimate(mean=found["mean"], low=found["low"], high=found["high"])
            yield (variant, str(row["family"]), measure), estimate


def carver_label(variant: Variant) -> str:
    """Return carver, options and, where it is not the usual one, placement in a few words."""
    label = _label(variant.carver, variant.carver_options)
    return label if variant.placement == "packed" else f"{label}, {variant.placement}"


def codec_label(variant: Variant) -> str:
    """Return codec and options in a few words."""
    return _label(variant.codec, variant.codec_options)


def is_baseline(variant: Variant) -> bool:
    """Tell the carvers that every evaluation compares with."""
    return variant.carver in BASELINES


def share(value: float) -> str:
    """Return a share as a fraction of small numbers where it is one, else in per cent."""
    fraction = Fraction(value).limit_denominator(36)
    return str(fraction) if abs(fraction - value) < 1e-6 else f"{value:.1%}"


def _label(name: str, options: str) -> str:
    words = options.strip("{}").replace('"', "").replace(": ", "=")
    return f"{name} ({words})" if words else name
