"""rms_norm and add_rms_norm: the public functions, what runs them, and their gradient.

The sister of ops/layer_norm.py, with neither mean nor bias. The arithmetic is kernels/cpu/rms_norm.cpp,
kernels/cuda/rms_norm.cu and kernels/triton/rms_norm.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from transfuse import dispatch
from transfuse.autograd import distinct, first_derivative, refuse_tangents, wants_grad
from transfuse.dispatch import Implementation, cpu_reasons, cuda_reasons, supports_all, triton_reasons
from transfuse.ops.norm_checks import autocast, check_norm, check_residual
from transfuse.raw_ops import RAW_OPS, raw_op
from transfuse.reference.rms_norm import add_rms_norm_reference, default_eps, rms_norm_reference


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """``input / sqrt(mean(input * input) + eps) * weight``; the mean over the last dimensions.

        y = transfuse.rms_norm(x, (4096,), norm.weight, 1e-5)      # as torch.nn.functional.rms_norm

    Args:
        input: [..., *normalized_shape], floating dtype, any strides.
        normalized_shape: sizes of the last dimensions; at least one.
        weight: [*normalized_shape], input's dtype or a narrower one, or float32 beside a 16-bit input; None is 1.
        eps: added to the mean, inside the root. None is torch's: finfo(float64).eps for a float64 input, else
            finfo(float32).eps.
    Returns:
        Contiguous tensor of input's shape and dtype. Differentiable once (the reference backend: any number of times).
    Numerics:
        The mean is summed in float64 over short float32 sums, all in float64 for rows that need it; in the backward too.
        float32: within 2 ULP of max(|weight * xhat|, 1) for |input|
        from subnormals to 1e37; 16-bit types: one rounding of a float32 result; float64: within 5 ULP of the same
        measure, for |input| to 1e300. A row of zeros gives zeros (NaN with eps=0, as 0/0 is); a row with NaN gives NaN;
        in a row with an infinity that element is NaN and the others 0, as in torch. A row's bits do not depend on the
        batch, on its position or on the number of threads; the gradient of weight is a sum over rows in one fixed
        order, the same for every number of threads.
        Autocast runs it in float32 on a GPU and leaves it alone on the CPU, as it does with torch's.
    Raises:
        TypeError: an argument of the wrong type or dtype. ValueError: a wrong shape or eps. RuntimeError: weight on
        another device; a second or forward-mode derivative of a compiled kernel (the reference backend has both).
    Source:
        Zhang, Sennrich: Root Mean Square Layer Normalization, 2019, https://arxiv.org/abs/1910.07467
    """
    op = "rms_norm"
    weight, ndim, eps = _check(op, input, normalized_shape, weight, eps)
    input, weight = autocast(input, weight)
    chosen = dispatch.select(op, IMPLEMENTATIONS, _key(input), lambda: _problem(op, input, weight))
    return chosen.run(input, weight, ndim, eps)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``sum = dropout(input) + residual`` and the rms_norm of it, in one pass over memory.

        y, x = transfuse.add_rms_norm(attention_output, x, (4096,), norm.weight, 1e-5)

    Args:
        input, residual: [..., *normalized_shape], the same shape; of two dtypes the wider one, as ``+`` takes it.
        normalized_shape, weight, eps: as in rms_norm.
        dropout_p: probability of dropping an element of ``input``, in effect whenever it is not 0, as in
            scaled_dot_product_attention. Today torch's own dropout runs in front of the fused op.
    Returns:
        (output, sum), both differentiable. ``sum`` is rounded to the dtype, and it is the rounded sum that is
        normalised: exactly the two steps ``sum = input + residual; output = rms_norm(sum)``.
    Numerics, Raises, Source:
        As rms_norm. ValueError also for dropout_p outside 0..1.
    """
    op = "add_rms_norm"
    input, residual = check_residual(op, input, residual, dropout_p)
    weight, ndim, eps = _check(op, input, normalized_shape, weight, eps)
    input, residual, weight = autocast(input, residual, weight)
    if dropout_p > 0.0:
        input = torch.nn.functional.dropout(input, dropout_p)
    chosen = dispatch.select(op, ADD_IMPLEMENTATIONS, _key(input), lambda: _problem(op, input, weight, residual))
    return chosen.run(input, residual, weight, ndim, eps)


