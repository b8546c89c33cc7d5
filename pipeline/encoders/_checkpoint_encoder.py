"""What all encoders of published checkpoints share: which model, what of it, and its weights."""

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
import transformers

from pipeline.encoders._base import Encoder
from pipeline.encoders._weights import Checkpoint, Reads, find_place
from pipeline.errors import ConfigError, MissingSignalError, PipelineError

Loaded = TypeVar("Loaded")


class NotLoadedError(PipelineError, RuntimeError):
    """An encoder is asked to encode before its weights are loaded."""


@dataclass(kw_only=True)
class CheckpointEncoder(Encoder, Generic[Loaded]):
    """An encoder whose weights are a part of a checkpoint.

    Attributes:
        model: local directory of a checkpoint, or id of a hub repository.
        revision: branch, tag or commit of a hub repository; None is its default branch. Give a
            commit to be sure that every process of a long run reads the same weights.
    """

    model: str = ""
    revision: str | None = None

    def __post_init__(self) -> None:
        """Start without weights."""
        self._place: str | None = None
        self._loaded: Loaded | None = None
        self._device = torch.device("cpu")
        self._dtype = torch.float32

    def __getstate__(self) -> dict[str, Any]:
        """Return the options, and which model they mean here: a directory, or a hub's commit."""
        if self._loaded is not None:
            raise TypeError("a loaded encoder cannot be pickled; pickle it before load")
        state = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        state["_place"] = self._place
        if "_checkpoint" in self.__dict__:
            state["revision"] = self._checkpoint.revision
            state["_place"] = self._checkpoint.place
        elif self.model and self._place is None:
            state["_place"] = find_place(self.model)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the options; files are opened anew where this process runs."""
        CheckpointEncoder.__post_init__(self)
        self.__dict__.update(state)

    @abstractmethod
    def _check_model(self) -> None:
        """Raise what is wrong with the config or the processor, before weights are read."""

    @abstractmethod
    def _load_model(
        self, *, device: torch.device, dtype: torch.dtype, signals: frozenset[str]
    ) -> Loaded:
        """Read the weights that the features and these signals need."""

    @abstractmethod
    def _describe_options(self, signals: frozenset[str]) -> Mapping[str, Any]:
        """Return the options beside model and revision that change the numbers."""

    @abstractmethod
    def _reads(self, signals: frozenset[str]) -> Reads:
        """Return what of the checkpoint decides the features and these signals."""

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(self.model, self.revision, place=self._place)

    @property
    def _weights(self) -> Loaded:
        """What `load` has loaded.

        Raises:
            NotLoadedError: before `load`.
        """
        if self._loaded is None:
            raise NotLoadedError("the encoder has no weights yet; call load first")
        return self._loaded

    def describe(self, signals: frozenset[str] = frozenset()) -> Mapping[str, Any]:
        """Return model, revision, options and a digest of configs and weights; see `Encoder`.

        A local directory is described by the kind of model and the digest, not by its path, so
        the same files in another place are the same encoder.
        """
        self._check_model()
        signals &= self.yields
        kind = str(self._checkpoint.config["model_type"])
        return {
            "model": f"local:{kind}" if self._checkpoint.is_local else self.model,
            "revision": self._checkpoint.revision,
            **self._describe_options(signals),
            "digest": self._checkpoint.digest(lambda: self._reads(signals)),
        }

    def load(
        self,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        signals: frozenset[str] = frozenset(),
    ) -> None:
        """Load the weights this stage and these signals need; see `Encoder`."""
        missing = sorted(signals - self.yields)
        if missing:
            raise MissingSignalError(
                f"model {self.model!r} cannot give signal {missing[0]!r} with these options; it "
                f"gives {', '.join(sorted(self.yields)) or 'none'}"
            )
        self._check_model()
        self._loaded = None  # an earlier load must not cost memory beside this one
        self._device, self._dtype = torch.device(device), dtype
        self._loaded = self._load_model(device=self._device, dtype=dtype, signals=signals)


def read_config(settings: Mapping[str, Any], *, model: str) -> Any:  # noqa: ANN401
    """Return the transformers config of a `config.json`'s content.

    Raises:
        ConfigError: it names no known kind of model, or does not fit that kind.
    """
    kind = settings.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise ConfigError(f"config.json of model {model!r} has unknown model_type {kind!r}")
    try:
        return transformers.CONFIG_MAPPING[kind].from_dict(dict(settings))
    except (TypeError, ValueError) as err:
        reason = " ".join(str(err).split())
        raise ConfigError(
            f"config.json of model {model!r} does not fit {kind!r}: {reason}"
        ) from err
