"""masked_softmax: the public function, what runs it, and its gradient.

The arithmetic is kernels/cpu/masked_softmax.cpp, kernels/cuda/masked_softmax.cu and kernels/triton/masked_softmax.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from transfuse import dispatch
from transfuse.autograd import distinct, first_derivative, refuse_tangents, wants_grad
from transfuse.checks import check_alignment, check_flag, check_scale, check_tensor
from transfuse.dispatch import Implementation, cpu_reasons, cuda_reasons, dtype_name, supports_all, triton_reasons
from transfuse.raw_ops import RAW_OPS, raw_op
from transfuse.reference.masked_softmax import masked_softmax_reference


def masked_softmax(
    input: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float = 1.0,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    dim: int = -1,
) -> Tensor:
    """``softmax(scale * input + mask)`` over ``dim``; an excluded key weighs exactly 0.

        weights = transfuse.masked_softmax(query @ key.mT, keep[:, None, None, :], scale=head_dim**-0.5)

    Args:
        input: [..., queries, keys] (keys at ``dim``), floating dtype, any strides.
        mask: broadcastable to input, any strides. bool: True keeps, False excludes. Floating, of input's dtype or float32:
            added to the scaled input; -inf excludes, any other value is a number; may require grad.
        scale: factor of input.
        is_causal: query i sees keys j <= i + offset; ``dim`` is then one of the last two, the other one holds the queries.
        causal_alignment: "top_left", offset 0, or "bottom_right", offset keys - queries.
        dim: dimension of the keys.
    Returns:
        Tensor of input's shape and dtype. Differentiable once (the reference backend: any number of times).
    Numerics:
        float32: within 3 ULP per element at any logit size (Triton: 4), a row sums to 1 within 1e-6; a row of one valid key is exactly 1
        there; a row of none is 0, forward and backward. A NaN or +inf in a valid score, or -inf in all of them, gives NaN at
        the row's valid keys. bfloat16 and float16: one rounding of the float32 result. float64: within 4 ULP, a row sums to
        1 within 1e-14. Every row is computed alone, so its bits depend neither on the batch nor on threads; excluded keys at
        its end change none. The gradient of a mask is summed in float64, on a GPU in float32, in a fixed order. On a GPU autocast runs it in
        float32, on the CPU in input's dtype, as torch does.
    Raises:
        TypeError: an argument of the wrong type or dtype. ValueError: a wrong shape, dim, scale or alignment. RuntimeError:
        mask on another device; a second or forward-mode derivative of a compiled kernel.
    """
    _check(input, mask, scale, is_causal, causal_alignment, dim)
    input, mask = _autocast(input, mask)
    input, mask = _keys_last(input, mask, dim)
    chosen = dispatch.select("masked_softmax", IMPLEMENTATIONS, _key(input, mask), lambda: _problem(input, mask, is_causal))
    output = chosen.run(input, mask, float(scale), is_causal, causal_alignment == "bottom_right")
    return output if dim in (-1, output.dim() - 1) else output.transpose(dim, -1)


def _check(input, mask, scale, is_causal, causal_alignment, dim) -> None:
    check_tensor("masked_softmax", "input", input)
    if not input.is_floating_point():
        raise TypeError(f"masked_softmax: input has dtype {dtype_name(input.dtype)}, expected a floating dtype")
    if input.dim() == 0:
        raise ValueError("masked_softmax: input has shape (), expected at least one dimension")
    if not isinstance(dim, int):
        raise TypeError(f"masked_softmax: dim is a {type(dim).__name__}, expected an int")
    if not -input.dim() <= dim < input.dim():
        raise ValueError(f"masked_softmax: dim is {dim}, expected {-input.dim()} to {input.dim() - 1}")
    check_scale("masked_softmax", scale)
    check_flag("masked_softmax", "is_causal", is_causal)
    check_alignment("masked_softmax", causal_alignment)
    if is_causal and input.dim() < 2:
        raise ValueError(f"masked_softmax: input has shape {tuple(input.shape)}, expected [..., queries, keys] with is_causal")
    if is_causal and dim % input.dim() < input.dim() - 2:
        raise ValueError(f"masked_softmax: dim is {dim}, expected one of the last two dimensions with is_causal")
    if mask is not None:
        _check_mask(input, mask)


def _check_mask(input: Tensor, mask: Tensor) -> None:
    check_tensor("masked_softmax", "mask", mask, "a Tensor or None")
    if mask.dtype not in (torch.bool, input.dtype, torch.float32):
        expected = ", ".join(dict.fromkeys(("bool", "float32", dtype_name(input.dtype))))
        raise TypeError(f"masked_softmax: mask has dtype {dtype_name(mask.dtype)}, expected one of {expected}")
    extra = input.dim() - mask.dim()
    if extra < 0 or any(m not in (1, n) for m, n in zip(mask.shape, input.shape[extra:], strict=True)):
        raise ValueError(f"masked_softmax: mask has shape {tuple(mask.shape)}, expected one that broadcasts to "
                         f"{tuple(input.shape)} (input's)")
    if mask.device != input.device:
        raise RuntimeError(f"masked_softmax: mask is on {mask.device}, expected {input.device} (input's)")


def _autocast(input: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """float32 where torch's autocast says so: softmax is on its list for GPUs and not on that for the CPU."""
    device = input.device.type
    if device in ("cpu", "meta") or input.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return input, mask
    return input.float(), mask if mask is None or mask.dtype == torch.bool else mask.float()


