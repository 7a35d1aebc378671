"""The oracle of rms_norm and add_rms_norm: float64 inside, one rounding at the end, differentiated by torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rms_norm_reference(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """``input / sqrt(mean(input * input) + eps) * weight`` over the last ``len(normalized_shape)`` dimensions.

    Args:
        input: [..., *normalized_shape], any floating dtype.
        normalized_shape: sizes of the dimensions that share a mean.
        weight: [*normalized_shape] or None.
        eps: added to the mean; None is default_eps(input.dtype).
    Returns:
        The shape and dtype of ``input``.
    """
    dims = tuple(range(-len(normalized_shape), 0))
    eps = default_eps(input.dtype) if eps is None else eps
    x = input.double()
    x = x / torch.sqrt((x * x).mean(dims, keepdim=True) + eps)
    if weight is not None:
        x = x * weight.double()
    return x.to(input.dtype)


def add_rms_norm_reference(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(norm of the sum, sum), sum = ``input + residual`` rounded to its dtype. Arguments as in rms_norm_reference."""
    total = input + residual
    return rms_norm_reference(total, normalized_shape, weight, eps), total


def default_eps(dtype: torch.dtype) -> float:
    """torch's: the distance from 1 to the next number of the type it computes in, float32 for 16-bit inputs."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
