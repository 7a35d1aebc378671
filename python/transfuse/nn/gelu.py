"""GELU, torch's module with our forward, and BiasGELU, which takes over the bias of the linear layer before it."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse.ops.gelu import gelu


class GELU(torch.nn.GELU):
    """Drop-in for ``torch.nn.GELU``: the same constructor. See transfuse.gelu."""

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, self.approximate)


class BiasGELU(torch.nn.Module):
    """``gelu(input + bias)``: put it behind a ``torch.nn.Linear(..., bias=False)`` and the bias costs no pass over memory.

    Args:
        num_features: size of the last dimension.
        approximate: "none" or "tanh".
        device, dtype: of the parameter ``bias`` [num_features], which starts at 0.
    """

    def __init__(self, num_features: int, approximate: str = "none", device=None, dtype=None):
        super().__init__()
        self.num_features, self.approximate = num_features, approximate
        self.bias = torch.nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, self.approximate, bias=self.bias)

    def extra_repr(self) -> str:
        return f"{self.num_features}, approximate={self.approximate!r}"
