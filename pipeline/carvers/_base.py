"""What a carver is. See `docs/design.md` for the contract that tests hold every carver to."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, ClassVar, Self

from pydantic import ConfigDict, Field
from torch import Tensor

from pipeline.carvers import _ops
from pipeline.types import CarvedTokens, VisualTokens

BUDGET_OPTIONS = frozenset({"keep_tokens", "keep_ratio"})
"""Options of every `BudgetCarver`; a carver that wraps another sets the other's budget itself."""

DEFAULT_KEEP_RATIO = 0.25
"""Kept share of the tokens where a configuration names no budget."""


@dataclass(frozen=True, kw_only=True)
class Carver(ABC):
    """A pure, deterministic function from all tokens of an image to the few worth storing.

    A subclass is a frozen dataclass whose fields are its options, every one with a default.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    nested: ClassVar[bool] = True
    """True if carving to K tokens equals the K best-ranked tokens of any larger result."""

    conserves: ClassVar[bool] = False
    """True if every source token counts in one result token: sizes sum to N."""

    averages: ClassVar[bool] = True
    """True if every result token is a source token or a weighted mean of some, not a sum."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the signals that `carve` reads; may depend on the options."""
        return frozenset()

    def describe(self) -> Mapping[str, Any]:
        """Return what decides the results: the options, and a digest of each file they name.

        JSON values only; enters the work fingerprint.

        Raises:
            ConfigError: a file that an option names cannot be read.
        """
        return asdict(self)

    def carve(self, tokens: VisualTokens) -> list[CarvedTokens]:
        """Carve each image of a batch, independently of its batch-mates.

        Args:
            tokens: B images of one grid with the signals named in `needs`.

        Returns:
            One result per image, in order. No result shares memory with the batch.

        Raises:
            MissingSignalError: the batch lacks a signal named in `needs`.
            NonFiniteError: features or a needed signal hold NaN or infinity, or sums of a carver
                that adds tokens up leave the dtype of the features; names the images.
        """
        _ops.require_finite(tokens.features, "features")
        for name in sorted(self.needs):
            _ops.require_finite(_ops.signal(tokens, name), name)
        # Of one layout in memory, so that sums over it round alike.
        tokens = replace(tokens, features=tokens.features.detach().contiguous())
        results = [result for part in _ops.split(tokens) for result in self._carve(part)]
        if not self.averages:
            _ops.require_finite_results(results, type(self).__name__)
        return results

    @abstractmethod
    def _carve(self, tokens: VisualTokens) -> list[CarvedTokens]:
        """Carve a part of a batch, small enough for a few (B, N, N) float32 matrices.

        All that `needs` names is there, and all values are finite.
        """

    def calibrated(self, sample: Iterable[VisualTokens]) -> Self:
        """Return this carver with the options that depend on the corpus set from a sample of it.

        Args:
            sample: tokens of some hundred images of the corpus, with the signals of `needs`.
        """
        del sample
        return self


@dataclass(frozen=True, kw_only=True)
class BudgetCarver(Carver):
    """A carver that is told how many tokens to keep.

    Args:
        keep_tokens: tokens kept per image, at least 1; all of them where an image has fewer.
        keep_ratio: share of the tokens kept, in (0, 1]. Set to 0.25 where neither is given, so
            that a built carver always shows its budget.

    Raises:
        ValueError: both are given, or one is out of range.
    """

    keep_tokens: Annotated[int, Field(ge=1)] | None = None
    keep_ratio: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None

    def __post_init__(self) -> None:
        """Check the budget once, also for carvers that Python code builds directly."""
        if self.keep_tokens is not None and self.keep_ratio is not None:
            raise ValueError(
                f"keep_tokens={self.keep_tokens} and keep_ratio={self.keep_ratio} are both given; "
                "give exactly one"
            )
        if self.keep_tokens is None and self.keep_ratio is None:
            object.__setattr__(self, "keep_ratio", DEFAULT_KEEP_RATIO)
        if self.keep_tokens is not None and self.keep_tokens < 1:
            raise ValueError(f"keep_tokens={self.keep_tokens} must be at least 1")
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio={self.keep_ratio} must be above 0 and at most 1")

    def budget(self, num_tokens: int) -> int:
        """Return K for images of `num_tokens` tokens: in [1, num_tokens], half to even."""
        if self.keep_tokens is not None:
            return min(num_tokens, self.keep_tokens)
        if self.keep_ratio is None:
            raise AssertionError("__post_init__ sets one of the two")
        return max(1, round(num_tokens * self.keep_ratio))


@dataclass(frozen=True, kw_only=True)
class SelectionCarver(BudgetCarver):
    """Keeps K tokens unchanged; says which, and in which order of importance."""

    @abstractmethod
    def select(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        """Return (B, num_kept) positions, no position twice, the token to keep longest first.

        Args:
            tokens: a part of a batch, checked.
            num_kept: K, in [1, N].
        """

    def _carve(self, tokens: VisualTokens) -> list[CarvedTokens]:
        num_kept = self.budget(tokens.features.shape[1])
        return _ops.keep(tokens.features, self.select(tokens, num_kept))


@dataclass(frozen=True, kw_only=True)
class ScoreCarver(SelectionCarver):
    """Keeps the K tokens of the highest score, unchanged; equal scores keep the lower position."""

    @abstractmethod
    def score(self, tokens: VisualTokens) -> Tensor:
        """Return (B, N) float32 scores, higher is kept first; each row from its image alone."""

    def select(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        """Return the best-scored positions; ranks follow the score."""
        return _ops.best_first(self.score(tokens))[:, :num_kept]
