"""MaskedSoftmax: transfuse.masked_softmax as a module."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse.ops.masked_softmax import masked_softmax


class MaskedSoftmax(torch.nn.Module):
    """softmax(scale * input + mask), excluded keys weighing exactly 0. See transfuse.masked_softmax.

    Args:
        dim: dimension of the keys.
        scale: factor of input.
        is_causal, causal_alignment: as in transfuse.masked_softmax.
    """

    def __init__(self, dim: int = -1, *, scale: float = 1.0, is_causal: bool = False, causal_alignment: str = "top_left"):
        super().__init__()
        self.dim, self.scale = dim, scale
        self.is_causal, self.causal_alignment = is_causal, causal_alignment

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        return masked_softmax(input, mask, scale=self.scale, is_causal=self.is_causal,
                              causal_alignment=self.causal_alignment, dim=self.dim)

    def extra_repr(self) -> str:
        causal = f", is_causal=True, causal_alignment={self.causal_alignment!r}" if self.is_causal else ""
        return f"dim={self.dim}, scale={self.scale}{causal}"
