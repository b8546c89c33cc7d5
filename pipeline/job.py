"""A checked run: its config with the plug-ins built and everything that identifies its output."""

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, TypeVar

from pipeline import __version__, carvers, codecs, encoders
from pipeline.cache import layout
from pipeline.carvers import Carver
from pipeline.codecs import Codec
from pipeline.config import InputConfig, JobConfig, PluginConfig
from pipeline.decode import DecodeOptions
from pipeline.encoders import Encoder
from pipeline.errors import ConfigError, MissingSignalError
from pipeline.source import SourceOptions
from pipeline.storage import open_store
from pipeline.types import ShardRef

T = TypeVar("T")

_VERSIONED = ("torch", "transformers", "pyarrow", "pillow", "ray")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that an actor needs to carve a shard. Cheap to make and to pickle."""

    config: JobConfig
    encoder: Encoder
    carver: Carver
    codec: Codec
    source: SourceOptions
    decode: DecodeOptions
    settings: Mapping[str, Any]  # whatever changes stored values, as JSON

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of `settings`."""
        return layout.fingerprint(self.settings)

    @property
    def columns(self) -> Sequence[str]:
        """Names of the user's text columns."""
        return self.source.column_suffixes

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What each part says about itself."""
        return {
            "fingerprint": self.fingerprint,
            "settings": self.settings,
            "nested": self.carver.nested,
        }

    @property
    def identity(self) -> Mapping[str, Any]:
        """What `carve.json` holds."""
        return {
            **self.metadata,
            # Whom to tell is no part of a cache, and may hold secrets.
            "config": self.config.model_dump(mode="json", exclude={"notify"}),
            "versions": package_versions(_VERSIONED),
        }

    def work_fingerprint(self, shard: ShardRef) -> str:
        """Return 16 hex digits that identify this job's work on one version of one shard."""
        return layout.fingerprint([self.fingerprint, shard.url, shard.size, shard.etag])


def resolve_job(config: JobConfig, *, encoder: Encoder | None = None) -> Job:
    """Build the plug-ins of a run and check that they fit together; loads no weights.

    Args:
        config: the run.
        encoder: one made by the caller (of a class outside this package, say), which takes the
            place of `config.encoder`; its `describe` must tell it from others.

    Raises:
        ConfigError: names every problem found.
    """
    problems: list[str] = []
    if encoder is None:
        encoder = _attempt(problems, lambda: _build(encoders.build, config.encoder))
    carver = _attempt(problems, lambda: _build(carvers.build, config.carver))
    codec = _attempt(problems, lambda: _build(codecs.build, config.codec))
    needs = carver.needs if carver else frozenset()
    described = _attempt(problems, lambda: encoder.describe(needs)) if encoder else None
    carver_options = _attempt(problems, carver.describe) if carver else None
    if encoder and carver and described is not None:
        _attempt(problems, lambda: _check_signals(config, encoder, carver))
    columns = _attempt(problems, lambda: _check_columns(config))
    store = _attempt(problems, lambda: open_store(config.output.url))
    if problems or not (encoder and carver and codec and store):
        raise ConfigError("; ".join(problems))
    if described is None or columns is None or carver_options is None:
        raise AssertionError("each of them is there unless it is a problem")
    # An actor may have another working directory: from here on the URL is absolute.
    output = config.output.model_copy(update={"url": store.url})
    config = config.model_copy(update={"output": output})
    source = source_options(config.input, columns)
    decode = decode_options(config.input)
    settings = {
        "encoder": {"name": config.encoder.name, **described},
        "carver": {"name": config.carver.name, "options": dict(carver_options)},
        "codec": {"name": config.codec.name, "options": asdict(codec)},
        "width": encoder.width,
        "dtype": config.runner.dtype,
        "input": {
            "image_suffixes": list(source.image_suffixes),
            "columns": list(columns),
            "max_member_bytes": source.max_member_bytes,
            "max_pixels": decode.max_pixels,
            "on_truncated": source.on_truncated,
        },
    }
    return Job(
        config=config,
        encoder=encoder,
        carver=carver,
        codec=codec,
        source=source,
        decode=decode,
        settings=settings,
    )


def source_options(settings: InputConfig, columns: Sequence[str]) -> SourceOptions:
    """Return how shards are read; `columns` are the suffixes of the members kept as text."""
    return SourceOptions(
        image_suffixes=tuple(settings.image_suffixes),
        column_suffixes=tuple(columns),
        max_member_bytes=settings.max_member_mib << 20,
        on_truncated=settings.on_truncated,
    )


def decode_options(settings: InputConfig) -> DecodeOptions:
    """Return how images are decoded."""
    return DecodeOptions(max_pixels=int(settings.max_megapixels * 1_000_000))


def package_versions(names: Sequence[str]) -> dict[str, str]:
    """Return the versions of this package and of others."""
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"carvecache": __version__, **versions}


def _attempt(problems: list[str], action: Callable[[], T]) -> T | None:
    try:
        return action()
    except ConfigError as err:
        problems.append(str(err))
        return None


def _build(build: Callable[[str, Mapping[str, Any]], T], plugin: PluginConfig) -> T:
    return build(plugin.name, plugin.options)


def _check_signals(config: JobConfig, encoder: Encoder, carver: Carver) -> None:
    missing = carver.needs - encoder.yields
    if missing:
        raise MissingSignalError(
            f"carver {config.carver.name!r} needs {_names(missing)}, which encoder "
            f"{config.encoder.name!r} cannot give (it gives {_names(encoder.yields)}): change the "
            "carver's options or the encoder"
        )


def _check_columns(config: JobConfig) -> tuple[str, ...]:
    fixed = {f.name for f in (*layout.FIXED_COLUMNS, *layout.PACKED_COLUMNS)}
    taken = fixed & {*config.input.columns}
    if taken:
        raise ConfigError(f"input.columns: {_names(taken)} is a column of the cache itself")
    if len({*config.input.columns}) != len(config.input.columns):
        raise ConfigError(f"input.columns: a name occurs twice in {config.input.columns}")
    return tuple(config.input.columns)


def _names(values: Sequence[str] | frozenset[str] | set[str]) -> str:
    return ", ".join(sorted(values)) or "nothing"
