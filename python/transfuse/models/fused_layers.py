"""A stack of post-norm encoder layers for inference on the CPU: six calls a layer, weights packed, nothing copied.

    query, key, value = one product of hidden           attention on strided views of it
    hidden = LayerNorm(product of the context + hidden)
    hidden = LayerNorm(product of GELU(product of hidden + bias) + hidden)

Whole sequences go through all layers in parts of about a thousand tokens: their activations then live in memory that
the allocator hands out again for the next layer and the next part, instead of in pages that the system must first
clear; and the wide activations of the feed-forward go in pieces that stay in the second-level cache. No row's bits
depend on either: products, norms and attention compute a row from its own sequence alone.

A model family says which modules make a layer (``EncoderLayer``) and how a part attends; see bert.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transfuse.models.packed_linear import PackedLinears, Product, may_pack, packed_for
from transfuse.models.swap import is_exchanged, stock_class
from transfuse.nn.hooks import unhooked
from transfuse.ops.gelu import gelu
from transfuse.ops.layer_norm import add_layer_norm

# Measured on two cores with 1 MiB of second-level cache each: parts of 512 to 2048 tokens and pieces of 128 to 512 rows
# are within 2 %.
PART_TOKENS = 1024
PIECE_ROWS = 256

# (query, key, value), each [..., heads, head_dim] -> context [..., heads, head_dim]
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


class EncoderLayer(NamedTuple):
    """The modules that do one layer's arithmetic."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    attention_output: nn.Module
    attention_norm: nn.Module
    intermediate: nn.Module
    activation: nn.Module
    output: nn.Module
    output_norm: nn.Module
    num_heads: int
    scale: float

    def groups(self) -> tuple[tuple[nn.Module, ...], ...]:
        """Its products."""
        return (self.query, self.key, self.value), (self.attention_output,), (self.intermediate,), (self.output,)

    def may_fuse(self) -> bool:
        """Whether each of the modules computes what its class says and nobody listens to it."""
        return (
            all(may_pack(layer) for group in self.groups() for layer in group)
            and all(stock_class(norm) is nn.LayerNorm and unhooked(norm) for norm in (self.attention_norm, self.output_norm))
            and bool(gelu_form(self.activation)) and unhooked(self.activation)
        )


def gelu_form(activation: nn.Module) -> str:
    """"none" or "tanh" for an activation that accelerate() exchanged, else empty: any class may have the attribute."""
    return getattr(activation, "approximate", "") if is_exchanged(activation) else ""


def pack_layers(owner: nn.Module, layers: Sequence[EncoderLayer], dtype: torch.dtype) -> PackedLinears:
    """The packed products of all layers, in their order."""
    return packed_for(owner, [group for layer in layers for group in layer.groups()], dtype)


def run_layers(
    hidden: Tensor, layers: Sequence[EncoderLayer], packed: PackedLinears, attend: Attend,
    states: list[Tensor] | None = None,
) -> Tensor:
    """[tokens, H] through all layers.

    Args:
        hidden: [tokens, H] in the dtype of ``packed``.
        attend: attention over these tokens.
        states: receives the output of every layer.
    """
    for index, layer in enumerate(layers):
        hidden = _run_layer(hidden, layer, packed.products[4 * index : 4 * index + 4], attend)
        if states is not None:
            states.append(hidden)
    return hidden


def _run_layer(hidden: Tensor, layer: EncoderLayer, products: Sequence[Product], attend: Attend) -> Tensor:
    query_key_value, attention_output, intermediate, output = products
    heads = query_key_value(hidden).view(hidden.shape[0], 3, layer.num_heads, -1)
    context = attend(heads[:, 0], heads[:, 1], heads[:, 2], layer.scale)
    hidden = _add_norm(attention_output(context.flatten(1)), hidden, layer.attention_norm)

    form, bias = gelu_form(layer.activation), layer.intermediate.bias
    pieces = []
    for rows in hidden.split(PIECE_ROWS):
        wide = gelu(intermediate(rows, bias=False), form, bias=bias)
        pieces.append(_add_norm(output(wide), rows, layer.output_norm))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _add_norm(update: Tensor, residual: Tensor, norm: nn.LayerNorm) -> Tensor:
    return add_layer_norm(update, residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps)[0]
