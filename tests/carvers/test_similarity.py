import pytest
import torch

from pipeline.carvers import _similarity


@pytest.mark.parametrize("width", [1, 2, 3, 7, 13, 16, 17, 31, 40, 63])
def test_products_do_not_depend_on_the_place_of_an_image_in_its_batch(width):
    for num_tokens in range(2, 60, 3):
        generator = torch.Generator().manual_seed(num_tokens)
        features = torch.randn(4, num_tokens, width, generator=generator)

        together = _similarity.gram(features)

        for image in range(4):
            assert torch.equal(_similarity.gram(features[[image]])[0], together[image])


def test_added_columns_change_no_product_and_a_width_that_fits_is_not_copied():
    rows = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(0))

    wider = _similarity.aligned(rows)

    assert wider.shape == (2, 5, 16)
    assert torch.equal(wider[..., :10], rows)
    assert wider[..., 10:].eq(0).all()
    assert _similarity.aligned(wider) is wider
