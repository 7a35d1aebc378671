"""GELU in float64, rounded once: the oracle of transfuse.gelu and its reference backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Beyond it Phi is 0 or 1 in float64 too. Cutting there keeps infinities out of products with 0.
_CUT = 40.0


def gelu_reference(input: Tensor, approximate: str = "none", bias: Tensor | None = None) -> Tensor:
    """``x * Phi(x)`` with x = input + bias, the sum rounded to input's dtype first.

    ``0.5 x erfc(-x / sqrt(2))`` and ``x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))``: neither cancels for x < 0, so the tails
    keep their relative accuracy. Differentiable by torch any number of times.

    Args:
        input: any shape, floating dtype.
        approximate: "none" or "tanh".
        bias: [last dimension], or None.
    """
    x = input
    if bias is not None:
        wide = torch.promote_types(input.dtype, torch.float32)
        x = (input.to(wide) + bias.to(wide)).to(input.dtype)
    x = x.double()
    inner = x.clamp(-_CUT, _CUT)
    if approximate == "tanh":
        phi = torch.sigmoid(2 * math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3))
    else:
        phi = 0.5 * torch.erfc(inner * -math.sqrt(0.5))
    return (x.clamp(min=-_CUT) * phi).to(input.dtype)
