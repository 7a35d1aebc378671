"""layer_norm and add_layer_norm: the public functions, what runs them, and their gradient.

The page of an op has five parts, and this is the shortest one to learn them from: the functions with their contract;
the checks (here in norm_checks.py, shared with rms_norm); the Problem and IMPLEMENTATIONS, most wanted first; autograd,
outside the raw op; and the raw ops, with the fake kernels that let torch.compile and torch.export see through it. The arithmetic is
kernels/cpu/layer_norm.cpp, kernels/cuda/layer_norm.cu and kernels/triton/layer_norm.py.
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
from transfuse.reference.layer_norm import add_layer_norm_reference, layer_norm_reference


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``(input - mean) / sqrt(variance + eps) * weight + bias``; mean and variance over the last dimensions.

        y = transfuse.layer_norm(x, (768,), norm.weight, norm.bias)      # as torch.nn.functional.layer_norm

    Args:
        input: [..., *normalized_shape], floating dtype, any strides.
        normalized_shape: sizes of the last dimensions; at least one.
        weight: [*normalized_shape], input's dtype, or float32 beside a 16-bit input; None is 1.
        bias: [*normalized_shape], weight's dtype; None is 0.
        eps: added to the variance, inside the root.
    Returns:
        Contiguous tensor of input's shape and dtype. Differentiable once (the reference backend: any number of times).
    Numerics:
        Statistics summed in float64 over short float32 sums of deviations, all in float64 for rows that need it; in the
        backward too. float32: within 2 ULP of max(|weight * xhat|, |bias|, 1) for
        mean/std up to 1e6 and |input| from subnormals to 1e37; 16-bit types: one rounding of a float32 result;
        float64: within 5 ULP of the same measure, for |input| to 1e300. A constant row gives exactly ``bias`` (NaN with
        eps=0, as 0/0 is); a row with NaN or inf gives NaN. A row's bits do not depend on the batch, on its position or
        on the number of threads; the gradients of weight and bias are sums over rows in one fixed order, the same for
        every number of threads.
        Autocast runs it in float32 on a GPU and leaves it alone on the CPU, as it does with torch's.
    Raises:
        TypeError: an argument of the wrong type or dtype. ValueError: a wrong shape or eps. RuntimeError: weight or bias
        on another device; a second or forward-mode derivative of a compiled kernel (the reference backend has both).
    Source:
        Ba, Kiros, Hinton: Layer Normalization, 2016, https://arxiv.org/abs/1607.06450
    """
    op = "layer_norm"
    ndim = check_norm(op, input, normalized_shape, weight, bias, eps)
    input, weight, bias = autocast(input, weight, bias)
    chosen = dispatch.select(op, IMPLEMENTATIONS, _key(input), lambda: _problem(op, input, weight, bias))
    return chosen.run(input, weight, bias, ndim, eps)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``sum = dropout(input) + residual`` and the layer_norm of it, in one pass over memory.

        y, x = transfuse.add_layer_norm(attention_output, x, (768,), norm.weight, norm.bias)

    Args:
        input, residual: [..., *normalized_shape], the same shape; of two dtypes the wider one, as ``+`` takes it.
        normalized_shape, weight, bias, eps: as in layer_norm.
        dropout_p: probability of dropping an element of ``input``, in effect whenever it is not 0, as in
            scaled_dot_product_attention. Today torch's own dropout runs in front of the fused op.
    Returns:
        (output, sum), both differentiable. ``sum`` is rounded to the dtype, and it is the rounded sum that is
        normalised: exactly the two steps ``sum = input + residual; output = layer_norm(sum)``.
    Numerics, Raises, Source:
        As layer_norm. ValueError also for dropout_p outside 0..1.
    """
    op = "add_layer_norm"
    input, residual = check_residual(op, input, residual, dropout_p)
    ndim = check_norm(op, input, normalized_shape, weight, bias, eps)
    input, residual, weight, bias = autocast(input, residual, weight, bias)
    if dropout_p > 0.0:
        input = torch.nn.functional.dropout(input, dropout_p)
    chosen = dispatch.select(op, ADD_IMPLEMENTATIONS, _key(input), lambda: _problem(op, input, weight, bias, residual))
    return chosen.run(input, residual, weight, bias, ndim, eps)


# ---- what runs it ----


@dataclass(frozen=True)
class LayerNormProblem(dispatch.Problem):
    """What a backend decides on."""

    parameter_dtype: torch.dtype | None


def _problem(op, input, weight, bias, residual=None) -> LayerNormProblem:
    parameter = weight if weight is not None else bias
    parameter_dtype = None if parameter is None else parameter.dtype
    requires_grad = wants_grad(input, residual, weight, bias)
    return LayerNormProblem(op, str(input.device), input.dtype, requires_grad, parameter_dtype)


def _key(input: Tensor) -> tuple:
    return input.device, input.dtype


def _run_kernels(kind, input, weight, bias, ndim, eps):
    refuse_tangents("layer_norm", kind, input, weight, bias)
    if wants_grad(input, weight, bias):
        return LayerNormFunction.apply(*distinct(input, weight, bias), ndim, eps, kind)
    return RAW_OPS[kind]["layer_norm_forward"](input, weight, bias, ndim, eps)


def _run_torch(input, weight, bias, ndim, eps):
    return torch.nn.functional.layer_norm(input, input.shape[-ndim:], weight, bias, eps)


def _run_reference(input, weight, bias, ndim, eps):
    return layer_norm_reference(input, input.shape[-ndim:], weight, bias, eps)


def _add_kernels(kind, input, residual, weight, bias, ndim, eps):
    refuse_tangents("add_layer_norm", kind, input, residual, weight, bias)
    if wants_grad(input, residual, weight, bias):
        return AddLayerNormFunction.apply(*distinct(input, residual, weight, bias), ndim, eps, kind)
    return RAW_OPS[kind]["add_layer_norm_forward"](input, residual, weight, bias, ndim, eps)


def _add_torch(input, residual, weight, bias, ndim, eps):
    total = input + residual
    return _run_torch(total, weight, bias, ndim, eps), total


def _add_reference(input, residual, weight, bias, ndim, eps):
    return add_layer_norm_reference(input, residual, input.shape[-ndim:], weight, bias, eps)


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


def _explain_layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    op = "layer_norm"
    check_norm(op, input, normalized_shape, weight, bias, eps)
    return op, IMPLEMENTATIONS, _problem(op, *autocast(input, weight, bias))


def _explain_add_layer_norm(input, residual, normalized_shape, weight=None, bias=None, eps=1e-5, *, dropout_p=0.0):
    op = "add_layer_norm"
    input, residual = check_residual(op, input, residual, dropout_p)
    check_norm(op, input, normalized_shape, weight, bias, eps)
    return op, ADD_IMPLEMENTATIONS, _problem(op, *autocast(input, weight, bias, residual))


layer_norm.explain_problem = _explain_layer_norm
add_layer_norm.explain_problem = _explain_add_layer_norm


# ---- autograd: outside the raw ops, entered only when a gradient is wanted ----


class LayerNormFunction(torch.autograd.Function):
    """layer_norm with its gradient, which takes the statistics anew: saved in float32 they would lose mean/std 1e6."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input, weight, bias, ndim, eps, kind):
        return RAW_OPS[kind]["layer_norm_forward"](input, weight, bias, ndim, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, ctx.ndim, ctx.eps, ctx.kind = inputs
        ctx.save_for_backward(input, weight, bias)

    @staticmethod
    def backward(ctx, grad_output):
        wanted = ctx.needs_input_grad[:3]
        return (*_gradients("layer_norm", ctx, grad_output, None, wanted), None, None, None)


class AddLayerNormFunction(torch.autograd.Function):
    """add_layer_norm with its gradient: that of the norm of ``sum``, plus what reaches ``sum`` past the norm."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input, residual, weight, bias, ndim, eps, kind):
        return RAW_OPS[kind]["add_layer_norm_forward"](input, residual, weight, bias, ndim, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, weight, bias, ctx.ndim, ctx.eps, ctx.kind = inputs
        ctx.save_for_backward(output[1], weight, bias)
        ctx.set_materialize_grads(False)  # an output that is not used costs no pass over zeros

    @staticmethod
    def backward(ctx, grad_output, grad_sum):
        if grad_output is None:
            return grad_sum, grad_sum, None, None, None, None, None
        needs_input, needs_residual, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        wanted = (needs_input or needs_residual, needs_weight, needs_bias)
        grad, grad_weight, grad_bias = _gradients("add_layer_norm", ctx, grad_output, grad_sum, wanted)
        return grad, grad, grad_weight, grad_bias, None, None, None


def _gradients(op, ctx, grad_output, grad_sum, wanted):
    """Gradients of what was normalised, weight and bias; None where not wanted."""
    x, weight, bias = ctx.saved_tensors
    arguments = (grad_output, grad_sum, x, weight, bias, ctx.ndim, ctx.eps, *wanted)
    grads = first_derivative(op, ctx.kind, RAW_OPS[ctx.kind]["layer_norm_backward"], *arguments)
    return tuple(grad if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True))


# ---- raw ops: csrc/layer_norm.cpp, csrc/cuda_layer_norm.cpp, kernels/triton/layer_norm.py ----
# What is declared with them: shapes and dtypes without data.


@raw_op(
    "layer_norm",
    "layer_norm_forward(Tensor input, Tensor? weight, Tensor? bias, int normalized_ndim, float eps) -> Tensor",
)
def _(input, weight, bias, normalized_ndim, eps):
    return input.new_empty(input.shape)


@raw_op(
    "layer_norm",
    "add_layer_norm_forward(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, int normalized_ndim,"
    " float eps) -> (Tensor, Tensor)",
)
def _(input, residual, weight, bias, normalized_ndim, eps):
    return input.new_empty(input.shape), input.new_empty(input.shape)


@raw_op(
    "layer_norm",
    "layer_norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor input, Tensor? weight, Tensor? bias,"
    " int normalized_ndim, float eps, bool need_input, bool need_weight, bool need_bias)"
    " -> (Tensor, Tensor, Tensor)",
)
def _(grad_output, grad_sum, input, weight, bias, normalized_ndim, eps, need_input, need_weight, need_bias):
    parameter = weight if weight is not None else bias
    dtype = torch.float32 if parameter is None else parameter.dtype
    shape = input.shape[input.dim() - normalized_ndim :]
    grads = (input.new_empty(shape if needed else (0,), dtype=dtype) for needed in (need_weight, need_bias))
    return input.new_empty(input.shape if need_input else (0,)), *grads
