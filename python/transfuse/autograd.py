"""What the ops' gradients share: whether one is wanted, and refusals in words of what the kernels cannot derive.

An op's Function (ops/<op>.py) stands outside its raw op and is entered only when ``wants_grad``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_REFERENCE_HAS = "run under transfuse.use_backend('reference'), which has"


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be asked of a result of these tensors."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            return True
    return torch._C._are_functorch_transforms_active()  # a tensor under vmap does not tell


def distinct(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The same tensors; under torch.compile a repeated one as a view, since Dynamo's autograd.Function takes none twice."""
    if not torch.compiler.is_compiling():
        return tensors
    result = []
    for i, tensor in enumerate(tensors):
        repeated = tensor is not None and any(tensor is other for other in tensors[:i])
        result.append(tensor.view_as(tensor) if repeated else tensor)
    return tuple(result)


def _backend(kind: str, tensor: Tensor) -> str:
    """The backend's name for the user: compiled kernels are called by their device, as in dispatch."""
    return kind if kind == "triton" else tensor.device.type


def refuse_tangents(op: str, kind: str, *tensors: Tensor | None) -> None:
    """RuntimeError under forward mode (jvp): a raw op would let it pass with tangents of 0.

    Args:
        kind: of kernel, "compiled" or "triton": whose backend the words name.
    """
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            backend = _backend(kind, tensor)
            raise RuntimeError(f"{op}: the {backend} backend has no forward-mode derivative; {_REFERENCE_HAS}")


def first_derivative(op: str, kind: str, backward: Callable[..., Any], *arguments: Any) -> Any:
    """``backward(*arguments)``; under create_graph=True the same numbers, and a worded error for whoever derives them."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _FirstDerivative.apply(op, kind, backward, *arguments)
    return backward(*arguments)


class _FirstDerivative(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(op, kind, backward, *arguments):
        return backward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, ctx.kind = inputs[:2]

    @staticmethod
    def backward(ctx, *grads):
        backend = _backend(ctx.kind, next(grad for grad in grads if grad is not None))
        raise RuntimeError(f"{ctx.op}: the {backend} backend has no second derivative; {_REFERENCE_HAS}")
