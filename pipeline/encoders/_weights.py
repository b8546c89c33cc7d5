"""A checkpoint: its config, its image processor's settings, and the weights that are wanted of it.

A checkpoint is a local directory or a repository of the Hugging Face hub. Of the latter only the
files that hold a wanted tensor are fetched. Weights come from safetensors files only: the older
`.bin` files are pickles, and a pickle is a program.
"""

import hashlib
import json
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.encoders._safetensors import SafetensorsFile
from pipeline.errors import ConfigError

HUB = "hub"  # a place that is no absolute path
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_HUB_ID = re.compile(r"[\w\-.]+(/[\w\-.]+)?")


class Source(NamedTuple):
    """Where a parameter comes from: a stored tensor, or one of several equal slices of it."""

    key: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True, kw_only=True)
class Reads:
    """What of a checkpoint decides the numbers.

    Attributes:
        settings: the part of its config that is used.
        keys: names of stored tensors.
        rows: rows of stored matrices of which no others are used, by name.
    """

    settings: Mapping[str, Any]
    keys: frozenset[str]
    rows: Mapping[str, Sequence[int]] = field(default_factory=dict)


class Checkpoint:
    """One model as it is published.

    Args:
        model: local directory, or id of a hub repository.
        revision: branch, tag or commit of a hub repository; None is its default branch.
        place: result of `find_place` where the model was first looked for; None looks here.

    Raises:
        ConfigError: there is no such model, or it cannot be reached.
    """

    def __init__(
        self, model: str, revision: str | None = None, *, place: str | None = None
    ) -> None:
        if not model:
            raise ConfigError("option 'model' is empty; give a local directory or a hub id")
        self.model = model
        self.place = place or find_place(model)
        self.is_local = self.place != HUB
        self.revision = revision
        if self.is_local and not Path(self.place).is_dir():
            raise ConfigError(
                f"model directory {self.place!r} is not there on host {socket.gethostname()}: "
                "use a path that every node sees"
            )
        if self.is_local and revision is not None:
            raise ConfigError(
                f"option 'revision' {revision!r} has no meaning for the local directory {model!r}; "
                "leave it out"
            )
        if not self.is_local:
            if not _HUB_ID.fullmatch(model):
                raise ConfigError(f"no model directory {model!r}; check the path")
            # Every later file is asked for by commit, so that all are of one state.
            self.revision = self._require("config.json").parent.name

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """Content of `config.json`."""
        return _read_json(self._require("config.json"))

    @cached_property
    def processor(self) -> Mapping[str, Any]:
        """Settings of the image processor, found as transformers finds them."""
        nested = self.find("processor_config.json")
        if nested is not None:
            settings = _read_json(nested).get("image_processor")
            if isinstance(settings, dict):
                return settings
        return _read_json(self._require("preprocessor_config.json"))

    @cached_property
    def _files(self) -> Mapping[str, str]:
        """File name by tensor name."""
        index = self.find(_INDEX)
        if index is not None:
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ConfigError(f"{index} has no 'weight_map'; download it again")
            for name in weight_map.values():
                if not isinstance(name, str) or Path(name).name != name:
                    raise ConfigError(f"{index} points outside its directory: {name!r}")
                if not name.endswith(".safetensors"):
                    raise ConfigError(f"{index} names {name!r}, which is no safetensors file")
            return weight_map
        if self.find(_SINGLE) is None:
            raise ConfigError(self._no_safetensors())
        return dict.fromkeys(self._open(_SINGLE).entries, _SINGLE)

    @cached_property
    def _opened(self) -> dict[str, SafetensorsFile]:
        return {}

    def keys(self) -> frozenset[str]:
        """Return the names of all stored tensors."""
        return frozenset(self._files)

    def read(self, source: Source) -> Tensor:
        """Read one tensor to the CPU, in the type it is stored in."""
        return self._holder(source.key).read(source.key, part=source.part, parts=source.parts)

    def read_rows(self, key: str, rows: Sequence[int]) -> Tensor:
        """Read some rows of a stored matrix."""
        return self._holder(key).read_rows(key, rows)

    def digest(self, reads: Callable[[], Reads]) -> str:
        """Return a hash that changes with all that is read of this checkpoint.

        Of a hub repository the commit stands for all of it: it names the content already, and
        looking at weights would fetch them. Of local files, the settings and a sample of every
        tensor are hashed. A sample of each, not blocks of a file, so that training any one part is
        seen: a projector is 0.3 % of a 7B checkpoint. Where the directory lies, what it is called
        and how the tensors are spread over files does not enter.

        Args:
            reads: returns what is read; called for a local directory only.
        """
        digest = hashlib.sha256()
        if not self.is_local:
            digest.update(str(self.revision).encode())
            return digest.hexdigest()
        wanted = reads()
        for part in (wanted.settings, self.processor, wanted.rows):
            digest.update(json.dumps(part, sort_keys=True).encode() + b"\0")
        for key in sorted(wanted.keys):
            digest.update(f"{key}\0".encode() + self._holder(key).sample(key))
        for key, rows in sorted(wanted.rows.items()):
            digest.update(self.read_rows(key, rows).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def find(self, name: str) -> Path | None:
        """Return the path of a file of this checkpoint, fetching it; None if it has no such file.

        Raises:
            ConfigError: the hub cannot be asked.
        """
        if self.is_local:
            path = Path(self.place) / name
            return path if path.is_file() else None
        return _fetch(self.model, name, self.revision)

    def _require(self, name: str) -> Path:
        path = self.find(name)
        if path is None:
            raise ConfigError(
                f"model {self.model!r} has no {name}; give a directory written by save_pretrained "
                "of both model and processor"
            )
        return path

    def _open(self, name: str) -> SafetensorsFile:
        if name not in self._opened:
            self._opened[name] = SafetensorsFile(self._require(name))
        return self._opened[name]

    def _holder(self, key: str) -> SafetensorsFile:
        file = self._open(self._files[key])
        if key not in file.entries:
            raise ConfigError(f"{file.path} lacks tensor {key!r} that {_INDEX} places there")
        return file

    def _no_safetensors(self) -> str:
        bins = ("pytorch_model.bin", "pytorch_model.bin.index.json")
        if any(self.find(name) is not None for name in bins):
            return (
                f"model {self.model!r} has its weights only as pytorch_model.bin, a pickle that "
                "can run code; convert it with save_pretrained (writes safetensors)"
            )
        return f"model {self.model!r} has neither {_SINGLE} nor {_INDEX}; give a whole checkpoint"


def find_place(model: str) -> str:
    """Return the absolute path of a model that is a directory here, else `HUB`.

    One process decides for all: another has another working directory, and takes the relative
    path `demo/model` for a hub id.
    """
    path = Path(model).expanduser()
    return str(path.absolute()) if path.is_dir() else HUB


def locate(
    checkpoint: Checkpoint,
    names: Sequence[str],
    *,
    prefixes: Sequence[str],
    layouts: Sequence[Callable[[str], Source]] = (Source,),
) -> dict[str, Source]:
    """Find the stored tensor of each parameter, whichever way the checkpoint spells its keys.

    Args:
        checkpoint: to look in.
        names: of the parameters.
        prefixes: what may stand before every name.
        layouts: ways to spell a name, tried in order under each prefix.

    Raises:
        ConfigError: under no prefix and layout all are found; names one that is missing.
    """
    stored = checkpoint.keys()
    fewest: list[str] = []
    for prefix in prefixes:
        for layout in layouts:
            sources = {}
            for name in names:
                source = layout(name)
                sources[name] = source._replace(key=prefix + source.key)
            missing = [source.key for source in sources.values() if source.key not in stored]
            if not missing:
                return sources
            if not fewest or len(missing) < len(fewest):
                fewest = missing
    raise ConfigError(
        f"model {checkpoint.model!r} lacks {len(fewest)} of {len(names)} tensors, "
        f"first {fewest[0]!r}; give a whole checkpoint of this family"
    )


def fill(
    module: nn.Module,
    checkpoint: Checkpoint,
    sources: Mapping[str, Source],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
) -> None:
    """Give a module that was built on the meta device its weights, one tensor at a time.

    Each tensor is cast and moved before the next is read, so the peak is the module itself plus
    its largest tensor.

    Raises:
        ConfigError: a stored tensor has another shape than the config says.
    """
    state = {}
    for name, parameter in module.named_parameters():
        tensor = checkpoint.read(sources[name])
        if tensor.shape != parameter.shape:
            raise ConfigError(
                f"tensor {sources[name].key!r} of model {checkpoint.model!r} is "
                f"{list(tensor.shape)}, its config.json says {list(parameter.shape)}"
            )
        state[name] = tensor.to(device=device, dtype=dtype)
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False).eval()


def _fetch(model: str, name: str, revision: str | None) -> Path | None:
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except errors.LocalEntryNotFoundError as err:
        if revision is not None and name != "config.json":
            return None  # offline, and not in the snapshot: all there is to this checkpoint here
        raise ConfigError(
            f"model {model!r} is no local directory and the hub cannot be reached; check the path, "
            f"or download it first: hf download {model}"
        ) from err
    except errors.EntryNotFoundError:
        return None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as err:
        raise ConfigError(
            f"model {model!r} is neither a local directory nor, at revision {revision!r}, on the "
            "hub; check the name, and log in if it is gated"
        ) from err
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as err:
        reason = str(err).splitlines()[0]
        raise ConfigError(f"cannot fetch {name} of model {model!r}: {reason}") from err


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=_without_origin)
    except (OSError, ValueError, RecursionError) as err:
        raise ConfigError(f"cannot read {path}: {err}") from err
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object; download it again")
    return content


def _without_origin(settings: dict[str, Any]) -> dict[str, Any]:
    """Leave out where a config was once loaded from: it says nothing about the model."""
    settings.pop("_name_or_path", None)
    return settings
