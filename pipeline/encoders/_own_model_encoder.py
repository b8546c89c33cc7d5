"""What families share whose tower has code of its own in transformers: it is run as it is."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import transformers
from torch import nn

from pipeline.encoders._checkpoint_encoder import read_config
from pipeline.encoders._own_modules import build_model, fill_parts, part_sources
from pipeline.encoders._view_encoder import LoadedViews, ViewEncoder
from pipeline.encoders._weights import Reads
from pipeline.errors import ConfigError


@dataclass(kw_only=True)
class OwnModelEncoder(ViewEncoder):
    """An encoder that runs the family's `get_image_features` on the parts that it needs."""

    models: ClassVar[Mapping[str, str]]
    """Name of the transformers class by `model_type`."""
    language: ClassVar[str] = "language_model"
    """What of the model is left out."""
    prefixes: ClassVar[Mapping[str, Sequence[str]]]
    """What may stand before the keys of a part, by its name."""
    settings: ClassVar[tuple[str, ...]] = ()
    """What of config.json decides the numbers, beside `vision_config`."""
    signals: ClassVar[frozenset[str]] = frozenset(
        {"received_attention", "keys", "mean_keys", "attention_output"}
    )

    @abstractmethod
    def _run(self, model: Any, signals: frozenset[str]) -> LoadedViews:  # noqa: ANN401
        """Return how a loaded model is run."""

    @property
    def yields(self) -> frozenset[str]:
        """Signals of the attention of the tower's last layer."""
        return self.signals

    @property
    def width(self) -> int:
        """Width of the language model."""
        return int(self._config.get_text_config().hidden_size)

    @cached_property
    def _config(self) -> Any:  # noqa: ANN401
        found = self._checkpoint.config
        if found.get("model_type") not in self.models:
            raise ConfigError(
                f"model {self.model!r} is a {found.get('model_type')!r}; this encoder is for "
                f"{', '.join(self.models)}"
            )
        return read_config(found, model=self.model)

    def _check_model(self) -> None:
        _ = self._config, self._processor

    def _describe_options(self, signals: frozenset[str]) -> Mapping[str, Any]:
        return {"stage": "projected", "resize": self.resize}

    def _used_settings(self) -> Mapping[str, Any]:
        used = {"vision_config", *self.settings}
        return {k: v for k, v in self._checkpoint.config.items() if k in used}

    def _build(self) -> nn.Module:
        kind = getattr(transformers, self.models[self._config.model_type])
        return build_model(lambda: kind(self._config), without=[self.language])

    def _reads(self, signals: frozenset[str]) -> Reads:
        sources = part_sources(self._build(), self._checkpoint, self.prefixes)
        return Reads(
            settings=self._used_settings(),
            keys=frozenset(source.key for source in sources.values()),
        )

    def _load_model(
        self, *, device: torch.device, dtype: torch.dtype, signals: frozenset[str]
    ) -> LoadedViews:
        model = self._build()
        fill_parts(model, self._checkpoint, self.prefixes, device=device, dtype=dtype)
        return self._run(model, signals)