def _keys_last(input: Tensor, mask: Tensor | None, dim: int) -> tuple[Tensor, Tensor | None]:
    """Views with keys in the last dimension; the mask with input's number of dimensions, broadcast ones of size 1."""
    if mask is not None and mask.dim() < input.dim():
        mask = mask[(None,) * (input.dim() - mask.dim())]
    if dim in (-1, input.dim() - 1):
        return input, mask
    return input.transpose(dim, -1), None if mask is None else mask.transpose(dim, -1)


# ---- what runs it ----


@dataclass(frozen=True)
class MaskedSoftmaxProblem(dispatch.Problem):
    """What a backend decides on."""

    mask_dtype: torch.dtype | None
    is_causal: bool


def _problem(input: Tensor, mask: Tensor | None, is_causal: bool) -> MaskedSoftmaxProblem:
    mask_dtype = None if mask is None else mask.dtype
    return MaskedSoftmaxProblem("masked_softmax", str(input.device), input.dtype, wants_grad(input, mask), mask_dtype, bool(is_causal))


def _key(input: Tensor, mask: Tensor | None) -> tuple:
    return input.device, input.dtype, None if mask is None else mask.dtype


def _run_kernels(kind, input, mask, scale, causal, bottom_right):
    refuse_tangents("masked_softmax", kind, input, mask)
    if wants_grad(input, mask):
        return MaskedSoftmaxFunction.apply(*distinct(input, mask), scale, causal, bottom_right, kind)
    return _forward(kind, input, mask, scale, causal, bottom_right)


def _forward(kind, input, mask, scale, causal, bottom_right):
    if mask is not None:
        mask = mask.expand(input.shape)
    return RAW_OPS[kind]["masked_softmax_forward"](input, mask, scale, causal, bottom_right)


def _run_torch(input, mask, scale, causal, bottom_right):
    scores = input * scale
    keep = None
    if mask is not None:
        keep = mask if mask.dtype == torch.bool else mask != -torch.inf
        scores = scores if mask.dtype == torch.bool else (scores + mask).to(input.dtype)
    if causal:
        queries, keys = input.shape[-2:]
        lower = torch.ones(queries, keys, dtype=torch.bool, device=input.device).tril(keys - queries if bottom_right else 0)
        keep = lower if keep is None else keep & lower
    if keep is None:
        return torch.softmax(scores, -1)
    weights = torch.softmax(scores.masked_fill(~keep, -torch.inf), -1)
    return weights.masked_fill(~keep, 0.0)


IMPLEMENTATIONS = (
    Implementation("cuda", cuda_reasons, partial(_run_kernels, "compiled")),
    Implementation("triton", triton_reasons, partial(_run_kernels, "triton"), automatic="cuda"),
    Implementation("cpu", cpu_reasons, partial(_run_kernels, "compiled")),
    Implementation("torch", supports_all, _run_torch, automatic=False),
    Implementation("reference", supports_all, masked_softmax_reference),
)


def _explain(input, mask=None, *, scale=1.0, is_causal=False, causal_alignment="top_left", dim=-1):
    _check(input, mask, scale, is_causal, causal_alignment, dim)
    return "masked_softmax", IMPLEMENTATIONS, _problem(*_autocast(input, mask), is_causal)


masked_softmax.explain_problem = _explain


# ---- autograd: outside the raw ops, entered only when a gradient is wanted ----


class MaskedSoftmaxFunction(torch.autograd.Function):
    """masked_softmax with its gradient, which needs the output alone, and the mask's shape for the mask's own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input, mask, scale, causal, bottom_right, kind):
        return _forward(kind, input, mask, scale, causal, bottom_right)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, mask, ctx.scale, _, _, ctx.kind = inputs
        ctx.save_for_backward(output, mask if ctx.needs_input_grad[1] else None)

    @staticmethod
    def backward(ctx, grad_output):
        output, mask = ctx.saved_tensors
        arguments = (ctx.kind, grad_output, output, mask, ctx.scale, ctx.needs_input_grad[0])
        return *first_derivative("masked_softmax", ctx.kind, _backward, *arguments), None, None, None, None


def _backward(kind, grad_output, output, mask, scale, needs_input):
    """Gradients of input and of an additive mask; None where not wanted."""
    grad_input = grad_mask = None
    if needs_input:
        grad_input = RAW_OPS[kind]["masked_softmax_backward"](grad_output, output, scale)
    if mask is not None:
        grad_mask = RAW_OPS[kind]["masked_softmax_mask_backward"](grad_output, output, mask).to(mask.dtype)
    return grad_input, grad_mask


# ---- raw ops: csrc/masked_softmax.cpp, csrc/cuda_masked_softmax.cpp, kernels/triton/masked_softmax.py ----
# What is declared with them: shapes and dtypes without data.


@raw_op(
    "masked_softmax",
    "masked_softmax_forward(Tensor input, Tensor? mask, float scale, bool causal, bool bottom_right) -> Tensor",
)
def _(input, mask, scale, causal, bottom_right):
    return input.new_empty(input.shape)


@raw_op("masked_softmax", "masked_softmax_backward(Tensor grad_output, Tensor output, float scale) -> Tensor")
def _(grad_output, output, scale):
    return output.new_empty(output.shape)


@raw_op("masked_softmax", "masked_softmax_mask_backward(Tensor grad_output, Tensor output, Tensor mask) -> Tensor")
def _(grad_output, output, mask):
    return output.new_empty(mask.shape, dtype=torch.float64 if output.dtype == torch.float64 else torch.float32)
