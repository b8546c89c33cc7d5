import torch
from torch.testing import assert_close

from pipeline.carvers import _anchors


def test_every_prefix_of_turns_holds_each_group_in_proportion():
    order = torch.tensor([[10, 11, 12, 13, 14, 15, 16, 17, 18]])
    groups = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1]])

    turns = _anchors.in_turns(order, groups)

    # Places (i + 1/2) / 6 and (i + 1/2) / 3; of equal ones the entry that stood first.
    assert turns.tolist() == [[10, 16, 11, 12, 17, 13, 14, 18, 15]]


def test_images_may_have_groups_of_different_sizes_and_empty_ones():
    order = torch.arange(4).repeat(3, 1)
    groups = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])

    turns = _anchors.in_turns(order, groups)

    assert turns.tolist() == [[0, 2, 1, 3], [0, 1, 2, 3], [1, 0, 2, 3]]


def test_equally_similar_anchors_give_the_token_to_the_first_and_each_anchor_keeps_itself():
    vectors = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 0.0], [0.0, 3.0]]])
    anchors = torch.tensor([[4, 1, 0]])

    groups = _anchors.nearest(vectors, anchors)

    # Tokens 0 and 1 are equal, yet both are anchors; the zero token is similar to none.
    assert groups.tolist() == [[2, 1, 1, 0, 0]]


def test_sums_take_rows_of_their_own_image_only():
    features = torch.arange(12.0).view(2, 3, 2)
    rows = torch.tensor([[[0, 2]], [[1, 1]]])
    weights = torch.tensor([[[1.0, 0.5]], [[2.0, 1.0]]])

    sums = _anchors.weighted_sums(features, rows, weights)

    assert_close(sums, torch.tensor([[[2.0, 3.5]], [[24.0, 27.0]]]))


def test_there_may_be_no_sum_and_no_row_in_a_sum():
    features = torch.ones(2, 3, 4)

    assert _anchors.weighted_sums(features, *[torch.zeros(2, 0, 5).long()] * 2).shape == (2, 0, 4)
    assert_close(
        _anchors.weighted_sums(features, *[torch.zeros(2, 3, 0).long()] * 2), torch.zeros(2, 3, 4)
    )
