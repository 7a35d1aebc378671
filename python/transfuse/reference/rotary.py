"""Rotary embedding as the formula says it, in float64: the oracle of the tests, and the `reference` backend."""

import torch
from torch import Tensor


def rotary_reference(input: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """(a, b) -> (a * cos - b * sin, b * cos + a * sin) for each of the R/2 pairs of the leading R columns.

    Args:
        input: [..., L, D], any float dtype, any strides.
        cos, sin: [L, R/2], or [B, L, R/2] where B is input's first dimension, or 1.
        interleaved: pairs are columns (2i, 2i + 1); else (i, i + R/2).

    Returns:
        input's shape and dtype; columns from R on are copied.

    Numerics: float64 throughout, one rounding at the end.
    """
    dtype, half = input.dtype, cos.shape[-1]
    if cos.dim() == 3:  # between the batch and L stand the heads, or nothing
        lead = (cos.shape[0], *(1 for _ in range(input.dim() - 3)))
        cos, sin = (table.reshape(*lead, *table.shape[1:]) for table in (cos, sin))
    cos, sin = cos.double(), sin.double()
    rotated, rest = input[..., : 2 * half].double(), input[..., 2 * half :]
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated[..., :half], rotated[..., half:]
    first, second = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        rotated = torch.stack((first, second), dim=-1).flatten(-2)
    else:
        rotated = torch.cat((first, second), dim=-1)
    return torch.cat((rotated.to(dtype), rest), dim=-1)
