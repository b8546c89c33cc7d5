import pytest
import torch
from torch.testing import assert_close

from pipeline.carvers import _image_pool, _similarity


@pytest.mark.parametrize("width", [1, 2, 3, 7, 13, 16, 17, 31, 40, 63])
def test_products_do_not_depend_on_the_place_of_an_image_in_its_batch(width):
    for num_tokens in range(2, 60, 3):
        generator = torch.Generator().manual_seed(num_tokens)
        features = torch.randn(4, num_tokens, width, generator=generator)

        together = _similarity.gram(features)

        for image in range(4):
            assert torch.equal(_similarity.gram(features[[image]])[0], together[image])


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("num_tokens", "width"), [(37, 19), (100, 48), (196, 128)])
def test_products_do_not_depend_on_the_number_of_threads_or_images(threads, num_tokens, width):
    left = torch.randn(5, num_tokens, width, generator=torch.Generator().manual_seed(0))
    right = torch.randn(5, width, 11, generator=torch.Generator().manual_seed(1))
    threads(1)
    gram, product = _similarity.gram(left), _image_pool.product(left, right)

    for count in (2, 8):
        threads(count)

        assert torch.equal(_similarity.gram(left), gram)
        assert torch.equal(_image_pool.product(left, right), product)
        assert torch.equal(_image_pool.product(left[3:4].clone(), right[3:4])[0], product[3])


def test_products_are_those_of_torch():
    left = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))
    right = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1)).mT  # not contiguous

    assert_close(_image_pool.product(left, right), left @ right)
    assert_close(_image_pool.product(left.double(), right.double()), left.double() @ right.double())
