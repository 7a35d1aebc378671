"""A stack of post-norm encoder layers for inference on the CPU: one call a layer (ops/encoder_layer.py), weights packed.

Whole sequences go through all layers in parts of about a thousand tokens: their activations then live in memory that
the allocator hands out again for the next layer and the next part, instead of in pages that the system must first
clear. No row's bits depend on that: products, norms and attention compute a row from its own sequence alone.

A model family says which modules make a layer (``EncoderLayer``) and which tokens belong together; see bert.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from transfuse.models.packed_linear import PackedLinears, Product, may_pack
from transfuse.models.swap import is_exchanged, stock_class
from transfuse.nn.hooks import unhooked
from transfuse.ops.attention_checks import MAX_HEAD_DIM
from transfuse.ops.encoder_layer import Sequences, encoder_layer

PART_TOKENS = 1024


class EncoderLayer(NamedTuple):
    """The modules that do one layer's arithmetic, and the one that says with how many heads and at what scale."""

    attention: nn.Module
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_output: nn.Linear
    attention_norm: nn.LayerNorm
    intermediate: nn.Linear
    activation: nn.Module
    output: nn.Linear
    output_norm: nn.LayerNorm

    def groups(self) -> tuple[tuple[nn.Linear, ...], ...]:
        """Its products, in the order in which they run."""
        return (self.query, self.key, self.value), (self.attention_output,), (self.intermediate,), (self.output,)

    def may_fuse(self) -> bool:
        """Whether every module is of a class whose arithmetic is known here."""
        return (
            all(may_pack(layer) for group in self.groups() for layer in group)
            and all(
                stock_class(norm) is nn.LayerNorm and len(norm.normalized_shape) == 1
                for norm in (self.attention_norm, self.output_norm)
            )
            and bool(gelu_form(self.activation))
            and self.attention.attention_head_size <= MAX_HEAD_DIM
        )


class FusedStack:
    """The layers of one encoder with their packed products; ``holds`` says whether anything has changed since."""

    def __init__(self, blocks: nn.Module, layers: list[EncoderLayer], dtype: torch.dtype):
        self.blocks, self.layers, self.dtype = blocks, layers, dtype
        self.packed = PackedLinears([group for layer in layers for group in layer.groups()], dtype)
        self.modules = [(module, type(module), tuple(module._modules.values())) for module in blocks.modules()]

    def holds(self, blocks: nn.Module, dtype: torch.dtype) -> bool:
        """Whether the modules are the same, in eval mode and unhooked, and the weights those that were packed."""
        if blocks is not self.blocks or dtype != self.dtype or torch_module._has_any_global_hook():
            return False
        for module, cls, children in self.modules:
            state = module.__dict__
            if (
                type(module) is not cls or state["training"] or tuple(state["_modules"].values()) != children
                or state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state
            ):
                return False
        return self.packed.fits()

    def run(self, hidden: Tensor, sequences: Sequences, states: list[Tensor] | None = None) -> Tensor:
        """[tokens, H] in the stack's dtype through all layers; ``states`` receives the output of each."""
        for index, layer in enumerate(self.layers):
            products = self.packed.products[4 * index : 4 * index + 4]
            hidden = encoder_layer(hidden, sequences, *_parameters(layer, *products))
            if states is not None:
                states.append(hidden)
        return hidden


_stacks: WeakKeyDictionary[nn.Module, FusedStack] = WeakKeyDictionary()


def fused_stack(
    owner: nn.Module, blocks: nn.Module, dtype: torch.dtype, layers: Callable[[], list[EncoderLayer] | None]
) -> FusedStack | None:
    """The stack of ``owner``, made anew where something changed; None where its modules cannot be fused.

    Args:
        owner: keeps the stack alive.
        blocks: holds every module of the layers and no other.
        layers: reads the layers off ``blocks``; None where a module is not what the family made it.
    """
    stack = _stacks.get(owner)
    if stack is not None and stack.holds(blocks, dtype):
        return stack
    _stacks.pop(owner, None)
    found = layers() if all(_is_quiet(module) for module in blocks.modules()) else None
    if not found or not all(layer.may_fuse() for layer in found):
        return None
    stack = _stacks[owner] = FusedStack(blocks, found, dtype)
    return stack


def forget(model: nn.Module) -> None:
    """Frees the packed copies of a module and of all within."""
    for module in model.modules():
        _stacks.pop(module, None)


def packed_bytes(model: nn.Module) -> int:
    """Memory that the packed copies of a module and of all within take."""
    found: Iterable[FusedStack | None] = map(_stacks.get, model.modules())
    return sum(stack.packed.bytes() for stack in found if stack is not None)


def gelu_form(activation: nn.Module) -> str:
    """"none" or "tanh" for an activation that accelerate() exchanged, else empty: any class may have the attribute."""
    return getattr(activation, "approximate", "") if is_exchanged(activation) else ""


def _is_quiet(module: nn.Module) -> bool:
    return not module.training and unhooked(module)


def _parameters(
    layer: EncoderLayer, query_key_value: Product, context: Product, wide: Product, narrow: Product
) -> tuple[int | float | bool | Tensor | None, ...]:
    """What encoder_layer() takes after the tokens; read at every call, since modules may be edited."""
    attention, attention_norm, output_norm = layer.attention, layer.attention_norm, layer.output_norm
    return (
        attention.num_attention_heads, attention.attention_head_size, attention.scaling,
        query_key_value.weight, query_key_value.bias, context.weight, context.bias,
        attention_norm.weight, attention_norm.bias, attention_norm.eps,
        wide.weight, wide.bias, narrow.weight, narrow.bias,
        output_norm.weight, output_norm.bias, output_norm.eps,
        wide.out_features, gelu_form(layer.activation) == "tanh",
    )
