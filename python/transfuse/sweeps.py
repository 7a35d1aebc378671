"""Exhaustive checks of the float32 CPU kernels: every bit pattern, or every stride-th, against a float64 oracle.

The oracles are transfuse.reference in float64, erfc and sigmoid of torch. Against mpmath they stay within 2^-37 relative
(tests/test_gelu.py), so that an error reported here is the kernel's own to 1e-4 ULP.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from transfuse.dispatch import use_backend
from transfuse.ops.gelu import gelu
from transfuse.ops.masked_softmax import masked_softmax
from transfuse.reference.gelu import gelu_reference
from transfuse.testing import GELU_ROOT, GELU_ROOT_ERROR, GELU_ROOT_ZONE, MAX_ULP, SOFTMAX_ROW_SUM_ERROR, ulp_distance

PATTERNS = 2**32
CHUNK = 2**20  # larger ones leave the cache and take twice the time
# exp(-x) of a larger x is no float32 any more, and weighs 0.
SOFTMAX_RANGE = 104.5

Progress = Callable[[int, int], None]
# inputs -> error in ULP, whether the contract is broken, absolute error near the root
Check = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Sweep:
    """What one sweep found.

    Args:
        inputs: how many inputs were tried.
        worst_ulp: largest error in units of the last place of float32, where the bound is in those.
        worst_input: where.
        errors: inputs that break the contract: above the bound, a wrong sign, NaN or infinity.
        first_error: the first such input, or None.
        root_error: largest absolute error within GELU_ROOT_ZONE of the root of gelu's derivative; else 0.
        seconds: how long it took.
    """

    inputs: int
    worst_ulp: float
    worst_input: float
    errors: int
    first_error: float | None
    root_error: float
    seconds: float


def sweep_gelu(approximate: str = "none", direction: str = "forward", stride: int = 1, start: int = 0,
               progress: Progress | None = None) -> Sweep:
    """gelu, or its derivative, of the float32 numbers with bit patterns start, start + stride, ... below 2^32.

    Args:
        approximate: "none" or "tanh".
        direction: "forward" or "backward".
        stride: 1 is every float; an odd one reaches every exponent and every residue of the mantissa's low bits.
        start: first bit pattern.
        progress: called with (inputs done, inputs in all) after each chunk.
    """
    if direction not in ("forward", "backward"):
        raise ValueError(f"sweep_gelu: direction is {direction!r}, expected 'forward' or 'backward'")

    def check(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = x.double()
        if direction == "forward":
            actual, exact = gelu(x, approximate), gelu_reference(wide, approximate)
            ulp = ulp_distance(actual, exact)
            wrong_sign = (actual.signbit() != exact.signbit()) & ~exact.isnan()
            return ulp, (ulp > MAX_ULP["gelu_forward"]) | wrong_sign, torch.zeros_like(ulp)
        actual = _derivative(lambda v: gelu(v, approximate), x)
        exact = _derivative(lambda v: gelu_reference(v, approximate), wide)
        ulp, error = ulp_distance(actual, exact), (actual.double() - exact).abs()
        near_root = (wide - GELU_ROOT[approximate]).abs() <= GELU_ROOT_ZONE
        wrong_there = (error > GELU_ROOT_ERROR) | (actual.sign() != exact.sign())
        broken = torch.where(near_root, wrong_there, ulp > MAX_ULP["gelu_backward"])
        return torch.where(near_root, 0.0, ulp), broken, torch.where(near_root, error, 0.0)

    return _sweep(check, PATTERNS, stride, start, progress)


def sweep_masked_softmax(stride: int = 1, start: int = 0, progress: Progress | None = None) -> Sweep:
    """masked_softmax of the rows (0, -x) for the floats 0 <= x <= 104.5 with bit patterns start, start + stride, ...

    The second weight is exp(-x) / (1 + exp(-x)): this sweeps the exp of the row kernels, subnormal results included.
    """

    def check(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.stack([torch.zeros_like(x), -x], -1)
        actual = masked_softmax(rows)
        exact = torch.stack([torch.sigmoid(x.double()), torch.sigmoid(-x.double())], -1)
        ulp = ulp_distance(actual, exact).amax(-1)
        sum_error = (actual.double().sum(-1) - 1).abs()
        return ulp, (ulp > MAX_ULP["masked_softmax_forward"]) | (sum_error > SOFTMAX_ROW_SUM_ERROR), torch.zeros_like(ulp)

    last = int(torch.tensor(SOFTMAX_RANGE).view(torch.int32))
    return _sweep(check, last + 1, stride, start, progress)


def _derivative(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        output = function(leaf)
    return torch.autograd.grad(output, leaf, torch.ones_like(output))[0]


def _chunks(end: int, stride: int, start: int) -> Iterator[Tensor]:
    """The floats with bit patterns start, start + stride, ... below end."""
    for first in range(start, end, CHUNK * stride):
        patterns = torch.arange(first, min(end, first + CHUNK * stride), stride)
        yield torch.where(patterns < 2**31, patterns, patterns - PATTERNS).to(torch.int32).view(torch.float32)


def _sweep(check: Check, end: int, stride: int, start: int, progress: Progress | None) -> Sweep:
    if stride < 1 or not 0 <= start < end:
        raise ValueError(f"sweep: stride is {stride} and start {start}, expected stride >= 1 and 0 <= start < {end}")
    began, total = time.perf_counter(), len(range(start, end, stride))
    inputs, errors, first_error, worst_ulp, worst_input, root_error = 0, 0, None, 0.0, 0.0, 0.0
    with use_backend("cpu"):
        for x in _chunks(end, stride, start):
            ulp, broken, root = check(x)
            at = int(ulp.argmax())
            if float(ulp[at]) > worst_ulp:
                worst_ulp, worst_input = float(ulp[at]), float(x[at])
            root_error = max(root_error, float(root.max()))
            if first_error is None and bool(broken.any()):
                first_error = float(x[int(broken.to(torch.uint8).argmax())])
            errors += int(broken.sum())
            inputs += x.numel()
            if progress is not None:
                progress(inputs, total)
    return Sweep(inputs, worst_ulp, worst_input, errors, first_error, root_error, time.perf_counter() - began)
