import pytest
import torch

from pipeline import carvers
from pipeline.errors import ConfigError
from tests.carvers.inputs import make_tokens


def positions(seed: int, keep_tokens: int, batch: int = 1) -> list[list[int]]:
    tokens = make_tokens([], batch=batch, grid=(1, 10))
    carver = carvers.build("random", {"seed": seed, "keep_tokens": keep_tokens})
    return [result.positions.tolist() for result in carver.carve(tokens)]


def test_the_draw_of_a_seed_never_changes():
    # The first four of numpy's frozen RandomState(0).permutation(10): 2, 8, 4, 9.
    assert positions(seed=0, keep_tokens=4) == [[2, 4, 8, 9]]


def test_the_first_drawn_token_ranks_first():
    tokens = make_tokens([], batch=1, grid=(1, 10))

    result = carvers.build("random", {"keep_tokens": 4}).carve(tokens)[0]

    assert result.positions[result.ranks.argsort()].tolist() == [2, 8, 4, 9]
    assert torch.equal(result.features, tokens.features[0, [2, 4, 8, 9]])


def test_another_seed_keeps_other_tokens():
    assert positions(seed=1, keep_tokens=4) != positions(seed=0, keep_tokens=4)


def test_every_image_of_a_size_keeps_the_same_positions():
    assert positions(seed=3, keep_tokens=5, batch=3) == positions(seed=3, keep_tokens=5) * 3


def test_all_tokens_are_drawn_about_equally_often():
    drawn = torch.zeros(10)
    for seed in range(500):
        drawn[positions(seed=seed, keep_tokens=5)[0]] += 1

    # 250 expected, standard deviation 11.
    assert drawn.min() > 200 and drawn.max() < 300


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5])
def test_a_seed_out_of_range_is_rejected(seed):
    with pytest.raises(ConfigError, match="seed"):
        carvers.build("random", {"seed": seed})