def _check(op, input, normalized_shape, weight, eps) -> tuple[Tensor | None, int, float]:
    """Refuses what is not valid; returns weight in a dtype the kernels take, the normalised dimensions and eps."""
    tensors = isinstance(input, Tensor) and isinstance(weight, Tensor)
    if tensors and weight.is_floating_point() and weight.dtype.itemsize < input.dtype.itemsize:
        weight = weight.to(input.dtype)  # exactly; torch's rms_norm takes such a weight, unlike its layer_norm
    ndim = check_norm(op, input, normalized_shape, weight, None, 0.0 if eps is None else eps)
    return weight, ndim, default_eps(input.dtype) if eps is None else eps


# ---- what runs it ----


@dataclass(frozen=True)
class RMSNormProblem(dispatch.Problem):
    """What a backend decides on."""

    parameter_dtype: torch.dtype | None


def _problem(op, input, weight, residual=None) -> RMSNormProblem:
    parameter_dtype = None if weight is None else weight.dtype
    return RMSNormProblem(op, str(input.device), input.dtype, wants_grad(input, residual, weight), parameter_dtype)


def _key(input: Tensor) -> tuple:
    return input.device, input.dtype


def _run_kernels(kind, input, weight, ndim, eps):
    refuse_tangents("rms_norm", kind, input, weight)
    if wants_grad(input, weight):
        return RMSNormFunction.apply(*distinct(input, weight), ndim, eps, kind)
    return RAW_OPS[kind]["rms_norm_forward"](input, weight, ndim, eps)


def _run_torch(input, weight, ndim, eps):
    return torch.nn.functional.rms_norm(input, input.shape[-ndim:], weight, eps)


def _run_reference(input, weight, ndim, eps):
    return rms_norm_reference(input, input.shape[-ndim:], weight, eps)


def _add_kernels(kind, input, residual, weight, ndim, eps):
    refuse_tangents("add_rms_norm", kind, input, residual, weight)
    if wants_grad(input, residual, weight):
        return AddRMSNormFunction.apply(*distinct(input, residual, weight), ndim, eps, kind)
    return RAW_OPS[kind]["add_rms_norm_forward"](input, residual, weight, ndim, eps)


def _add_torch(input, residual, weight, ndim, eps):
    total = input + residual
    return _run_torch(total, weight, ndim, eps), total


def _add_reference(input, residual, weight, ndim, eps):
    return add_rms_norm_reference(input, residual, input.shape[-ndim:], weight, eps)


IMPLEMENTATIONS = (
    Implementation("cuda", cuda_reasons, partial(_run_kernels, "compiled")),
    Implementation("triton", triton_reasons, partial(_run_kernels, "triton"), automatic="cuda"),
    Implementation("cpu", cpu_reasons, partial(_run_kernels, "compiled")),
    Implementation("torch", supports_all, _run_torch, automatic=False),
    Implementation("reference", supports_all, _run_reference),
)
ADD_IMPLEMENTATIONS = (
    Implementation("cuda", cuda_reasons, partial(_add_kernels, "compiled")),
    Implementation("triton", triton_reasons, partial(_add_kernels, "triton"), automatic="cuda"),
    Implementation("cpu", cpu_reasons, partial(_add_kernels, "compiled")),
    Implementation("torch", supports_all, _add_torch, automatic=False),
    Implementation("reference", supports_all, _add_reference),
)


def _explain_rms_norm(input, normalized_shape, weight=None, eps=None):
    op = "rms_norm"
    weight, _, _ = _check(op, input, normalized_shape, weight, eps)
    return op, IMPLEMENTATIONS, _problem(op, *autocast(input, weight))


