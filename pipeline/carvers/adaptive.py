"""Give every image its own budget, by how many directions its tokens use, and carve it by another.

An image of twice the usual effective rank gets twice the tokens, within bounds.

Source: none for the rule, a wrapper built here; the effective rank of centred features as a measure
of an image's variety is AgilePruner's (arXiv 2603.01236), see `_rank`.
Differs: from AgilePruner, which changes thresholds and not the count. **Until it is calibrated
(`mean_rank` is null) nothing adapts: every image gets the mean budget.** `carve calibrate` sets
`mean_rank` from a sample of the corpus, such that the sample is given what was asked on average,
rounding and bounds included. `llavolta`, `adsc_stride`, `average_pool` and, on tiles, `globalcom2`
keep somewhat less than they are given. Calibrate again after a change of encoder, budget or bounds.
Options of the wrapped carver are not set: calibrate it by itself first. Batches become ragged.
Needs: what the wrapped carver needs.
Cost: eigenvalues of the smaller Gram matrix, O(N^2 D + N^3) per image in float64. A nested carver
runs once, at the largest budget of a batch; another once for each budget that occurs.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated, Any, ClassVar, Self, cast

from pydantic import Field

from pipeline import carvers
from pipeline.carvers._base import BUDGET_OPTIONS, DEFAULT_KEEP_RATIO, BudgetCarver, Carver
from pipeline.carvers._rank import effective_rank, sample_ranks
from pipeline.errors import ConfigError
from pipeline.types import CarvedTokens, VisualTokens

_HALVINGS = 60  # of the interval of ranks: beyond what float64 tells apart


@dataclass(frozen=True, kw_only=True)
class Adaptive(Carver):
    """Share the corpus's budget among its images by their effective rank.

    Args:
        carver: name of a carver with a budget, which does the work.
        options: its options, without a budget.
        mean_tokens: tokens kept per image, mean over the corpus.
        mean_ratio: share of the tokens kept likewise; 0.25 where neither is given.
        min_ratio: of the mean budget, the least that an image gets; max_ratio the most.
        mean_rank: effective rank that earns the mean budget; null gives it to every image.
    """

    nested: ClassVar[bool] = False  # an instance has this and all such flags of its carver

    carver: str = "tokencarve"
    options: Mapping[str, Any] = field(default_factory=dict)
    mean_tokens: Annotated[int, Field(ge=1)] | None = None
    mean_ratio: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    min_ratio: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.5
    max_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0
    mean_rank: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    def __post_init__(self) -> None:
        """Check budgets and the wrapped carver once."""
        if self.mean_tokens is not None and self.mean_ratio is not None:
            raise ValueError(
                f"mean_tokens={self.mean_tokens} and mean_ratio={self.mean_ratio} are both given; "
                "give exactly one"
            )
        if self.mean_tokens is None and self.mean_ratio is None:
            object.__setattr__(self, "mean_ratio", DEFAULT_KEEP_RATIO)
        if budgets := sorted(BUDGET_OPTIONS & self.options.keys()):
            raise ValueError(f"options hold {budgets}: give mean_tokens or mean_ratio instead")
        for flag in [name for name, value in vars(Carver).items() if isinstance(value, bool)]:
            object.__setattr__(self, flag, getattr(self._at_mean, flag))

    @property
    def needs(self) -> frozenset[str]:
        """The signals of the wrapped carver."""
        return self._at_mean.needs

    def describe(self) -> Mapping[str, Any]:
        """The options; in place of the given options of the wrapped carver all that decide."""
        return {**asdict(self), "options": self._at_mean.describe()}

    def calibrated(self, sample: Iterable[VisualTokens]) -> Self:
        """Return this carver with `mean_rank` such that the sample's mean budget is as asked.

        Raises:
            ConfigError: the sample is empty.
            NonFiniteError: features hold NaN or infinity.
        """
        images = sample_ranks(sample)
        if not images:
            raise ConfigError("mean_rank cannot be set from a sample without images")

        def excess(mean_rank: float) -> int:
            return sum(self._budget(n, r, mean_rank) - self._at_mean.budget(n) for n, r in images)

        ranks = sorted(rank for _, rank in images)
        # At these every image gets its most, or its least.
        low, high = ranks[0] / (2 * self.max_ratio), ranks[-1] * 2 / self.min_ratio
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if excess(middle) > 0 else (low, middle)
        return replace(self, mean_rank=min(high, low, key=lambda rank: abs(excess(rank))))

    def _budget(self, num_tokens: int, rank: float, mean_rank: float) -> int:
        mean = self._at_mean.budget(num_tokens)
        least = max(1, round(self.min_ratio * mean))
        most = min(num_tokens, round(self.max_ratio * mean))
        return min(most, max(least, round(mean * rank / mean_rank)))

    def _carve(self, tokens: VisualTokens) -> list[CarvedTokens]:
        num_images, num_tokens, _ = tokens.features.shape
        budgets = [self._at_mean.budget(num_tokens)] * num_images
        if self.mean_rank is not None:
            ranks = effective_rank(tokens.features).tolist()
            budgets = [self._budget(num_tokens, rank, self.mean_rank) for rank in ranks]
        if self.nested:
            results = self._at(max(budgets)).carve(tokens)
            return [_best(result, k) for result, k in zip(results, budgets, strict=True)]
        by_image: dict[int, CarvedTokens] = {}
        for budget in sorted(set(budgets)):
            images = [image for image, k in enumerate(budgets) if k == budget]
            by_image |= zip(images, self._at(budget).carve(_only(tokens, images)), strict=True)
        return [by_image[image] for image in range(num_images)]

    @functools.cached_property
    def _at_mean(self) -> BudgetCarver:
        """The wrapped carver with the mean budget."""
        budget = {"keep_tokens": self.mean_tokens, "keep_ratio": self.mean_ratio}
        if not issubclass(carvers.load(self.carver), BudgetCarver):
            raise ConfigError(f"carver={self.carver!r} has no budget to adapt: choose one that has")
        return cast(BudgetCarver, carvers.build(self.carver, {**self.options, **budget}))

    def _at(self, budget: int) -> BudgetCarver:
        return replace(self._at_mean, keep_tokens=budget, keep_ratio=None)


def _best(result: CarvedTokens, count: int) -> CarvedTokens:
    chosen_K = result.ranks < count
    return CarvedTokens(**{f.name: getattr(result, f.name)[chosen_K] for f in fields(result)})


def _only(tokens: VisualTokens, images: list[int]) -> VisualTokens:
    signals = {name: signal[images] for name, signal in tokens.signals.items()}
    return replace(tokens, features=tokens.features[images], signals=signals, image_indices=None)
