"""Linear layers whose weights are kept a second time, in the layout that the CPU multiplies fastest.

    packed = PackedLinears(groups, torch.float32)              # a group is one or several layers with the same input
    query_key_value = packed_linear(rows, *packed.products[0])  # [N, in] -> [N, out of all layers of the group]

A packed copy belongs to no module, so state_dict, pickle and deepcopy know nothing of it. It fits as long as every
weight is the same memory at the same version with the same 64 sampled elements: an edit through ``.data`` changes
neither of the first two, and ``transfuse.repack`` is for edits that the sample misses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transfuse.ops.packed_linear import DTYPES, is_fast, pack

Group = tuple[nn.Linear, ...]

_SAMPLED_ELEMENTS = 64


class Product(NamedTuple):
    """The arguments of packed_linear() that stand for ``F.linear`` with all layers of a group side by side."""

    weight: Tensor
    bias: Tensor | None
    out_features: int

    @classmethod
    def of(cls, group: Group, dtype: torch.dtype) -> Product:
        weights = [layer.weight.detach().to(dtype) for layer in group]
        biases = [torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach() for layer in group]
        return cls(
            pack(torch.cat(weights) if len(weights) > 1 else weights[0]),
            torch.cat(biases).float() if any(layer.bias is not None for layer in group) else None,
            sum(layer.out_features for layer in group),
        )


class PackedLinears:
    """The products of some groups of layers, and what their weights looked like when they were packed."""

    def __init__(self, groups: Sequence[Group], dtype: torch.dtype):
        self.dtype = dtype
        self.products = [Product.of(group, dtype) for group in groups]
        self.layers = [layer for group in groups for layer in group]
        tensors = self._tensors()
        self.states = [(tensor._version, tensor.data_ptr()) for tensor in tensors]
        self.samples = [_sample(tensor) for tensor in tensors]  # views: they show a later edit
        self.sampled = torch.cat(self.samples)

    def fits(self) -> bool:
        """Whether the layers still hold what was packed."""
        states = [(tensor._version, tensor.data_ptr()) for tensor in self._tensors()]
        return states == self.states and torch.equal(torch.cat(self.samples), self.sampled)

    def bytes(self) -> int:
        tensors = (tensor for product in self.products for tensor in (product.weight, product.bias))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def _tensors(self) -> list[Tensor]:
        return [tensor for layer in self.layers for tensor in layer._parameters.values() if tensor is not None]


def may_pack(layer: nn.Module) -> bool:
    """Whether this is a plain linear layer on the CPU, in a dtype that has packed products."""
    return (
        type(layer) is nn.Linear
        and all(
            tensor is None or type(tensor) is nn.Parameter and tensor.dtype in DTYPES and tensor.device.type == "cpu"
            for tensor in (layer.weight, layer.bias)
        )
    )


def inference_on_cpu(input: Tensor) -> bool:
    """Whether a call with this input may use packed weights at all: no gradient, no tracing, no autocast."""
    return (
        input.device.type == "cpu"
        and input.dtype in DTYPES
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and is_fast()  # last: Dynamo cannot trace it
    )


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().view(-1) if tensor.is_contiguous() else tensor.detach().flatten()
    return flat[:: max(1, flat.shape[0] // _SAMPLED_ELEMENTS)]
