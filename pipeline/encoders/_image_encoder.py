"""What encoders of single images share: pixels in, batches of one shape, tokens and signals out."""

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor

from pipeline.encoders._base import Encoder, Pixels
from pipeline.encoders._preprocess import Preprocessor, read_preprocessor
from pipeline.encoders._resize import Backend
from pipeline.encoders._signals import SHALLOW_SIGNALS
from pipeline.encoders._tower_plan import TowerPlan
from pipeline.encoders._weights import Checkpoint, Reads, find_place
from pipeline.errors import ConfigError, EncodeError, MissingSignalError, PipelineError
from pipeline.types import VisualTokens


class NotLoadedError(PipelineError, RuntimeError):
    """An encoder is asked to encode before its weights are loaded."""


class LoadedModel(Protocol):
    """The weights of an encoder and how to run them."""

    def __call__(self, pixels_BCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (B, N, D) features and the signals asked for."""


@dataclass(kw_only=True)
class ImageEncoder(Encoder):
    """An encoder with one vision tower that takes one image at a time.

    Attributes:
        model: local directory of a checkpoint, or id of a hub repository.
        revision: branch, tag or commit of a hub repository; None is its default branch. Give a
            commit to be sure that every process of a long run reads the same weights.
        resize: backend of transformers' image processors whose pixels the model is given.
            `torchvision` is what transformers takes wherever that package is installed; it is
            not needed here. `pillow` is what it takes elsewhere, and what its `*Pil` classes do.
        shallow_layer: index from 0 of the tower layer that `shallow_attention` and `shallow_keys`
            are taken from, at most that of the selected features; None for three eighths of the
            tower, the tenth of 24 layers, and then a tower cut shorter than that gives neither.
    """

    model: str = ""
    revision: str | None = None
    resize: Backend = "torchvision"
    shallow_layer: int | None = None

    def __post_init__(self) -> None:
        """Start without weights."""
        self._place: str | None = None
        self._loaded: LoadedModel | None = None
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
        ImageEncoder.__post_init__(self)
        self.__dict__.update(state)

    @abstractmethod
    def _read_plan(self) -> TowerPlan:
        """Read from the config alone what of the tower is wanted, and check it."""

    @abstractmethod
    def _load_model(
        self, *, device: torch.device, dtype: torch.dtype, signals: frozenset[str]
    ) -> LoadedModel:
        """Read the weights that the features and these signals need."""

    @abstractmethod
    def _describe_options(self, signals: frozenset[str]) -> Mapping[str, Any]:
        """Return the options beside model and revision that change the numbers."""

    @abstractmethod
    def _reads(self, signals: frozenset[str]) -> Reads:
        """Return what of the checkpoint decides the features and these signals."""

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the grid of the tokens of an image of this size."""
        return self._plan.grid(height, width)

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(self.model, self.revision, place=self._place)

    @cached_property
    def _plan(self) -> TowerPlan:
        return self._read_plan()

    @cached_property
    def _preprocessor(self) -> Preprocessor:
        return read_preprocessor(self._checkpoint.processor, model=self.model, backend=self.resize)

    def _check_model(self) -> None:
        """Raise what is wrong with the config or the processor, before weights are read."""
        self._plan.check_size(self._preprocessor.output_size, model=self.model)

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
            "resize": self.resize,
            **self._describe_options(signals),
            **({"shallow_layer": self._plan.shallow_block} if signals & SHALLOW_SIGNALS else {}),
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

    def preprocess(self, image: Pixels) -> Pixels:
        """Resize and crop one image; see `Encoder`.

        Raises:
            EncodeError: the image is too elongated, or smaller than a patch and not enlarged.
        """
        prepared = self._preprocessor.prepare(image)
        if 0 in self._plan.grid(*prepared.shape[:2]):
            raise EncodeError(
                f"image of {prepared.shape[0]} x {prepared.shape[1]} pixels is smaller than one "
                f"patch of {self._plan.patch_size}",
                key="",
                reason="too_small",
            )
        return prepared

    def encode_pixels(self, prepared: Sequence[Pixels]) -> list[VisualTokens]:
        """Encode preprocessed images; see `Encoder`.

        Raises:
            NotLoadedError: before `load`.
        """
        if self._loaded is None:
            raise NotLoadedError("the encoder has no weights yet; call load first")
        groups: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(prepared):
            groups.setdefault(self._plan.trim(*image.shape[:2]), []).append(index)
        return [
            self._encode_group(self._loaded, [prepared[i] for i in indices], size, tuple(indices))
            for size, indices in groups.items()
        ]

    def _encode_group(
        self,
        loaded: LoadedModel,
        images: Sequence[Pixels],
        size: tuple[int, int],
        indices: tuple[int, ...],
    ) -> VisualTokens:
        height, width = size
        on_gpu = self._device.type == "cuda"
        pixels_BHWC = torch.empty(
            (len(images), height, width, 3), dtype=torch.uint8, pin_memory=on_gpu
        )
        rows = pixels_BHWC.numpy()
        for place, image in enumerate(images):
            rows[place] = image[:height, :width]
        with torch.inference_mode():
            moved_BHWC = pixels_BHWC.to(self._device, non_blocking=True)
            pixels_BCHW = self._preprocessor.normalise(moved_BHWC).to(self._dtype)
            features_BND, signals = loaded(pixels_BCHW)
        return VisualTokens(
            features=features_BND,
            grid=self._grid(height, width),
            signals=signals,
            image_indices=indices,
        )


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
