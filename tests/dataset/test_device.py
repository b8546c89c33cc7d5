"""Tokens on a device, a batch ahead."""

from pathlib import Path

import pytest
import torch

from pipeline import CarvedDataset, on_device
from tests.dataset.caches import make_cache

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("form", ["packed", "padded"])
def test_tokens_are_those_of_their_batch(tmp_path: Path, device: str, form: str) -> None:
    dataset = CarvedDataset(make_cache(str(tmp_path), 40), batch_size=7)
    expected = [getattr(batch, form)(dtype=torch.bfloat16) for batch in dataset]

    found = list(on_device(dataset, device, form=form, dtype=torch.bfloat16))

    assert [len(batch) for batch, _ in found] == [7, 7, 7, 7, 7, 5]
    for (_, tokens), other in zip(found, expected, strict=True):
        assert tokens.features.device.type == device
        assert torch.equal(tokens.features.cpu(), other.features)
        assert torch.equal(tokens.positions.cpu(), other.positions)
        assert torch.equal(tokens.sizes.cpu(), other.sizes)


@pytest.mark.gpu
def test_a_batch_is_used_while_the_next_one_is_on_its_way(tmp_path: Path) -> None:
    dataset = CarvedDataset(make_cache(str(tmp_path), 400), batch_size=40)
    expected = [batch.packed().features.double().sum() for batch in dataset]
    heavy = torch.randn(4096, 4096, device="cuda")

    found = []
    for _, tokens in on_device(dataset, "cuda"):
        for _ in range(20):
            heavy = torch.nn.functional.normalize(heavy @ heavy)
        found.append(tokens.features.double().sum().cpu())

    assert torch.allclose(torch.stack(found), torch.stack(expected))


def test_another_form_is_refused(tmp_path: Path) -> None:
    dataset = CarvedDataset(make_cache(str(tmp_path), 4), batch_size=2)

    with pytest.raises(ValueError, match="form='ragged'"):
        next(on_device(dataset, "cpu", form="ragged"))
