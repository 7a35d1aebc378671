"""packed_linear: linear layers on a packed copy of their weights. The arithmetic is kernels/cpu/packed_linear.cpp.

    packed = pack(linear.weight)                                              # once
    packed_linear(rows, packed, linear.bias, linear.out_features)             # [N, in] -> [N, out], as F.linear
    packed_linear(rows, packed, linear.bias, linear.out_features, "tanh")     # the GELU of that

It belongs to the fused encoder layers (models/fused_layers.py) and has no gradient, no dispatch and no other backend.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from transfuse import extension

PANEL_COLUMNS = 32  # packed_linear_columns of kernels/cpu/packed_linear.h
DTYPES = (torch.float32, torch.bfloat16)


def is_fast() -> bool:
    """Whether the product is as fast as this CPU multiplies: at every ISA level but the portable one."""
    return extension._C is not None and extension._C.cpu_isa() != "baseline"


def pack(weight: Tensor) -> Tensor:
    """A copy of a weight [out, in], float32 or bfloat16, as panels of 32 output channels, what is missing filled with 0.

    Returns: [out / 32, in, 32] of float32; [out / 32, in / 2, 64] of bfloat16, where two input channels lie side by side.
    """
    channels = 1 if weight.dtype == torch.float32 else 2
    out, columns = weight.shape
    padded = F.pad(weight.detach(), (0, -columns % channels, 0, -out % PANEL_COLUMNS))
    panels = padded.view(padded.shape[0] // PANEL_COLUMNS, PANEL_COLUMNS, -1, channels).transpose(1, 2)
    return panels.flatten(2).contiguous()


def packed_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, approximate: str | None = None
) -> Tensor:
    """``F.linear(input, w, bias)`` for ``weight = pack(w)``, or its GELU.

    Args:
        input: [N, in], float32 or bfloat16, on the CPU.
        weight: ``pack(w)`` of a weight [out_features, in] of input's dtype.
        bias: [out_features], float32.
        approximate: None for no activation, else that of ``torch.nn.functional.gelu``: "none" or "tanh".
    Returns:
        [N, out_features] in input's dtype.
    Numerics:
        Products are summed in float32, one chain over the input channels; bias and GELU follow in float32, then
        one rounding. A row's bits depend on that row alone. Subnormal bfloat16s may count as 0.
    Raises:
        ValueError: a shape or dtype that does not fit.
    """
    if approximate is None:
        return _linear(input, weight, bias, out_features)
    return _linear_gelu(input, weight, bias, out_features, approximate == "tanh")


if extension._C is not None:
    _linear = torch.ops.transfuse.packed_linear.default
    _linear_gelu = torch.ops.transfuse.packed_linear_gelu.default

    @torch.library.register_fake("transfuse::packed_linear")
    def _(input, weight, bias, out_features):
        return input.new_empty((input.shape[0], out_features))

    @torch.library.register_fake("transfuse::packed_linear_gelu")
    def _(input, weight, bias, out_features, tanh):
        return input.new_empty((input.shape[0], out_features))
