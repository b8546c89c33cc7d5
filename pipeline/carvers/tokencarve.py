"""Keep tokens that add information and draw attention; merge the weaker ones into their like.

A token's information is its contribution to the singular directions of the information matrix;
tokens are ranked by it and by attention, and the two rankings are blended. The best 1.5 K tokens
stay; their lower half then loses K / 2 tokens, each averaged into the most similar token of the
upper half.

Source: Tan et al., TokenCarve: Information-Preserving Visual Token Compression in Multimodal Large
Language Models, arXiv 2503.10501; github.com/ShawnTan86/TokenCarve @ a57bd59, Apache-2.0.
Differs: the published code ranks and merges the hidden states after the second decoder layer, with
the attention of the last prompt token, and so needs the question. Here information and attention
are signals that need no question, while similarity and merging use the features that are stored;
`information="features", attention="llm_attention"` is the published selection, equal on stored
outputs of that code. Added: any N and K (1.5 K is cut to N), N > D, zero vectors (similarity 0),
ties towards the lower position, sizes, batches. Scores come from an eigen-decomposition of the
smaller Gram matrix in float64, not from a full SVD (`benchmarks/tokencarve_svd.md`).
Where singular values repeat (an orthonormal information matrix, say) the published score depends on
which basis the solver picks for them, and so does this one; constant and duplicate tokens do not
cause that. Singular values below sqrt(N * 2.2e-16) of the largest count as 0: they are below the
precision of the float32 SVD of the published code as well.
Needs: by default the class token's attention and the attention output of the vision tower: what
the paper names, and the cheapest pair that an encoder can give. `llm_hidden` and `llm_attention`
are nearer to the published code and cost two decoder layers. No signal for a part of weight 0.
Cost: O(N^2 D + N^3) per image in float64, on a CPU one core per image. With `solver="subspace"`
O(N^2 (D + r)), in batched products that suit a GPU; the kept tokens are then nearly, not exactly,
those of the published code (`benchmarks/information_solvers.md`).
"""

from dataclasses import dataclass
from typing import ClassVar

from pipeline.carvers import _ops
from pipeline.carvers._tokencarve import RankedByInformation, prune_and_merge
from pipeline.types import CarvedTokens, VisualTokens


@dataclass(frozen=True, kw_only=True)
class TokenCarve(RankedByInformation):
    """Rank by information and attention, then prune and merge to exactly K tokens."""

    nested: ClassVar[bool] = False  # which tokens are merged depends on the budget

    def _carve(self, tokens: VisualTokens) -> list[CarvedTokens]:
        order_BN = self.order(tokens)
        kept = prune_and_merge(tokens.features, order_BN, self.budget(order_BN.shape[1]))
        return _ops.collect(kept.features, kept.rows, kept.positions, kept.sizes)
