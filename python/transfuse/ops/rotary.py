"""rotary: position embedding by rotation of pairs of columns. The arithmetic is kernels/cpu/rotary.cpp,
kernels/cuda/rotary.cu and kernels/triton/rotary.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from transfuse import dispatch
from transfuse.autograd import distinct, first_derivative, refuse_tangents, wants_grad
from transfuse.checks import check_flag, check_tensor
from transfuse.dispatch import Implementation, cpu_reasons, cuda_reasons, dtype_name, supports_all, triton_reasons
from transfuse.raw_ops import RAW_OPS, raw_op
from transfuse.reference.rotary import rotary_reference

_OP = "rotary"


def rotary(input: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """``(a, b) -> (a * cos - b * sin, b * cos + a * sin)`` for each of the R/2 pairs of the leading R columns.

        cos, sin = angles.cos(), angles.sin()                     # [L, R/2]
        query, key = transfuse.rotary(query, cos, sin), transfuse.rotary(key, cos, sin)

    Args:
        input: [..., L, D], usually [B, H, L, D]; floating dtype, any strides. Up to four dimensions it is never
            copied first, so the usual view of [B, L, H, D] memory costs nothing.
        cos, sin: [L, R/2], or [B, L, R/2] where B is input's first dimension or 1; input's dtype, or float32 beside a
            16-bit input. R <= D: the leading R columns are rotated, the others are copied.
        interleaved: pairs are columns (2i, 2i + 1), as in GPT-J; else (i, i + R/2), as in LLaMA and GPT-NeoX.
    Returns:
        Dense tensor of input's shape and dtype. Where the heads of one token lie together in input, they do in the
        result. Differentiable any number of times with respect to input, once with respect to cos and sin (the
        reference backend: any number of times).
    Numerics:
        float32 and 16-bit: products and sums in float64, one rounding: within 0.5 ULP of the exact result plus
        2^-53 * max(|a * cos|, |b * sin|), so cancellation costs nothing. float64: within 1.5 ULP of
        max(|a * cos|, |b * sin|, |result|). The gradient of cos and sin sums over the heads, and over the batch where
        it shares one table, in float64 in one fixed order. Bits do not depend on batch, position or number of threads.
        Autocast leaves it alone: the result has input's dtype.
    Raises:
        TypeError: an argument of the wrong type or dtype. ValueError: a wrong shape. RuntimeError: cos or sin on
        another device; a forward-mode derivative, or a second one through cos or sin, of a compiled kernel.
    Source:
        Su et al.: RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021, https://arxiv.org/abs/2104.09864
    """
    _check(input, cos, sin, interleaved)
    chosen = dispatch.select(_OP, IMPLEMENTATIONS, (input.device, input.dtype), lambda: _problem(input, cos, sin))
    return chosen.run(input, cos, sin, interleaved)


def _check(input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    for name, tensor in (("input", input), ("cos", cos), ("sin", sin)):
        check_tensor(_OP, name, tensor)
    if not input.is_floating_point():
        raise TypeError(f"{_OP}: input has dtype {dtype_name(input.dtype)}, expected a floating dtype")
    if input.dim() < 2:
        raise ValueError(f"{_OP}: input has shape {tuple(input.shape)}, expected (..., L, D)")
    if cos.dtype != input.dtype and not (cos.dtype == torch.float32 and input.dtype in (torch.bfloat16, torch.float16)):
        raise TypeError(f"{_OP}: cos has dtype {dtype_name(cos.dtype)}, expected {dtype_name(input.dtype)} (input's)")
    if sin.dtype != cos.dtype:
        raise TypeError(f"{_OP}: sin has dtype {dtype_name(sin.dtype)}, expected {dtype_name(cos.dtype)} (cos's)")
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor.device != input.device:
            raise RuntimeError(f"{_OP}: {name} is on {tensor.device}, expected {input.device} (input's)")
    length, head_dim = input.shape[-2:]
    fits = cos.dim() == 2 or cos.dim() == 3 and input.dim() >= 3 and cos.shape[0] in (1, input.shape[0])
    if not fits or cos.shape[-2] != length:
        batched = f" or ({input.shape[0]}, {length}, R/2)" if input.dim() >= 3 else ""
        raise ValueError(f"{_OP}: cos has shape {tuple(cos.shape)}, expected ({length}, R/2){batched}")
    if 2 * cos.shape[-1] > head_dim:
        half = head_dim // 2
        raise ValueError(f"{_OP}: cos has {cos.shape[-1]} columns, expected at most {half} (half of input's head_dim)")
    if sin.shape != cos.shape:
        raise ValueError(f"{_OP}: sin has shape {tuple(sin.shape)}, expected {tuple(cos.shape)} (cos's)")
    check_flag(_OP, "interleaved", interleaved)


# ---- what runs it ----


@dataclass(frozen=True)
class RotaryProblem(dispatch.Problem):
    """What a backend decides on."""

    input_shape: tuple[int, ...]
    table_shape: tuple[int, ...]
    table_dtype: torch.dtype


def _problem(input: Tensor, cos: Tensor, sin: Tensor) -> RotaryProblem:
    requires_grad = wants_grad(input, cos, sin)
    return RotaryProblem(
        _OP, str(input.device), input.dtype, requires_grad, tuple(input.shape), tuple(cos.shape), cos.dtype
    )


def _run_kernels(kind, input, cos, sin, interleaved):
    refuse_tangents(_OP, kind, input, cos, sin)
    shape = input.shape
    if len(shape) != 4:
        input = input.unsqueeze(-3) if len(shape) < 4 else input.flatten(1, -3)
        input = input.unsqueeze(0) if len(shape) == 2 else input
    if wants_grad(input, cos, sin):
        output = RotaryFunction.apply(*distinct(input, cos, sin), interleaved, False, kind)
    else:
        output = RAW_OPS[kind]["rotary_forward"](input, cos, sin, interleaved, False)
    return output if len(shape) == 4 else output.reshape(shape)


def _run_reference(input, cos, sin, interleaved):
    return rotary_reference(input, cos, sin, interleaved=interleaved)


IMPLEMENTATIONS = (
    Implementation("cuda", cuda_reasons, partial(_run_kernels, "compiled")),
    Implementation("triton", triton_reasons, partial(_run_kernels, "triton"), automatic="cuda"),
    Implementation("cpu", cpu_reasons, partial(_run_kernels, "compiled")),
    Implementation("reference", supports_all, _run_reference),
)


def _explain(input, cos, sin, *, interleaved=False):
    _check(input, cos, sin, interleaved)
    return _OP, IMPLEMENTATIONS, _problem(input, cos, sin)


rotary.explain_problem = _explain


# ---- autograd: outside the raw op, entered only when a gradient is wanted ----


class RotaryFunction(torch.autograd.Function):
    """A rotation, whose gradient is the rotation by the negative angle. Input is kept for the tables' gradient alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input, cos, sin, interleaved, inverse, kind):
        return RAW_OPS[kind]["rotary_forward"](input, cos, sin, interleaved, inverse)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, cos, sin, ctx.interleaved, ctx.inverse, ctx.kind = inputs
        ctx.save_for_backward(input if any(ctx.needs_input_grad[1:3]) else None, cos, sin)

    @staticmethod
    def backward(ctx, grad_output):
        input, cos, sin = ctx.saved_tensors
        grad_input = grad_cos = grad_sin = None
        if ctx.needs_input_grad[0]:
            grad_input = RotaryFunction.apply(grad_output, cos, sin, ctx.interleaved, not ctx.inverse, ctx.kind)
        if input is not None:
            arguments = (grad_output, input, cos, ctx.interleaved, ctx.inverse)
            grad_cos, grad_sin = first_derivative(_OP, ctx.kind, RAW_OPS[ctx.kind]["rotary_backward"], *arguments)
        return grad_input, grad_cos, grad_sin, None, None, None


# ---- raw ops: csrc/rotary.cpp, csrc/cuda_rotary.cpp, kernels/triton/rotary.py ----
# What is declared with them: shapes, dtypes and layout without data.


@raw_op("rotary", "rotary_forward(Tensor input, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor")
def _(input, cos, sin, interleaved, inverse):
    batch, heads, length, head_dim = input.shape
    if input.stride(1) < input.stride(2):
        return input.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    return input.new_empty(batch, heads, length, head_dim)


@raw_op(
    "rotary",
    "rotary_backward(Tensor grad_output, Tensor input, Tensor cos, bool interleaved, bool inverse)"
    " -> (Tensor grad_cos, Tensor grad_sin)",
)
def _(grad_output, input, cos, interleaved, inverse):
    return cos.new_empty(cos.shape), cos.new_empty(cos.shape)
