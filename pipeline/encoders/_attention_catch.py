"""What an attention module with a rotary embedding is given, and what it gives.

Behind the embedding its queries and keys are made inside the module, where no hook sees them
(`AttentionProbe` serves those without). They are made again from what was caught here.
"""

from typing import Any

from torch import Tensor, nn


class AttentionCatch:
    """Catches one run of an attention module at a time.

    Args:
        attention: takes hidden states and `position_embeddings`.
    """

    def __init__(self, attention: nn.Module) -> None:
        self._inputs: tuple[Tensor, tuple[Tensor, Tensor]] | None = None
        self._output: Tensor | None = None
        attention.register_forward_pre_hook(self._before, with_kwargs=True)
        attention.register_forward_hook(self._behind)

    def take(self) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """Return hidden states, (cosines, sines) and output of the last run, and forget it."""
        inputs, output, self._inputs, self._output = self._inputs, self._output, None, None
        assert inputs is not None and output is not None
        return (*inputs, output)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self._inputs = hidden, kwargs["position_embeddings"]

    def _behind(self, _module: nn.Module, _args: object, output: Any) -> None:  # noqa: ANN401
        self._output = output[0] if isinstance(output, tuple) else output
