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
    # Not clamp(), whose derivative at NaN is 0.
    outer = torch.where(x < -_CUT, -_CUT, x)
    inner = torch.where(outer > _CUT, _CUT, outer)
    if approximate == "tanh":
        phi = torch.sigmoid(2 * math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3))
    else:
        phi = 0.5 * torch.erfc(inner * -math.sqrt(0.5))
    return _rounded_once(outer * phi, input.dtype)


def _rounded_once(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """``exact.to(dtype)`` with one rounding. torch goes from float64 to a 16-bit type through float32 and rounds twice.

    Rounding to odd on the way (the last bit of the float32 says that something was cut off) makes two roundings one.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return exact.to(dtype)
    near = exact.to(torch.float32)
    with torch.no_grad():
        too_large, bits = near.double().abs() > exact.abs(), near.view(torch.int32)
        odd = ((bits - too_large.int()) | 1).view(torch.float32)
        cut_off = (near.double() != exact) & exact.isfinite()
    return torch.where(cut_off, near + (odd - near).detach(), near).to(dtype)
