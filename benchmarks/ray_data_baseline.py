"""The work of this pipeline done the usual way with Ray Data: rows through the object store.

    read_webdataset -> map: decode, preprocess -> map_batches on an actor pool -> write_parquet

Three forms, each with more of this pipeline in it:

- *usual*: all as its users write it. Pillow and the model's own transformers image processor in
  `map`, so that its float32 pixel values travel; the processor has the backend whose pixels the
  pipeline makes in that run (option `resize` of the encoder). transformers' own model in
  `map_batches`, asked for its attention weights, which its eager attention alone can return.
- *encoder*: the same with this project's encoder, which runs no layer that is not needed and keeps
  fused attention.
- *lean*: decoder and preprocessing of this pipeline too, uint8 pixels, so that only the way the
  data travels differs.

Carver, codec, checksums and stored columns are the pipeline's own in all.
"""

import hashlib
import io
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.cache import row
from pipeline.decode import decode_image
from pipeline.job import Job
from pipeline.types import CarvedTokens, VisualTokens

Form = Literal["usual", "encoder", "lean"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a user would tune.

    Attributes:
        actors: size of the actor pool.
        actor_cpus: CPUs that Ray counts for an actor; its torch has one thread in any case.
        task_cpus: CPUs that Ray counts for a task that reads, decodes and preprocesses.
        batch_size: images per encoder call.
        actor_gpus: GPUs of an actor.
        form: how much of it is this pipeline's own.
    """

    actors: int
    actor_cpus: float
    task_cpus: float
    batch_size: int
    actor_gpus: float = 0.0
    form: Form = "usual"

    def __str__(self) -> str:
        """Return the setting in words."""
        return (
            f"{self.actors} actor(s) of {self.actor_cpus:g} CPU, tasks of {self.task_cpus:g} CPU, "
            f"batches of {self.batch_size}"
        )


class _Preprocess:
    """A row of the shard -> a row with pixels ready for the encoder."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        encoded = sample["jpg"]
        pixels, (width, height) = self.prepare(encoded, sample["__key__"])
        return {
            "key": sample["__key__"],
            "content_hash": hashlib.sha256(encoded).digest()[:16],
            "width": width,
            "height": height,
            "txt": sample["txt"].decode("utf-8"),
            "pixels": pixels,
            "prepared_at": time.time(),
        }

    def prepare(self, encoded: bytes, key: str) -> tuple[NDArray[Any], tuple[int, int]]:
        """Return (H, W, 3) uint8 pixels, and width and height of the image."""
        image = decode_image(encoded, key=key, options=self.job.decode)
        return self.job.encoder.preprocess(image), (image.shape[1], image.shape[0])


class _PreprocessAsUsual(_Preprocess):
    """The same with Pillow and the model's own image processor."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._processor: Any = None

    def prepare(self, encoded: bytes, key: str) -> tuple[NDArray[Any], tuple[int, int]]:
        """Return (3, H, W) float32 pixel values, and width and height of the image."""
        if self._processor is None:
            self._processor = own_processor(self.job)
        with Image.open(io.BytesIO(encoded)) as image:
            values = self._processor(images=image.convert("RGB"), return_tensors="np")
            return values["pixel_values"][0], image.size


def own_processor(job: Job) -> Any:  # noqa: ANN401
    """Return transformers' image processor of the job's model, of the job's backend.

    Raises:
        RuntimeError: that backend is not installed.
    """
    from transformers import AutoImageProcessor

    resize = job.settings["encoder"]["resize"]
    backend = {"pillow": "pil"}.get(resize, resize)
    processor = AutoImageProcessor.from_pretrained(job.encoder.model, backend=backend)
    if processor.backend != backend:  # transformers warns and takes the other
        raise RuntimeError(
            f"the image processor with backend {backend!r} is not there; install the torchvision "
            "of the same build as torch, or give the encoder the option 'resize: pillow'"
        )
    return processor


class _Carve:
    """A batch of pixels -> a table of stored tokens; holds the encoder, one per actor."""

    def __init__(self, job: Job, device: str) -> None:
        torch.set_num_threads(1)
        self.job = job
        self._load(device, getattr(torch, job.config.runner.dtype))

    def _load(self, device: str, dtype: torch.dtype) -> None:
        self.job.encoder.load(device=device, dtype=dtype, signals=self.job.carver.needs)

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        group = self._encode(batch["pixels"])
        rows = [self._pack(carved, group.grid) for carved in self.job.carver.carve(group)]
        columns: dict[str, Any] = {
            name: pa.array(list(batch[name]))
            for name in ("key", "content_hash", "txt", "prepared_at")
        }
        columns |= {name: pa.array(batch[name], pa.int32()) for name in ("width", "height")}
        columns |= {name: pa.array([r[name] for r in rows]) for name in rows[0]}
        columns["carved_at"] = pa.array([time.time()] * len(rows))
        return pa.table(columns)

    def _encode(self, pixels: NDArray[Any]) -> VisualTokens:
        encoder = self.job.encoder
        if pixels.dtype == np.uint8 or not hasattr(encoder, "_loaded"):
            (group,) = encoder.encode_pixels(list(pixels))
            return group
        # Normalised already: straight into the tower, where `encode_pixels` would put them.
        with torch.inference_mode():
            values_BCHW = torch.from_numpy(pixels).to(encoder._device, encoder._dtype)
            features_BND, signals = encoder._loaded(values_BCHW)
        grid = encoder._grid(*pixels.shape[2:])
        return VisualTokens(features=features_BND, grid=grid, signals=signals)

    def _pack(self, carved: CarvedTokens, grid: tuple[int, int]) -> dict[str, Any]:
        order = np.argsort(carved.ranks.cpu().numpy(), kind="stable")
        by_rank = torch.from_numpy(order).to(carved.features.device)
        packed = self.job.codec.pack(carved.features[by_rank])
        aux = row.pack_aux(
            packed,
            positions=carved.positions.cpu().numpy()[order].astype(np.uint32),
            sizes=carved.sizes.cpu().numpy()[order].astype(np.float32),
        )
        return {
            "num_tokens": packed.num_tokens,
            "grid_h": grid[0],
            "grid_w": grid[1],
            "tokens": packed.tokens,
            "aux": aux,
            "crc32c": row.row_checksum(packed.tokens, aux),
        }


class _CarveAsUsual(_Carve):
    """The same with transformers' own LLaVA, as its users call it."""

    def _load(self, device: str, dtype: torch.dtype) -> None:
        from transformers import LlavaForConditionalGeneration

        # The only attention of transformers that returns its weights.
        model = LlavaForConditionalGeneration.from_pretrained(
            self.job.encoder.model, dtype=dtype, attn_implementation="eager"
        )
        self._model: Any = model.model.eval().to(device)
        self._layer = model.config.vision_feature_layer
        layer = self._model.vision_tower.encoder.layers[self._layer]
        layer.self_attn.out_proj.register_forward_hook(self._catch)
        self._output: list[Tensor] = []

    def _catch(self, _module: object, _inputs: object, output: Tensor) -> None:
        self._output = [output]

    def _encode(self, pixels: NDArray[Any]) -> VisualTokens:
        values_BCHW = torch.from_numpy(pixels).to(self._model.device, self._model.dtype)
        with torch.inference_mode():
            seen = self._model.vision_tower(
                values_BCHW, output_attentions=True, output_hidden_states=True
            )
            features_BND = seen.hidden_states[self._layer][:, 1:]
            attention_BHTT = seen.attentions[self._layer].float()
            signals = {
                "cls_attention": attention_BHTT[:, :, 0, 1:].mean(dim=1),
                "attention_output": self._output.pop()[:, 1:].float(),
            }
            if self.job.encoder.stage == "projected":
                features_BND = self._model.multi_modal_projector(features_BND)
        grid = self.job.encoder._grid(*pixels.shape[2:])
        return VisualTokens(features=features_BND, grid=grid, signals=signals)


def run(job: Job, shards: Sequence[Path], output: Path, setting: Setting) -> None:
    """Carve the shards into Parquet files in `output`, which is emptied first.

    Runs in the Ray session of the caller.
    """
    if setting.form != "lean":
        own_processor(job)  # to fail here rather than in every task
    shutil.rmtree(output, ignore_errors=True)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    dataset = ray.data.read_webdataset(
        [str(path) for path in shards], decoder=None, num_cpus=setting.task_cpus
    )
    preprocess = _Preprocess(job) if setting.form == "lean" else _PreprocessAsUsual(job)
    dataset = dataset.map(preprocess, num_cpus=setting.task_cpus)
    dataset = dataset.map_batches(
        _CarveAsUsual if setting.form == "usual" else _Carve,
        fn_constructor_args=(job, "cuda" if setting.actor_gpus else "cpu"),
        batch_size=setting.batch_size,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=setting.actors),
        num_cpus=setting.actor_cpus,
        num_gpus=setting.actor_gpus or None,
    )
    # As the cache's parts: tokens neither compressed nor in a dictionary.
    dataset.write_parquet(str(output), compression="none", use_dictionary=False)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """When each image of a run had come how far: sorted Unix times, one per image."""

    prepared: NDArray[np.float64]
    carved: NDArray[np.float64]
    written: NDArray[np.float64]

    def work_done(self, moment: float, shares: tuple[float, float, float]) -> float:
        """Return the work done until a moment, in images.

        Args:
            moment: Unix time.
            shares: of the work of an image, up to each of the three times.
        """
        times = (self.prepared, self.carved, self.written)
        counts = [np.searchsorted(t, moment, side="right") for t in times]
        return float(np.dot(counts, shares))


def progress(folder: Path) -> Progress:
    """Return the progress of the run that wrote a folder."""
    prepared, carved, written = [], [], []
    for path in folder.glob("*.parquet"):
        table = pq.read_table(path, columns=["prepared_at", "carved_at"])
        prepared.append(table["prepared_at"].to_numpy())
        carved.append(table["carved_at"].to_numpy())
        written.append(np.full(len(table), path.stat().st_mtime_ns / 1e9))
    parts = (np.sort(np.concatenate(times)) for times in (prepared, carved, written))
    return Progress(**dict(zip(("prepared", "carved", "written"), parts, strict=True)))


def read_tokens(folder: Path) -> dict[str, tuple[bytes, bytes]]:
    """Return the tokens and aux bytes of every image, by key."""
    table = pq.read_table(folder, columns=["key", "tokens", "aux"])
    columns = [table.column(name).to_pylist() for name in table.column_names]
    return {key: (tokens, aux) for key, tokens, aux in zip(*columns, strict=True)}
