"""Keep few tokens where an image repeats itself: the redundancy of early keys sets the count.

A token with more than `max_similar` early keys like its own is redundant. As many tokens as are not
are chosen by early attention; outliers of the deep attention (above the third quartile by 1.5
quartile ranges) are added. The others are merged into the kept token of the most similar key.

Source: Zhang et al., Token-level Correlation-guided Compression for Efficient Multimodal Document
Understanding, arXiv 2407.14439; its repository (@ 0773758) has a figure, no code and no licence.
Differs: a reconstruction. The early layer (here that of `shallow_keys`), `epsilon`, `max_similar`
and the weights of merging are not published; ours give other results than the paper's. Its tokens
are drawn at random by their attention; here the best are taken, since a draw could be repeated only
with the key of the image, which a carver does not see. The kept tokens fill no grid: they suit
projectors that work token by token, not the H-Reducer. Merging is a mean weighted by the cosine of
the keys (its positive part, 1 for the kept token itself); a token of weight 0 counts in the size.
The paper reports that 34 % are kept. Ranks: outliers by deep attention, then the rest by early one.
Needs: keys and attention of an early layer, and the class token's attention.
Cost: one N x N matrix of cosines, O(N^2 D') per image.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from pipeline.carvers import _ops, _similarity
from pipeline.carvers._base import Carver
from pipeline.carvers._image_pool import product
from pipeline.errors import ConfigError
from pipeline.types import CarvedTokens, VisualTokens

_HALVINGS = 30  # of the interval of cosines: to 2e-9, below what float32 tells apart


@dataclass(frozen=True, kw_only=True)
class DocCorrelation(Carver):
    """Decide the count by redundancy, keep what draws attention, and merge the rest into it.

    Args:
        epsilon: cosine of two early keys above which they count as alike.
        max_similar: tokens that may be like a token before it is redundant.
        target_ratio: mean share of the tokens that `calibrated` makes a corpus keep.
        global_attention: deep attention whose outliers are kept.
    """

    nested: ClassVar[bool] = False
    conserves: ClassVar[bool] = True

    epsilon: Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)] = 0.9
    max_similar: Annotated[int, Field(ge=0)] = 4
    target_ratio: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.34
    global_attention: Literal["cls_attention", "received_attention"] = "cls_attention"

    @property
    def needs(self) -> frozenset[str]:
        """Early keys and attention, deep attention."""
        return frozenset({"shallow_keys", "shallow_attention", self.global_attention})

    def calibrated(self, sample: Iterable[VisualTokens]) -> Self:
        """Return this carver with `epsilon` such that the sample keeps `target_ratio` on average.

        Raises:
            ConfigError: the sample is empty.
            NonFiniteError: a signal holds NaN or infinity.
        """
        images = [image for tokens in sample for image in self._statistics(tokens)]
        if not images:
            raise ConfigError("epsilon cannot be set from a sample without images")

        def excess(epsilon: float) -> float:
            shares = [_num_kept(image, epsilon) / len(image[0]) for image in images]
            return sum(shares) / len(shares) - self.target_ratio

        low, high = -1.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if excess(middle) < 0 else (low, middle)
        return replace(self, epsilon=min(low, high, key=lambda epsilon: abs(excess(epsilon))))

    def _statistics(self, tokens: VisualTokens) -> list[tuple[Tensor, Tensor]]:
        """Return per image what `_num_kept` takes."""
        for name in self.needs:
            _ops.require_finite(_ops.signal(tokens, name), name)
        found = []
        for part in _ops.split(tokens):
            _, *evidence = self._evidence(part)
            rows = zip(*(values_BN.cpu() for values_BN in evidence), strict=True)
            found += [(likeness_N, early_N[is_out_N]) for likeness_N, early_N, is_out_N in rows]
        return found

    def _evidence(self, tokens: VisualTokens) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return cosines of the keys, `_likeness`, places by early attention, and outliers."""
        cosines_BNN = _similarity.cosines(_ops.signal(tokens, "shallow_keys"))
        early_BN = _ops.inverse(_ops.best_first(_ops.signal(tokens, "shallow_attention")))
        outliers_BN = _outliers(_ops.signal(tokens, self.global_attention))
        return cosines_BNN, _likeness(cosines_BNN, self.max_similar), early_BN, outliers_BN

    def _carve(self, tokens: VisualTokens) -> list[CarvedTokens]:
        cosines_BNN, likeness_BN, early_BN, is_outlier_BN = self._evidence(tokens)
        num_local_B = (likeness_BN <= self.epsilon).sum(dim=1).clamp_min(1)
        is_kept_BN = is_outlier_BN | (early_BN < num_local_B[:, None])
        # Outliers first, then the other kept tokens, then those that are merged.
        behind_BN = torch.where(is_kept_BN, 1, 2) * early_BN.shape[1] + early_BN
        deep_BN = _ops.inverse(_ops.best_first(_ops.signal(tokens, self.global_attention)))
        order_BN = torch.where(is_outlier_BN, deep_BN, behind_BN).argsort(dim=1)
        means_BND, sizes_BN = _merge(tokens.features, cosines_BNN, is_kept_BN)
        sizes_BN = sizes_BN.gather(1, order_BN)
        return _ops.collect(means_BND, order_BN, order_BN, sizes_BN, is_kept_BN.sum(dim=1))


