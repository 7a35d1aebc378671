"""What layer_norm and rms_norm refuse in the same words, and what autocast makes of their arguments.

Once, here; the raw ops check again only what could touch memory wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transfuse.checks import check_dropout, check_eps, check_tensor
from transfuse.dispatch import dtype_name

_16_BIT = (torch.bfloat16, torch.float16)


def check_norm(
    op: str, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> int:
    """Refuses what is not valid, in words; returns the number of normalised dimensions."""
    check_floating(op, "input", input)
    if not isinstance(normalized_shape, (tuple, list)):
        raise TypeError(f"{op}: normalized_shape is a {type(normalized_shape).__name__}, expected a tuple of ints")
    check_eps(op, eps)
    ndim, sizes = len(normalized_shape), tuple(normalized_shape)
    if ndim == 0:
        raise ValueError(f"{op}: normalized_shape is (), expected at least one dimension")
    if input.shape[-ndim:] != sizes:
        expected = f"(*, {', '.join(map(str, sizes))})"
        raise ValueError(f"{op}: input has shape {tuple(input.shape)}, expected {expected} (normalized_shape's)")
    if weight is not None:
        _check_parameter(op, "weight", weight, input, sizes)
    if bias is not None:
        _check_parameter(op, "bias", bias, input, sizes)
        if weight is not None and bias.dtype != weight.dtype:
            found, expected = dtype_name(bias.dtype), dtype_name(weight.dtype)
            raise TypeError(f"{op}: bias has dtype {found}, expected {expected} (weight's)")
    return ndim


def check_floating(op: str, argument: str, tensor: Tensor) -> None:
    check_tensor(op, argument, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {argument} has dtype {dtype_name(tensor.dtype)}, expected a floating dtype")


def _check_parameter(op: str, argument: str, parameter: Tensor, input: Tensor, sizes: tuple[int, ...]) -> None:
    check_tensor(op, argument, parameter, "a Tensor or None")
    if parameter.shape != sizes:
        raise ValueError(f"{op}: {argument} has shape {tuple(parameter.shape)}, expected {sizes} (normalized_shape)")
    if parameter.dtype != input.dtype and not (parameter.dtype == torch.float32 and input.dtype in _16_BIT):
        found, expected = dtype_name(parameter.dtype), dtype_name(input.dtype)
        raise TypeError(f"{op}: {argument} has dtype {found}, expected {expected} (input's)")
    if parameter.device != input.device:
        raise RuntimeError(f"{op}: {argument} is on {parameter.device}, expected {input.device} (input's)")


def check_residual(op: str, input: Tensor, residual: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Checks what an add_<norm> has more; returns both tensors in the wider of their dtypes."""
    check_floating(op, "input", input)
    check_floating(op, "residual", residual)
    if residual.shape != input.shape:
        expected = tuple(input.shape)
        raise ValueError(f"{op}: residual has shape {tuple(residual.shape)}, expected {expected} (input's)")
    if residual.device != input.device:
        raise RuntimeError(f"{op}: residual is on {residual.device}, expected {input.device} (input's)")
    check_dropout(op, dropout_p)
    if residual.dtype != input.dtype:
        dtype = torch.promote_types(input.dtype, residual.dtype)
        return input.to(dtype), residual.to(dtype)
    return input, residual


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """float32 where torch's autocast says so: the norms are on its list for GPUs and not on that for the CPU."""
    if tensors[0].is_cpu or tensors[0].is_meta or not torch.is_autocast_enabled(tensors[0].device.type):
        return tensors
    return tuple(t if t is None or t.dtype == torch.float64 else t.float() for t in tensors)
