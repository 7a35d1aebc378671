"""The oracle of layer_norm and add_layer_norm: float64 inside, one rounding at the end, differentiated by torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def layer_norm_reference(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``(input - mean) / sqrt(variance + eps) * weight + bias`` over the last ``len(normalized_shape)`` dimensions.

    Args:
        input: [..., *normalized_shape], any floating dtype.
        normalized_shape: sizes of the dimensions that share a mean.
        weight, bias: [*normalized_shape] or None.
        eps: added to the variance.
    Returns:
        The shape and dtype of ``input``.
    """
    dims = tuple(range(-len(normalized_shape), 0))
    x = input.double()
    # Shifting by an element of the row changes nothing but rounding: a constant row is exactly 0, in float64 too.
    first = x[(..., *(slice(0, 1) for _ in dims))].detach()
    x = x - first
    x = x - x.mean(dims, keepdim=True)
    x = x / torch.sqrt((x * x).mean(dims, keepdim=True) + eps)
    if weight is not None:
        x = x * weight.double()
    if bias is not None:
        x = x + bias.double()
    return x.to(input.dtype)


def add_layer_norm_reference(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """(norm of the sum, sum), sum = ``input + residual`` rounded to its dtype. Arguments as in layer_norm_reference."""
    total = input + residual
    return layer_norm_reference(total, normalized_shape, weight, bias, eps), total