def _likeness(cosines_BNN: Tensor, max_similar: int) -> Tensor:
    """Return (B, N) the cosine that more than `max_similar` other tokens have or exceed."""
    num_tokens = cosines_BNN.shape[1]
    if max_similar > num_tokens - 2:
        return torch.full_like(cosines_BNN[:, 0], -torch.inf)
    others_BNN = cosines_BNN.clone()
    others_BNN.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    return others_BNN.kthvalue(num_tokens - max_similar, dim=2).values


def _outliers(attention_BN: Tensor) -> Tensor:
    levels = torch.tensor([0.25, 0.75], device=attention_BN.device)
    first_B1, third_B1 = attention_BN.quantile(levels, dim=1, keepdim=True)
    return attention_BN > third_B1 + 1.5 * (third_B1 - first_B1)


def _num_kept(image: tuple[Tensor, Tensor], epsilon: float) -> int:
    likeness_N, outlier_places_O = image
    num_local = max(1, int((likeness_N <= epsilon).sum()))
    return num_local + int((outlier_places_O >= num_local).sum())


def _merge(features_BND: Tensor, cosines_BNN: Tensor, is_kept_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Return weighted means and sizes; rows of tokens that are not kept mean nothing."""
    others_BNN = cosines_BNN.masked_fill(~is_kept_BN[:, None, :], -torch.inf)
    owners_BN = others_BNN.argmax(dim=2)
    best_BN = cosines_BNN.gather(2, owners_BN[:, :, None]).squeeze(2)
    places_BN = torch.arange(owners_BN.shape[1], device=owners_BN.device).expand_as(owners_BN)
    owners_BN = torch.where(is_kept_BN, places_BN, owners_BN)
    weights_BN = torch.where(is_kept_BN, 1.0, best_BN.clamp_min(0))
    sizes_BN = torch.zeros_like(weights_BN).scatter_add_(1, owners_BN, torch.ones_like(weights_BN))
    shares_BNN = torch.zeros_like(cosines_BNN).scatter_(1, owners_BN[:, None], weights_BN[:, None])
    shares_BNN /= shares_BNN.sum(dim=2, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    means_BND = product(shares_BNN, features_BND.float())
    # A token that nothing joined keeps every bit.
    means_BND = means_BND.to(features_BND.dtype)
    return torch.where((sizes_BN == 1)[:, :, None], features_BND, means_BND), sizes_BN
