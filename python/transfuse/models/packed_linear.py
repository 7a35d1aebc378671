"""Linear layers whose weights are kept a second time, in the layout that oneDNN multiplies fastest on this CPU.

    packed = packed_for(encoder, groups, dtype)            # made at the first call, made again when a weight changed
    query_key_value = packed.products[0](hidden)           # one product for the layers of the first group

A packed copy belongs to no module, so state_dict, pickle and deepcopy know nothing of it. It holds as long as every
weight is the same tensor at the same version with the same 64 sampled elements: an edit through ``.data`` changes
neither of the first two, and ``transfuse.repack`` is for edits that the sample misses.

oneDNN gives a row the same bits whatever the number of rows beside it, but for a single row, which runs as two.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfuse.nn.hooks import unhooked

Group = tuple[nn.Linear, ...]  # layers of one input: a single product computes them all

_SAMPLED_ELEMENTS = 64
_ROWS_HINT = 1024  # the number of rows that oneDNN chooses the layout for
_DTYPES = (torch.float32, torch.bfloat16)


class Product:
    """``F.linear`` with the weights of one group in ``dtype`` and its biases: rows [N, in] -> [N, sum of out]."""

    def __init__(self, group: Group, dtype: torch.dtype):
        weights = [layer.weight.detach().to(dtype) for layer in group]
        biases = [torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach() for layer in group]
        self.bias = torch.cat(biases) if any(layer.bias is not None for layer in group) else None
        self.weight = _reorder(torch.cat(weights) if len(weights) > 1 else weights[0].contiguous())

    def __call__(self, rows: Tensor, bias: bool = True) -> Tensor:
        """bias=False leaves the bias to a later pass."""
        added = self.bias if bias else None
        if rows.shape[0] == 1:
            return _multiply(rows.expand(2, -1).contiguous(), self.weight, added)[:1]
        return _multiply(rows, self.weight, added)


class PackedLinears:
    """The products of some groups of layers, and what their weights looked like when they were packed."""

    def __init__(self, groups: Sequence[Group], dtype: torch.dtype):
        self.dtype = dtype
        self.products = [Product(group, dtype) for group in groups]
        tensors = _tensors(groups)
        self.states = [(tensor._version, tensor.data_ptr()) for tensor in tensors]
        self.samples = [_sample(tensor) for tensor in tensors]  # views: they show a later edit
        self.sampled = torch.cat(self.samples)

    def fits(self, groups: Sequence[Group], dtype: torch.dtype) -> bool:
        """Whether the groups still hold what was packed."""
        return (
            dtype == self.dtype
            and [(tensor._version, tensor.data_ptr()) for tensor in _tensors(groups)] == self.states
            and torch.equal(torch.cat(self.samples), self.sampled)
        )


_packed: WeakKeyDictionary[nn.Module, PackedLinears] = WeakKeyDictionary()


def packed_for(owner: nn.Module, groups: Sequence[Group], dtype: torch.dtype) -> PackedLinears:
    """The packed copy that ``owner`` answers for; ``may_pack`` has said yes to every layer."""
    packed = _packed.get(owner)
    if packed is None or not packed.fits(groups, dtype):
        packed = _packed[owner] = PackedLinears(groups, dtype)
    return packed


def forget(model: nn.Module) -> None:
    """Frees the packed copies of a module and of all within."""
    for module in model.modules():
        _packed.pop(module, None)


def packed_bytes(model: nn.Module) -> int:
    """Memory that the packed copies of a module and of all within take."""
    found = (_packed.get(module) for module in model.modules())
    return sum(
        tensor.numel() * tensor.element_size()
        for packed in found if packed is not None
        for product in packed.products
        for tensor in (product.weight, product.bias) if tensor is not None
    )


def inference_on_cpu(input: Tensor) -> bool:
    """Whether a call with this input may use packed weights at all: no gradient, no tracing, no autocast."""
    return (
        _available
        and input.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
    )


def may_pack(layer: nn.Module) -> bool:
    """Whether this is a plain linear layer in eval mode that nobody listens to."""
    return (
        type(layer) is nn.Linear
        and not layer.training
        and layer.weight.dtype in _DTYPES
        and layer.weight.device.type == "cpu"
        and type(layer.weight) is nn.Parameter
        and unhooked(layer)
    )


def _tensors(groups: Sequence[Group]) -> list[Tensor]:
    layers = (layer for group in groups for layer in group)
    return [tensor for layer in layers for tensor in (layer.weight, layer.bias) if tensor is not None]


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().view(-1) if tensor.is_contiguous() else tensor.detach().flatten()
    return flat[:: max(1, flat.shape[0] // _SAMPLED_ELEMENTS)]


def _reorder(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def _has_packed_products() -> bool:
    """Both operators are private to torch: they are used where they are there and compute what F.linear computes."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        rows, weight = torch.eye(3, 5), torch.arange(20.0).view(4, 5)
        return torch.equal(_multiply(rows, _reorder(weight), None), F.linear(rows, weight))
    except (AttributeError, RuntimeError, TypeError):
        return False


_available = _has_packed_products()
