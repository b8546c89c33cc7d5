"""Rows of numbers as evenly spaced levels between the smallest and the largest of each row.

R rows of W numbers each: a row may be a token, a channel over the tokens, or a group of features.
"""

from typing import Literal

import torch
from torch import Tensor

Numbers = Literal["bfloat16", "float16", "float32"]
"""Names of the types that scales are stored in."""

DTYPES: dict[Numbers, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def affine_codes(
    rows_RW: Tensor, *, steps: int, numbers: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Round each row to `minimum + code * step`.

    Args:
        rows_RW: (R, W) finite float32.
        steps: levels are 0 to `steps`, at most 255.
        numbers: what minimum and step are stored in: the minimum is rounded down and the step up,
            so that the levels still span the row.

    Returns:
        (R, W) uint8 codes, (R, 1) minimum and (R, 1) step, both of type `numbers`. The step of a
        row of equal numbers is 0, and so are its codes.
    """
    lowest_R1 = rows_RW.amin(dim=1, keepdim=True)
    minimum_R1 = _round_down(lowest_R1, numbers)
    # By a division, as published: a product with 1 / steps rounds differently.
    range_R1 = rows_RW.amax(dim=1, keepdim=True) - minimum_R1.float()
    step_R1 = 0 - _round_down(-range_R1 / torch.full_like(range_R1, steps), numbers)
    divisor_R1 = torch.where(step_R1 > 0, step_R1.float(), 1)
    codes_RW = ((rows_RW - minimum_R1.float()) / divisor_R1).round_().clamp_(0, steps)
    codes_RW = torch.where(step_R1 > 0, codes_RW, 0)
    return codes_RW.to(torch.uint8), minimum_R1, step_R1


def _round_down(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the largest numbers of a type that are not above `values`; -0 becomes 0."""
    nearest = values.to(dtype) + 0.0
    if dtype == torch.float32:
        return nearest
    # By the bits, because torch has no nextafter of short types on every device: the number below
    # has smaller bits if positive, larger if negative; below 0 lies the smallest negative one.
    bits = nearest.view(torch.int16)
    below = torch.where(nearest > 0, bits - 1, bits + 1)
    below = torch.where(nearest == 0, -0x7FFF, below).to(torch.int16).view(dtype)
    return torch.where(nearest.float() > values, below, nearest)
