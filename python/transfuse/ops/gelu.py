"""gelu: the public function, what runs it, and its gradient. The arithmetic is kernels/cpu/gelu.cpp,
kernels/cuda/gelu.cu and kernels/triton/gelu.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from transfuse import dispatch
from transfuse.autograd import distinct, first_derivative, refuse_tangents, wants_grad
from transfuse.checks import check_tensor
from transfuse.dispatch import Implementation, cpu_reasons, cuda_reasons, dtype_name, supports_all, triton_reasons
from transfuse.raw_ops import RAW_OPS, raw_op
from transfuse.reference.gelu import gelu_reference


def gelu(input: Tensor, approximate: str = "none", *, bias: Tensor | None = None) -> Tensor:
    """``x * Phi(x)``, x = input + bias, Phi the normal distribution function or its tanh approximation.

        y = transfuse.gelu(x)                                  # as torch.nn.functional.gelu
        y = transfuse.gelu(x @ w.T, bias=b)                    # the bias of a linear layer, without a pass of its own

    Args:
        input: any shape, floating dtype, any strides.
        approximate: "none", or "tanh" for Phi(x) = sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)).
        bias: [last dimension], input's dtype, or float32 beside a 16-bit input. input + bias is rounded to input's dtype
            before anything else, so that fused equals the two steps.
    Returns:
        Contiguous tensor of input's shape and dtype. Differentiable once (the reference backend: any number of times).
    Numerics:
        float32 throughout: polynomials on segments, beyond them an exponential whose argument is carried in two floats.
        float32: within 3 ULP for every input (1.8 were seen), to the last subnormal of the negative tail; gelu(-inf) =
        -0, gelu(inf) = inf, NaN stays. Its gradient within 4 ULP (2.6 were seen), 1e-7 absolute around its root
        -0.75179, and finite for every finite input. bfloat16 and float16: every one of the 65,536 inputs correctly
        rounded; on the CPU from a table filled in float64, and its gradient is grad_output times the slope in float32,
        correctly rounded for grad_output = 1. float64: within 4 ULP, forward and backward, around the root too. The
        gradient of bias is summed in float64, on a GPU in float32, in an order that depends on the number of rows alone.
    Raises:
        TypeError: an argument of the wrong type or dtype. ValueError: a wrong shape, another ``approximate``. RuntimeError:
        bias on another device; a second or forward-mode derivative of a compiled kernel.
    Source:
        Hendrycks, Gimpel: Gaussian Error Linear Units, 2016, https://arxiv.org/abs/1606.08415
    """
    _check(input, approximate, bias)
    chosen = dispatch.select("gelu", IMPLEMENTATIONS, _key(input), lambda: _problem(input, bias))
    return chosen.run(input, bias, approximate == "tanh")


def _check(input: Tensor, approximate: str, bias: Tensor | None) -> None:
    check_tensor("gelu", "input", input)
    if not input.is_floating_point():
        raise TypeError(f"gelu: input has dtype {dtype_name(input.dtype)}, expected a floating dtype")
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate is {approximate!r}, expected 'none' or 'tanh'")
    if bias is None:
        return
    check_tensor("gelu", "bias", bias, "a Tensor or None")
    if input.dim() == 0:
        raise ValueError("gelu: input has shape (), expected at least one dimension to add bias to")
    if tuple(bias.shape) != (input.shape[-1],):
        raise ValueError(f"gelu: bias has shape {tuple(bias.shape)}, expected ({input.shape[-1]},) (input's last dimension)")
    if bias.dtype != input.dtype and not (bias.dtype == torch.float32 and input.dtype in (torch.bfloat16, torch.float16)):
        raise TypeError(f"gelu: bias has dtype {dtype_name(bias.dtype)}, expected {dtype_name(input.dtype)} (input's)")
    if bias.device != input.device:
        raise RuntimeError(f"gelu: bias is on {bias.device}, expected {input.device} (input's)")


# ---- what runs it ----


@dataclass(frozen=True)
class GeluProblem(dispatch.Problem):
    """What a backend decides on."""

    bias_dtype: torch.dtype | None


def _problem(input: Tensor, bias: Tensor | None) -> GeluProblem:
    return GeluProblem("gelu", str(input.device), input.dtype, wants_grad(input, bias), None if bias is None else bias.dtype)


def _key(input: Tensor) -> tuple:
    return input.device, input.dtype


def _run_kernels(kind, input, bias, tanh):
    refuse_tangents("gelu", kind, input, bias)
    if wants_grad(input, bias):
        return GeluFunction.apply(*distinct(input, bias), tanh, kind)
    return RAW_OPS[kind]["gelu_forward"](input, bias, tanh)


def _run_torch(input, bias, tanh):
    x = input if bias is None else (input + bias).to(input.dtype)
    return torch.nn.functional.gelu(x, approximate="tanh" if tanh else "none")


def _run_reference(input, bias, tanh):
    return gelu_reference(input, "tanh" if tanh else "none", bias)


IMPLEMENTATIONS = (
    Implementation("cuda", cuda_reasons, partial(_run_kernels, "compiled")),
    Implementation("triton", triton_reasons, partial(_run_kernels, "triton"), automatic="cuda"),
    Implementation("cpu", cpu_reasons, partial(_run_kernels, "compiled")),
    Implementation("torch", supports_all, _run_torch, automatic=False),
    Implementation("reference", supports_all, _run_reference),
)


def _explain(input, approximate="none", *, bias=None):
    _check(input, approximate, bias)
    return "gelu", IMPLEMENTATIONS, _problem(input, bias)


gelu.explain_problem = _explain


# ---- autograd: outside the raw op, entered only when a gradient is wanted ----


class GeluFunction(torch.autograd.Function):
    """gelu with its gradient. Saves the input and the bias; nothing of the forward is worth keeping."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input, bias, tanh, kind):
        return RAW_OPS[kind]["gelu_forward"](input, bias, tanh)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, bias, ctx.tanh, ctx.kind = inputs
        ctx.save_for_backward(input, bias)

    @staticmethod
    def backward(ctx, grad_output):
        input, bias = ctx.saved_tensors
        needs_input, needs_bias = ctx.needs_input_grad[:2]
        arguments = (grad_output, input, bias, ctx.tanh, needs_bias)
        grad_input, grad_bias = first_derivative("gelu", ctx.kind, RAW_OPS[ctx.kind]["gelu_backward"], *arguments)
        return grad_input if needs_input else None, grad_bias if needs_bias else None, None, None


# ---- raw ops: csrc/gelu.cpp, csrc/cuda_gelu.cpp, kernels/triton/gelu.py; shapes and dtypes without data ----


@raw_op("gelu", "gelu_forward(Tensor input, Tensor? bias, bool tanh) -> Tensor")
def _(input, bias, tanh):
    return input.new_empty(input.shape)


@raw_op(
    "gelu",
    "gelu_backward(Tensor grad_output, Tensor input, Tensor? bias, bool tanh, bool need_bias_grad)"
    " -> (Tensor grad_input, Tensor grad_bias)",
)
def _(grad_output, input, bias, tanh, need_bias_grad):
    like = input if bias is None else bias
    return input.new_empty(input.shape), like.new_empty(bias.shape if need_bias_grad else (0,))
