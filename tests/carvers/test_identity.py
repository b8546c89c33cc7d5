import torch

from pipeline import carvers
from tests.carvers.inputs import make_tokens


def test_every_token_is_kept_as_it_is():
    tokens = make_tokens([], batch=2, grid=(3, 4), width=5)

    results = carvers.build("identity").carve(tokens)

    assert torch.equal(torch.stack([r.features for r in results]), tokens.features)
    assert results[1].positions.tolist() == list(range(12))
    assert results[1].sizes.tolist() == [1.0] * 12


def test_a_prefix_is_what_uniform_grid_keeps():
    tokens = make_tokens([], batch=1, grid=(6, 8))

    identity = carvers.build("identity").carve(tokens)[0]
    uniform = carvers.build("uniform_grid", {"keep_tokens": 7}).carve(tokens)[0]

    assert torch.equal(identity.positions[identity.ranks < 7], uniform.positions)


def test_it_takes_no_budget():
    assert "keep_tokens" not in vars(carvers.build("identity"))
