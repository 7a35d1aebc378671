"""nn.LayerNorm and nn.GELU, wherever they stand in a model."""

import torch
from torch import nn

import transfuse.nn.gelu
import transfuse.nn.layer_norm
from transfuse.models.swap import Swapped
from transfuse.ops.gelu import gelu
from transfuse.ops.layer_norm import layer_norm


class LayerNorm(Swapped, transfuse.nn.layer_norm.LayerNorm):
    """nn.LayerNorm on the fused kernel."""

    stock = nn.LayerNorm

    def fused(self, input: torch.Tensor) -> torch.Tensor:
        if input.is_nested:  # the kernels read plain strides
            return self.stock_forward(input)
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class GELU(Swapped, transfuse.nn.gelu.GELU):
    """nn.GELU, erf or tanh, on the fused kernel."""

    stock = nn.GELU

    def fused(self, input: torch.Tensor) -> torch.Tensor:
        return self.stock_forward(input) if input.is_nested else gelu(input, self.approximate)


REPLACEMENTS = {fused.stock: fused for fused in (LayerNorm, GELU)}
