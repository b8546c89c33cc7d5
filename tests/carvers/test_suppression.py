import pytest
import torch
from torch import Tensor

from pipeline.carvers._suppression import survivors


def literal(deletes: Tensor, order: list[int]) -> list[bool]:
    stays = [True] * len(order)
    for place, token in enumerate(order):
        if stays[token]:
            for later in order[place + 1 :]:
                if deletes[token, later]:
                    stays[later] = False
    return stays


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.4, 1.0])
def test_it_equals_going_through_the_tokens_one_by_one(share):
    generator = torch.Generator().manual_seed(0)
    deletes = torch.rand(4, 30, 30, generator=generator) < share
    order = torch.stack([torch.randperm(30, generator=generator) for _ in range(4)])

    stays = survivors(deletes, order)

    for image in range(4):
        assert stays[image].tolist() == literal(deletes[image], order[image].tolist())
        alone = survivors(deletes[[image]], order[[image]])[0]
        assert torch.equal(alone, stays[image])


def test_a_deleted_token_deletes_nobody():
    # A chain in which each token deletes the next: every other one stays.
    deletes = torch.zeros(1, 7, 7, dtype=torch.bool)
    deletes[0, range(6), range(1, 7)] = True

    stays = survivors(deletes, torch.arange(7)[None])

    assert stays[0].tolist() == [True, False] * 3 + [True]
