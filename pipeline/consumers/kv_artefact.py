"""The artefact `kv_prefix` of a cache, read: of every image what a language model remembers of it.

Opt-in, and large: see `docs/kv_prefix.md` before making one. It lies in
`<cache>/artefacts/kv_prefix/<name>/`; `kv_writer.py` makes it. A row is a prefix
(`kv_packing.py`): its `positions` are those in the prompt, its `sizes` what the model is told, and
its grid (1, 1, position of what stands behind it).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline import codecs
from pipeline.cache import layout
from pipeline.cache.artefact import artefact_rows, artefact_store, read_artefact
from pipeline.cache.commit import differences
from pipeline.cache.reader import SnapshotReader
from pipeline.carved_cache import CarvedCache
from pipeline.codecs import Codec
from pipeline.consumers.kv_packing import PackedPrefix, unpack_prefixes
from pipeline.consumers.kv_prefix import (
    FixedPrompt,
    KeyValues,
    KVPrefix,
    fixed_prompt,
    text_states,
)
from pipeline.consumers.model_digest import model_digest
from pipeline.errors import CacheFormatError, ConfigError
from pipeline.types import PackedTokens, Placement

KIND = "kv_prefix"


class _Prompt(BaseModel):
    text: str
    before: list[int]
    image_id: int
    after: list[int]


class _Codec(BaseModel):
    name: str
    options: dict[str, Any]


class _Settings(BaseModel):
    """What a reader needs of an artefact's settings."""

    source: str
    model: dict[str, str]
    prompt: _Prompt
    placement: Placement
    codec: _Codec


@dataclass(kw_only=True)
class PrefixArtefact:
    """A mapping from key to `KVPrefix`, immutable while open. Made by `open_prefixes`."""

    rows: SnapshotReader
    codec: Codec
    prompt: FixedPrompt
    placement: Placement
    text: KeyValues  # of the text before the image

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[str]:
        return self.keys()

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.rows.contains(key)

    def keys(self) -> Iterator[str]:
        """Yield all keys, sorted."""
        return self.rows.keys()

    def __getitem__(self, key: str) -> KVPrefix:
        """Return the prefix of one image; see `get_many`."""
        return self.get_many([key])[0]

    def get_many(self, keys: Sequence[str]) -> list[KVPrefix]:
        """Return the prefixes of several images, unpacked together on the model's device.

        Raises:
            KeyNotFoundError: there is none of one of them.
            CacheFormatError: stored bytes are damaged.
        """
        places = self.rows.find_many(keys)
        stored = [
            PackedPrefix(
                packed=PackedTokens(
                    tokens=s.tokens, aux=s.codec_aux, num_tokens=s.num_tokens, head=s.head
                ),
                positions=s.positions,
                sizes=s.sizes,
                end=place.grid_w,
            )
            for place, s in zip(places, self.rows.read_many(places), strict=True)
        ]
        return unpack_prefixes(
            stored, self.codec, prompt=self.prompt, placement=self.placement, text=self.text
        )

    def row_bytes(self, key: str) -> int:
        """Return how many bytes the prefix of an image takes."""
        place = self.rows.find(key)
        return place.tokens_length + place.aux_length


def open_prefixes(
    cache: CarvedCache,
    model: Any,  # noqa: ANN401
    processor: Any,  # noqa: ANN401
    name: str,
    *,
    prompt: str | None = None,
) -> PrefixArtefact:
    """Open the prefixes that lie beside a cache.

    Args:
        cache: they were made from.
        model: that takes them; it must be the one that made them.
        processor: its processor, or its tokenizer alone.
        name: of the artefact.
        prompt: that they must have been made with; None for whichever it was.

    Raises:
        ConfigError: they are of another model, prompt or cache; names what differs.
        CacheFormatError: there is no such artefact, or its record is damaged.
    """
    store = artefact_store(cache.reader.store, KIND, name)
    settings = read_artefact(store, KIND)
    try:
        known = _Settings.model_validate(settings)
    except ValidationError as err:
        (first, *_) = err.errors()
        place = ".".join(map(str, first["loc"]))
        raise CacheFormatError(
            f"{store.url}/{layout.ARTEFACT_PATH} is damaged: {place}: {first['msg']}"
        ) from err
    text = known.prompt.text if prompt is None else prompt
    fixed = fixed_prompt(model, processor, text)
    wanted = artefact_settings(cache, model, fixed, known.placement)
    shared = ("source", "model", "prompt")
    # In which type the states were made is told and not asked for: they are cast.
    there, here = ({n: s[n] for n in shared} for s in (settings, wanted))
    here["model"] = {**here["model"], "dtype": there["model"].get("dtype")}
    if found := "; ".join(differences(there, here)):
        raise ConfigError(
            f"{store.url} was made with another model, prompt or cache ({found}): use those, or "
            "make prefixes under another name"
        )
    return PrefixArtefact(
        rows=artefact_rows(store),
        codec=codecs.build(known.codec.name, known.codec.options),
        prompt=fixed,
        placement=known.placement,
        text=text_states(model, fixed),
    )


def artefact_settings(
    cache: CarvedCache,
    model: Any,  # noqa: ANN401
    prompt: FixedPrompt,
    placement: Placement,
) -> dict[str, Any]:
    """Return what changes the stored values, but for the codec; as JSON.

    Raises:
        ConfigError: the cache holds features that no language model takes.
    """
    encoder = cache.identity["settings"]["encoder"]
    if "stage" not in encoder:
        raise ConfigError(
            f"{cache.reader.store.url} holds features of encoder {encoder['name']!r}, which no "
            "language model takes: use a cache of an encoder with a stage, such as llava"
        )
    return {
        "source": cache.identity["fingerprint"],
        "keep_tokens": cache.keep_tokens,
        "stage": encoder["stage"],
        "placement": placement,
        "prompt": {
            "text": prompt.text,
            "before": list(prompt.before),
            "image_id": prompt.image_id,
            "after": list(prompt.after),
        },
        "model": {
            "type": str(model.config.model_type),
            "digest": model_digest(model),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
    }
