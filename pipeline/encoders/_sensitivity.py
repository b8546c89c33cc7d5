"""How much a projector of two linear maps amplifies small changes of each token.

The Jacobian of `W2 act(W1 f + b1) + b2` at a token f is `J = W2 diag(g) W1` with
`g = act'(W1 f + b1)`, so its squared Frobenius norm is `g^T M g` with `M = (W2^T W2) * (W1 W1^T)`
element by element: one product of a token with a matrix that is the same for all tokens, where a
measurement by finite differences would run the projector again for every direction.
"""

import copy

import torch
from torch import Tensor, nn

# Elements of the largest block of inner activations held at once: 64 MiB.
_MAX_INNER = 2**24


class ProjectorSensitivity:
    """The root mean square gain of a projector, `||J||_F / sqrt(C)`, for tokens of width C.

    It is what a change of length one in a random direction is amplified by, in the root mean
    square. Weights are copied to float32 as they are; results do not depend on the type that the
    projector runs in otherwise.

    Args:
        projector: has linear maps `linear_1`, `linear_2` and between them `act`, an activation
            that acts on each element alone.
    """

    def __init__(self, projector: nn.Module) -> None:
        weights = {name: tensor.float() for name, tensor in projector.named_parameters()}
        self._weight_HC = weights["linear_1.weight"]
        self._bias_H = weights.get("linear_1.bias")
        self._act = copy.deepcopy(projector.get_submodule("act")).float()
        second_DH = weights["linear_2.weight"]
        self._gram_HH = (second_DH.T @ second_DH) * (self._weight_HC @ self._weight_HC.T)

    def __call__(self, features_BND: Tensor) -> Tensor:
        """Return (B, N) float32 gains >= 0.

        Args:
            features_BND: what the projector is fed, any float dtype.
        """
        num_inner = len(self._weight_HC)
        step = max(1, _MAX_INNER // (features_BND.shape[1] * num_inner))
        parts = torch.split(features_BND, step)
        return torch.cat([self._gains(part_bND.float()) for part_bND in parts])

    def _gains(self, features_BND: Tensor) -> Tensor:
        inner_BNH = nn.functional.linear(features_BND, self._weight_HC, self._bias_H)
        slopes_BNH = _derivative(self._act, inner_BNH)
        squares_BN = ((slopes_BNH @ self._gram_HH) * slopes_BNH).sum(dim=-1)
        # Rounding may leave a sum of zero just below it.
        return (squares_BN.clamp_min(0) / features_BND.shape[-1]).sqrt()


def _derivative(act: nn.Module, inputs: Tensor) -> Tensor:
    """Return the derivative of an activation at each element of its input."""
    with torch.inference_mode(False), torch.enable_grad():
        # A tensor made in inference mode cannot be differentiated by; a copy made here can.
        copied = inputs.clone().requires_grad_()
        (slopes,) = torch.autograd.grad(act(copied).sum(), copied)
    return slopes
