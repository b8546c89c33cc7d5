"""Keep what another carver keeps, and merge the rest into anchors of high density.

A share of the budget goes to the tokens that a selecting carver picks. Among the others, tokens
that resemble many but no token of other density become anchors, and the rest is averaged into
the anchor most like it.

Source: Cho et al., Improving Visual Token Reduction via Rectifying Distortions for Efficient
Multimodal LLM Inference (RESTORE), arXiv 2606.01711; github.com/cvlab-yonsei/RESTORE @ 9b27e68,
GPL-3.0, of which only a description was used.
Differs: the original also adds a bias of sizes and distances to the attention of the language
model, which a cache cannot; it stores the sizes and positions that this needs. `rule="code"`
compares an anchor with tokens of lower density among those left over, as the released code does;
`rule="paper"` with those of higher density among all tokens, as the paper says; they agree on few
anchors. Added: ranks (kept tokens and anchors in turns, by their shares), zero tokens (similar to
nothing), any selecting carver; calibrate one that depends on the corpus by itself first. Without
that bias serve positions without gaps (`docs/methods.md`).
Needs: what the selecting carver needs.
Cost: the selecting carver, and O(N^2 D).
"""

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline import carvers
from pipeline.carvers import _anchors, _merge, _ops, _similarity
from pipeline.carvers._base import BUDGET_OPTIONS, BudgetCarver, SelectionCarver
from pipeline.types import CarvedTokens, VisualTokens


@dataclass(frozen=True, kw_only=True)
class RestoreMerge(BudgetCarver):
    """Select a share of K tokens, and average all others into the anchors that fill up K.

    A merged token stands at the lower median of its members' positions.

    Args:
        selector: name of a carver that keeps tokens unchanged.
        selector_options: its options, without a budget.
        gamma: share of the budget that it keeps, rounded down; at least one token is an anchor.
            The paper has 0.5; more suits images of text, whose small features averaging blurs.
        rule: which neighbours an anchor must not resemble.
    """

    nested: ClassVar[bool] = False  # anchors are chosen among what the selector leaves

    conserves: ClassVar[bool] = True

    selector: str = "divprune"
    selector_options: Mapping[str, Any] = field(default_factory=dict)
    gamma: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.5
    rule: Literal["code", "paper"] = "code"

    def __post_init__(self) -> None:
        """Check the budget and the selecting carver once."""
        super().__post_init__()
        if budgets := sorted(BUDGET_OPTIONS & self.selector_options.keys()):
            raise ValueError(f"selector_options hold {budgets}: the budget is this carver's own")
        if not isinstance(self._selector, SelectionCarver):
            raise ValueError(  # noqa: TRY004  (a setting, not a type, is wrong)
                f"selector={self.selector!r} does not keep tokens unchanged and by rank; take one "
                "that does, such as divprune, scope or fastervlm"
            )

    @functools.cached_property
    def _selector(self) -> carvers.Carver:
        return carvers.build(self.selector, self.selector_options)

    @property
    def needs(self) -> frozenset[str]:
        """The signals of the selecting carver."""
        return self._selector.needs

    def describe(self) -> Mapping[str, Any]:
        """The options; of the selecting carver all that decide."""
        options = {k: v for k, v in self._selector.describe().items() if k not in BUDGET_OPTIONS}
        return {**asdict(self), "selector_options": options}

    def _carve(self, tokens: VisualTokens) -> list[CarvedTokens]:
        num_tokens = tokens.features.shape[1]
        num_kept = self.budget(num_tokens)
        if num_kept == num_tokens:
            return _ops.keep(tokens.features, self._select(tokens, num_tokens))
        kept_BS = self._select(tokens, int(num_kept * self.gamma))
        rest_BM = _anchors.others(kept_BS, num_tokens)
        rows_BMD = _ops.take_rows(tokens.features, rest_BM)
        unit_BMD = _similarity.unit(rows_BMD)
        similarities_BMM = _similarity.gram(unit_BMD)
        densities_BM = similarities_BMM.sum(dim=2)
        if self.rule == "paper":
            total_B1D = _similarity.unit(tokens.features).sum(dim=1, keepdim=True)
            densities_BM = (unit_BMD * total_B1D).sum(dim=2)
        best_BM = self._anchors(similarities_BMM, densities_BM)
        # Equal similarities join the anchor of the lower position.
        best_BG, places_BG = best_BM[:, : num_kept - kept_BS.shape[1]].sort(dim=1)
        owners_BM = _anchors.joined(_ops.take_rows(similarities_BMM, best_BG).mT, best_BG)
        means_BGD, sizes_BG, medians_BG = _merge.group_means(rows_BMD, owners_BM, best_BG.shape[1])

        merged_BKD = torch.cat([_ops.take_rows(tokens.features, kept_BS), means_BGD], dim=1)
        positions_BK = torch.cat([kept_BS, rest_BM.gather(1, medians_BG)], dim=1)
        sizes_BK = torch.cat([torch.ones_like(kept_BS, dtype=torch.float32), sizes_BG], dim=1)
        best_first_BG = _ops.inverse(places_BG) + kept_BS.shape[1]
        rows_BK = torch.arange(num_kept, device=rest_BM.device).expand_as(positions_BK)
        rows_BK = torch.cat([rows_BK[:, : kept_BS.shape[1]], best_first_BG], dim=1)
        order_BK = _anchors.in_turns(rows_BK, (rows_BK >= kept_BS.shape[1]).long())
        return _ops.collect(
            merged_BKD, order_BK, positions_BK.gather(1, order_BK), sizes_BK.gather(1, order_BK)
        )

    def _select(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        if num_kept == 0:
            return torch.empty(
                (len(tokens.features), 0), dtype=torch.int64, device=tokens.features.device
            )
        assert isinstance(self._selector, SelectionCarver)
        return self._selector.select(tokens, num_kept)

    def _anchors(self, similarities_BMM: Tensor, densities_BM: Tensor) -> Tensor:
        """Return (B, M) rows, the best anchor first."""
        mine_BM1, theirs_B1M = densities_BM[:, :, None], densities_BM[:, None, :]
        compared_BMM = theirs_B1M < mine_BM1 if self.rule == "code" else theirs_B1M > mine_BM1
        likest_BM = similarities_BMM.masked_fill(~compared_BMM, -torch.inf).amax(dim=2)
        # Nobody to compare with counts as nobody alike.
        likest_BM = torch.where(compared_BMM.any(dim=2), likest_BM, 0)
        return _ops.best_first(densities_BM * (1 - likest_BM))
