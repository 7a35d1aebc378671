"""encoder_layer: a post-norm encoder layer in one call. The order of its parts is csrc/encoder_layer.cpp.

    query, key, value = one product of hidden           attention on strided views of it
    hidden = LayerNorm(product of the context + hidden)
    hidden = LayerNorm(product of GELU(product of hidden) + hidden)

It belongs to models/fused_layers.py, which makes its arguments from the modules of a layer; it has no gradient, no
dispatch and no other backend. Products are those of ops/packed_linear.py; attention and norms are the ops' own, with
the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import extension


class Sequences(NamedTuple):
    """Which tokens of hidden [tokens, H] attend to which.

    Args:
        cu_seqlens: [sequences + 1], int32 or int64, of packed tokens; None where hidden is a padded batch.
        batch, max_seqlen: rows of the padded batch and their length; of packed tokens only the longest length counts.
        mask: [batch, heads, L, L] bool (True takes part) or a float bias of that shape, any strides; padded only.
    """

    cu_seqlens: Tensor | None
    batch: int
    max_seqlen: int
    mask: Tensor | None = None


def encoder_layer(hidden: Tensor, sequences: Sequences, *parameters) -> Tensor:
    """hidden [tokens, H] of the next layer, in a new tensor.

    Args:
        hidden: [tokens, H], contiguous, float32 or bfloat16, on the CPU.
        sequences: how the tokens attend.
        parameters: num_heads, head_dim, scale and what follows them in the raw op's schema. Weights of products are
            packed, their biases float32; a bfloat16 layer takes norms of either dtype.
    Raises:
        ValueError: a shape or dtype that does not fit.
    """
    cu_seqlens, batch, max_seqlen, mask = sequences
    bias = None
    if mask is not None:
        num_heads = parameters[0]
        mask = mask.expand(batch, num_heads, max_seqlen, max_seqlen)
        if mask.is_floating_point():
            mask, bias = None, mask
    return _encoder_layer(hidden, cu_seqlens, mask, bias, batch, max_seqlen, *parameters)


if extension._C is not None:
    _encoder_layer = torch.ops.transfuse.encoder_layer.default

    @torch.library.register_fake("transfuse::encoder_layer")
    def _(hidden, *rest):
        return hidden.new_empty(hidden.shape)
