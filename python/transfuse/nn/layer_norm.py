"""LayerNorm, torch's module with our forward, and AddLayerNorm, the residual addition and the norm after it in one."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse.ops.layer_norm import add_layer_norm, layer_norm


class LayerNorm(torch.nn.LayerNorm):
    """Drop-in for ``torch.nn.LayerNorm``: the same constructor, parameters and state_dict. See transfuse.layer_norm."""

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class AddLayerNorm(torch.nn.LayerNorm):
    """``layer_norm(dropout(input) + residual)``: the end of every block of a post-norm transformer.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as in ``torch.nn.LayerNorm``, whose state_dict
            it has.
        p: dropout probability of ``input``; in effect in training mode only.
    """

    def __init__(
        self, normalized_shape, eps=1e-5, elementwise_affine=True, bias=True, device=None, dtype=None, *, p=0.0
    ):
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"AddLayerNorm: p is {p}, expected a number between 0 and 1")
        self.p = p

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        """input, residual: [..., *normalized_shape]. Returns the norm alone; transfuse.add_layer_norm gives the sum."""
        shape, dropout_p = self.normalized_shape, self.p if self.training else 0.0
        return add_layer_norm(input, residual, shape, self.weight, self.bias, self.eps, dropout_p=dropout_p)[0]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"
