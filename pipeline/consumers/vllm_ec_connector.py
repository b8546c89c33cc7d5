"""An encoder-cache connector that lets vLLM load an image's tokens from a cache by its key.

For Qwen models. Requests then carry the key as the image's uuid and the grid alone
(`consumers.vllm.grid_only_data`); pixels and features stay where they are. Start vLLM with

    --ec-transfer-config '{"ec_connector": "CarvedCacheConnector",
        "ec_connector_module_path": "pipeline.consumers.vllm_ec_connector",
        "ec_role": "ec_consumer",
        "ec_connector_extra_config": {"cache_url": "s3://bucket/cache"}}'

Options in `ec_connector_extra_config`: `cache_url`; `keep_tokens`, as in `open_cache`;
`snapshot_number`, so that every process of an engine reads the same one while the cache grows.

Written for vLLM 0.33.0 (`docs/serving.md`); this module is the only one that imports it.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.ec_transfer.ec_connector.base import (
    ECConnectorBase,
    ECConnectorMetadata,
    ECConnectorRole,
)

from pipeline.carved_cache import CarvedCache, open_cache
from pipeline.consumers.vllm import gridded_model
from pipeline.errors import ConfigError, KeyNotFoundError

logger = logging.getLogger(__name__)

OPTIONS = frozenset({"cache_url", "keep_tokens", "snapshot_number"})

REMEMBERED_KEYS = 1 << 16
"""Answers about keys that the scheduler keeps: it asks for each image at every step."""


@dataclass(frozen=True, kw_only=True)
class KeysToLoad(ECConnectorMetadata):  # type: ignore[misc]  # vLLM is untyped here
    """What the scheduler tells the workers before a step."""

    keys: tuple[str, ...]


class CarvedCacheConnector(ECConnectorBase):  # type: ignore[misc]  # vLLM is untyped here
    """Loads the tokens of images whose uuid is a key of a cache; saves nothing.

    A request that relies on the cache for an image is failed, alone, if there is no such key or
    the row has another number of tokens than the prompt has room for.

    Raises:
        ConfigError: an option is missing or unknown, the role is not `ec_consumer`, or the cache
            does not fit the model.
    """

    def __init__(self, vllm_config: Any, role: ECConnectorRole) -> None:  # noqa: ANN401
        super().__init__(vllm_config, role)
        transfer, model = vllm_config.ec_transfer_config, vllm_config.model_config
        if transfer.is_ec_producer:
            raise ConfigError(
                f"ec_role={transfer.ec_role!r}: a cache is only read; set 'ec_consumer'"
            )
        self._cache = _open(transfer.ec_connector_extra_config)
        _check_fit(self._cache, model.hf_config)
        self._dtype: torch.dtype = model.dtype
        self._num_tokens = lru_cache(REMEMBERED_KEYS)(self._look_up)
        self._to_load: dict[str, None] = {}
        self._unavailable: set[str] = set()

    def has_cache_item(self, identifier: str) -> bool:
        """Return whether the cache has an image of this key."""
        return self._num_tokens(identifier) is not None

    def ensure_cache_available(self, request: Any, num_computed_tokens: int) -> bool:  # noqa: ANN401
        """Return False for a request that cannot be served, which vLLM fails after this step.

        Left to itself, vLLM would run its tower without pixels, or put too few rows into the
        prompt; both end the engine and all its requests.
        """
        problems = [
            problem
            for feature in request.mm_features
            if _end(feature) > num_computed_tokens and (problem := self._problem(feature))
        ]
        if problems:
            logger.error("request %s fails: %s", request.request_id, "; ".join(problems))
            self._unavailable.add(request.request_id)
        return not problems

    def take_unavailable_requests(self) -> set[str]:
        """Return the requests that cannot be served, once."""
        taken, self._unavailable = self._unavailable, set()
        return taken

    def update_state_after_alloc(self, request: Any, index: int) -> None:  # noqa: ANN401
        """Note an image that vLLM has made room for."""
        key = request.mm_features[index].identifier
        if self.has_cache_item(key):
            self._to_load[key] = None

    def build_connector_meta(self, scheduler_output: Any) -> KeysToLoad:  # noqa: ANN401
        """Return the images noted since the last step, and forget them."""
        del scheduler_output
        meta = KeysToLoad(keys=tuple(self._to_load))
        self._to_load.clear()
        return meta

    def start_load_caches(self, encoder_cache: dict[str, Tensor], **kwargs: Any) -> None:  # noqa: ANN401
        """Read the images of this step from the cache into vLLM's encoder cache.

        Args:
            encoder_cache: of the worker; gets (K, D) features in the model's dtype, on the
                worker's device.
            kwargs: of other connectors; none is needed here.

        Raises:
            StorageError: the store does not answer, after all retries.
            CacheFormatError: a row is damaged.
        """
        del kwargs
        keys = [k for k in self._get_connector_metadata().keys if k not in encoder_cache]
        if not keys:
            return
        images = self._cache.get_many(keys, device=_device(), dtype=self._dtype)
        encoder_cache.update({image.key: image.features for image in images})

    def save_caches(
        self,
        encoder_cache: dict[str, Tensor],
        mm_hash: str,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Do nothing: a cache is written by carving."""

    def _look_up(self, key: str) -> int | None:
        """Return how many tokens an image gives, or None if there is none of this key."""
        try:
            stored = self._cache.reader.find(key).num_tokens
        except KeyNotFoundError:
            return None
        return min(stored, self._cache.keep_tokens or stored)

    def _problem(self, feature: Any) -> str | None:  # noqa: ANN401
        """Return why an image of a request cannot be served, or None."""
        key, wanted = feature.identifier, feature.mm_position.get_num_embeds()
        found = self._num_tokens(key)
        if found is None and _needs_features(feature.data):
            return f"no image {key!r} in {self._cache.reader.store.url}, and none in the request"
        if found not in (None, wanted):
            return f"image {key!r} has {found} tokens and the prompt has room for {wanted}"
        return None


def _open(options: Mapping[str, Any]) -> CarvedCache:
    if unknown := options.keys() - OPTIONS:
        raise ConfigError(
            f"ec_connector_extra_config has {', '.join(sorted(unknown))}; known: "
            f"{', '.join(sorted(OPTIONS))}"
        )
    if "cache_url" not in options:
        raise ConfigError("ec_connector_extra_config names no cache_url")
    return open_cache(
        options["cache_url"],
        keep_tokens=options.get("keep_tokens"),
        snapshot_number=options.get("snapshot_number"),
    )


def _check_fit(cache: CarvedCache, hf_config: Any) -> None:  # noqa: ANN401
    model, url = gridded_model(hf_config), cache.reader.store.url
    if cache.width != model.width:
        raise ConfigError(
            f"{url} holds tokens {cache.width} wide and the {model.model_type} takes "
            f"{model.width}; carve with this model and stage 'projected'"
        )


def _end(feature: Any) -> int:  # noqa: ANN401
    return int(feature.mm_position.offset + feature.mm_position.length)


def _needs_features(data: Any) -> bool:  # noqa: ANN401
    """Return whether a request brings neither pixels nor features; not known where data is None."""
    if data is None:
        return False
    return not any(name.startswith("pixel_values") or name.endswith("_embeds") for name in data)


def _device() -> torch.device:
    """Return the worker's own device."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
