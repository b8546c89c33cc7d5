"""Caches of format version 1 open for ever, with the numbers they had when they were made."""

import pytest
import torch
from safetensors.torch import load_file

from pipeline import open_cache
from pipeline.cache.verify import find_damage
from tests.cache.make_v1 import CODECS, FOLDER


@pytest.mark.parametrize("codec", CODECS)
def test_a_version_1_cache_opens_and_gives_the_numbers_it_gave(codec: str) -> None:
    expected = load_file(FOLDER / f"{codec}.safetensors")

    cache = open_cache(str(FOLDER / codec))

    assert list(cache.keys()) == ["k0", "k1", "k2", "k3"]
    assert list(find_damage(cache.reader)) == []
    for name, values in expected.items():
        key, field = name.split(".")
        assert torch.equal(getattr(cache[key], field), values), name
    assert cache.columns("k3", ["txt", "grid_h"]) == {"txt": "t3", "grid_h": 10}


@pytest.mark.parametrize("codec", CODECS)
def test_a_prefix_of_a_version_1_row_reads_alone(codec: str) -> None:
    whole = load_file(FOLDER / f"{codec}.safetensors")

    image = open_cache(str(FOLDER / codec), keep_tokens=5)["k2"]

    best = torch.sort(torch.argsort(whole["k2.ranks"])[:5]).values
    assert torch.equal(image.features, whole["k2.features"][best])
