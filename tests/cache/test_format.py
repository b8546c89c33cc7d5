"""Caches of every format version open for ever, with the numbers they had when they were made."""

import pytest
import torch
from safetensors.torch import load_file

from pipeline import open_cache
from pipeline.cache.verify import find_damage
from tests.cache.golden_caches import CACHES, folder


@pytest.mark.parametrize(("version", "codec"), CACHES)
def test_a_cache_of_a_version_opens_and_gives_the_numbers_it_gave(version: int, codec: str) -> None:
    expected = load_file(folder(version) / f"{codec}.safetensors")

    cache = open_cache(str(folder(version) / codec))

    assert list(cache.keys()) == ["k0", "k1", "k2", "k3"]
    assert list(find_damage(cache.reader)) == []
    assert cache.identity["format_version"] == version
    for name, values in expected.items():
        key, field = name.split(".")
        assert torch.equal(getattr(cache[key], field), values), name
    assert cache.columns("k3", ["txt", "grid_h"]) == {"txt": "t3", "grid_h": 10}


@pytest.mark.parametrize(("version", "codec"), CACHES)
def test_a_prefix_of_a_row_of_a_version_reads_alone(version: int, codec: str) -> None:
    whole = load_file(folder(version) / f"{codec}.safetensors")

    image = open_cache(str(folder(version) / codec), keep_tokens=5)["k2"]

    best = torch.sort(torch.argsort(whole["k2.ranks"])[:5]).values
    assert torch.equal(image.features, whole["k2.features"][best])