def _explain_add_rms_norm(input, residual, normalized_shape, weight=None, eps=None, *, dropout_p=0.0):
    op = "add_rms_norm"
    input, residual = check_residual(op, input, residual, dropout_p)
    weight, _, _ = _check(op, input, normalized_shape, weight, eps)
    return op, ADD_IMPLEMENTATIONS, _problem(op, *autocast(input, weight, residual))


rms_norm.explain_problem = _explain_rms_norm
add_rms_norm.explain_problem = _explain_add_rms_norm


# ---- autograd: outside the raw ops, entered only when a gradient is wanted ----


class RMSNormFunction(torch.autograd.Function):
    """rms_norm with its gradient, which takes the mean of squares anew instead of saving it rounded."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input, weight, ndim, eps, kind):
        return RAW_OPS[kind]["rms_norm_forward"](input, weight, ndim, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, ctx.ndim, ctx.eps, ctx.kind = inputs
        ctx.save_for_backward(input, weight)

    @staticmethod
    def backward(ctx, grad_output):
        wanted = ctx.needs_input_grad[:2]
        return (*_gradients("rms_norm", ctx, grad_output, None, wanted), None, None, None)


class AddRMSNormFunction(torch.autograd.Function):
    """add_rms_norm with its gradient: that of the norm of ``sum``, plus what reaches ``sum`` past the norm."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input, residual, weight, ndim, eps, kind):
        return RAW_OPS[kind]["add_rms_norm_forward"](input, residual, weight, ndim, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, weight, ctx.ndim, ctx.eps, ctx.kind = inputs
        ctx.save_for_backward(output[1], weight)
        ctx.set_materialize_grads(False)  # an output that is not used costs no pass over zeros

    @staticmethod
    def backward(ctx, grad_output, grad_sum):
        if grad_output is None:
            return grad_sum, grad_sum, None, None, None, None
        needs_input, needs_residual, needs_weight = ctx.needs_input_grad[:3]
        wanted = (needs_input or needs_residual, needs_weight)
        grad, grad_weight = _gradients("add_rms_norm", ctx, grad_output, grad_sum, wanted)
        return grad, grad, grad_weight, None, None, None


def _gradients(op, ctx, grad_output, grad_sum, wanted):
    """Gradients of what was normalised and of weight; None where not wanted."""
    x, weight = ctx.saved_tensors
    backward = RAW_OPS[ctx.kind]["rms_norm_backward"]
    grads = first_derivative(op, ctx.kind, backward, grad_output, grad_sum, x, weight, ctx.ndim, ctx.eps, *wanted)
    return tuple(grad if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True))


# ---- raw ops: csrc/rms_norm.cpp, csrc/cuda_rms_norm.cpp, kernels/triton/rms_norm.py ----
# What is declared with them: shapes and dtypes without data.


@raw_op("rms_norm", "rms_norm_forward(Tensor input, Tensor? weight, int normalized_ndim, float eps) -> Tensor")
def _(input, weight, normalized_ndim, eps):
    return input.new_empty(input.shape)


@raw_op(
    "rms_norm",
    "add_rms_norm_forward(Tensor input, Tensor residual, Tensor? weight, int normalized_ndim, float eps)"
    " -> (Tensor, Tensor)",
)
def _(input, residual, weight, normalized_ndim, eps):
    return input.new_empty(input.shape), input.new_empty(input.shape)


@raw_op(
    "rms_norm",
    "rms_norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor input, Tensor? weight, int normalized_ndim,"
    " float eps, bool need_input, bool need_weight) -> (Tensor, Tensor)",
)
def _(grad_output, grad_sum, input, weight, normalized_ndim, eps, need_input, need_weight):
    dtype = torch.float32 if weight is None else weight.dtype
    shape = input.shape[input.dim() - normalized_ndim :] if need_weight else (0,)
    return input.new_empty(input.shape if need_input else (0,)), input.new_empty(shape, dtype=dtype)
