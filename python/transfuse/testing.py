"""Inputs, error budgets and comparisons: what tests/, bench/ and ``transfuse verify`` share.

Every tolerance of the project stands here and nowhere else. Inputs are drawn in float64, rounded to the dtype under
test and widened back for the oracle, so that an error is the op's own and not the input's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from transfuse import extension

# Unit roundoff: half the distance from 1 to the next number.
UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}

# CONTRACT section 2, the "must" column, for ops whose bound is per element. Units of last place of float32.
MAX_ULP = {
    "gelu_forward": 3.0,
    "gelu_backward": 4.0,
    "masked_softmax_forward": 4.0,
    "layer_norm_forward": 2.0,
    "rms_norm_forward": 2.0,
    "attention_softcap": 4.0,
    "attention_softcap_slope": 4.0,
    "rotary_forward": 0.5,  # of float32 and 16-bit results, against float64
}
# The same in units of float64's last place, for float64.
MAX_ULP_FLOAT64 = {
    "gelu_forward": 4.0,
    "gelu_backward": 4.0,
    "masked_softmax_forward": 4.0,
    "norm_forward": 5.0,  # torch's own loses 1e6 at mean/std 1e6
    "rotary_forward": 1.5,  # of the largest of both products and the result
}
# What the elements of a float64 row err by in common, its rstd's error: mean over rows, units of roundoff.
NORM_ROW_ERROR = 0.4
# 16-bit results of row ops: half a unit is the rounding, the rest what float32 or float64 inside adds to it.
ROUNDED_ONCE_ULP = 0.51
# Rotary angles are a product of two float64 factors: roundings of 2^-53 each, relative to the angle.
ANGLE_ROUNDOFFS = 4
# The gradient of GELU crosses 0: within this distance of the root the bound is absolute.
GELU_ROOT = {"none": -0.7517915246935645, "tanh": -0.7524614220710163}
GELU_ROOT_ZONE = 1e-4
GELU_ROOT_ERROR = 1e-7
# A row of softmax weights sums to 1 within this, in float32 and in float64.
SOFTMAX_ROW_SUM_ERROR = 1e-6
SOFTMAX_ROW_SUM_ERROR_FLOAT64 = 1e-14
# Attention: pooled rms against float64, relative to the peer's; the largest row, relative to the peer's.
ATTENTION_RMS_RATIO = 1.02
ATTENTION_ROUNDING_RATIO = 1.05
ATTENTION_ROW_RATIO = 1.25
# 16-bit attention, rows that hold little but subnormal numbers: largest error against the row's largest element.
ATTENTION_TINY_ROW_ERROR = 0.02
# Whole models in float32, largest absolute difference at kept positions (embeddings of unit length).
MODEL_TOLERANCE = 2e-5
# Models accelerated in bfloat16: least cosine of an embedding to that of the stock model in float32.
MODEL_COSINE_BFLOAT16 = 0.999
# A mistake in attention that a test of fine-tuning must see: largest difference of the loss over the run.
FINETUNE_MUTANT_LOSS = 1e-3
# The same for 16-bit models, in units of the dtype's roundoff: every layer of both sides rounds its results.
MODEL_ROUNDOFFS_16BIT = 16
# Two neighbours whose scores differ by less than this may change places.
NEIGHBOUR_MARGIN = 4e-5


def error_budget(dtype: torch.dtype, num_terms: int = 1) -> float:
    """Relative error allowed for one result of a sum of ``num_terms`` products rounded once to ``dtype``.

    Accumulation is in float32 for 16-bit dtypes. The sum's part grows with sqrt(num_terms) (random signs), with a
    factor 4 that covers the maximum over many results.

    Args:
        dtype: floating dtype of the result.
        num_terms: length of the longest sum behind one result.
    Returns:
        The budget, relative to the largest magnitude that enters the sum.
    """
    if dtype not in UNIT_ROUNDOFF:
        raise TypeError(f"error_budget: dtype is {dtype}, expected a floating dtype")
    accumulate = UNIT_ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]
    return 2 * UNIT_ROUNDOFF[dtype] + 4 * math.sqrt(max(num_terms, 1)) * accumulate


def model_tolerance(dtype: torch.dtype, scale: float = 1.0) -> float:
    """Largest absolute difference allowed between stock's and the accelerated model's outputs at kept positions.

    Args:
        dtype: floating dtype of the outputs.
        scale: largest magnitude among stock's outputs; below 1 it counts as 1.
    """
    relative = MODEL_TOLERANCE if dtype in (torch.float32, torch.float64) else MODEL_ROUNDOFFS_16BIT * UNIT_ROUNDOFF[dtype]
    return relative * max(1.0, scale)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0, shift: float = 0.0,
         requires_grad: bool = False) -> torch.Tensor:
    """Normal numbers of the given shape: drawn in float64, scaled, shifted, then rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale + shift
    return values.to(dtype).requires_grad_(requires_grad)


def ulp_distance(actual: torch.Tensor, exact: torch.Tensor, floor: torch.Tensor | float | None = None) -> torch.Tensor:
    """|actual - exact| in units of the last place of ``actual``'s dtype at the size of ``exact``.

    Args:
        actual: results in the dtype under test.
        exact: float64, same shape. Where both are NaN, or the same infinity, the distance is 0; where one is, inf.
        floor: the unit is taken at max(|exact|, floor) where given.
    """
    wide = actual.double()
    size = exact.abs() if floor is None else torch.maximum(exact.abs(), torch.as_tensor(floor, dtype=torch.float64))
    info = torch.finfo(actual.dtype)
    exponent = torch.frexp(size.clamp(min=info.tiny)).exponent - 1
    unit = torch.ldexp(torch.full_like(size, info.eps), exponent)
    same = (wide == exact) | (wide.isnan() & exact.isnan())
    # An exact result above the largest finite number that rounds to inf is right.
    same |= wide.isinf() & (exact.abs() > info.max) & (wide.sign() == exact.sign())
    distance = (wide - exact).abs() / unit
    return torch.where(same, 0.0, torch.where(distance.isnan(), math.inf, distance))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, num_terms: int = 1, what: str = "result", slack: float = 1.0,
                 entering: float = 0.0) -> None:
    """Asserts |actual - expected| <= slack * budget * (largest |expected|), NaN and inf in the same places.

    Args:
        entering: largest magnitude that enters the sums, for results that cancel: it counts where it is above |expected|.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    wide, exact = actual.detach().double(), expected.detach().double()
    finite = exact.isfinite()
    assert torch.equal(wide.isnan(), exact.isnan()), f"{what}: NaN in other places than the reference"
    assert torch.equal(wide[exact.isinf()], exact[exact.isinf()]), f"{what}: infinities differ from the reference"
    if not finite.any():
        return
    scale = max(float(exact[finite].abs().max()), entering)
    error = float((wide[finite] - exact[finite]).abs().max())
    allowed = slack * error_budget(actual.dtype, num_terms) * scale
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e} (largest magnitude {scale:.3e})"


def assert_matches_reference(function: Callable, *args: Any, num_terms: int = 1024, backward: bool = True, **kwargs: Any) -> None:
    """Runs an op of transfuse and its float64 oracle on the same inputs and asserts that results and gradients agree.

    Args:
        function: a public op, such as ``transfuse.layer_norm``.
        args, kwargs: its arguments; tensors that require grad have their gradients compared too.
        num_terms: length of the longest sum, for the budget.
        backward: compare gradients.
    Raises:
        AssertionError: with the largest error and what was allowed.
    """
    from transfuse.dispatch import use_backend

    ours, our_grads = _run(function, args, kwargs, backward, widen=False)
    with use_backend("reference"):
        exact, exact_grads = _run(function, args, kwargs, backward, widen=True)
    for index, (a, e) in enumerate(zip(ours, exact, strict=True)):
        assert_close(a, e, num_terms, f"{function.__name__} output {index}")
    for index, (a, e) in enumerate(zip(our_grads, exact_grads, strict=True)):
        assert_close(a, e, num_terms, f"{function.__name__} gradient {index}", slack=4.0)


def _run(function: Callable, args: tuple, kwargs: dict, backward: bool, widen: bool) -> tuple[list, list]:
    leaves = []

    def prepare(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        copy = value.detach().double() if widen else value.detach()
        if value.requires_grad and backward:
            copy = copy.requires_grad_()
            leaves.append(copy)
        return copy

    outputs = function(*[prepare(a) for a in args], **{name: prepare(v) for name, v in kwargs.items()})
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(o, torch.Tensor)]
    if not leaves:
        return outputs, []
    differentiable = [o for o in outputs if o.requires_grad]
    # bfloat16 values are exact in every dtype, so that both sides get the same incoming gradient.
    weights = [draw(*o.shape, dtype=torch.bfloat16, seed=7 + i).to(o.dtype) for i, o in enumerate(differentiable)]
    return outputs, list(torch.autograd.grad(differentiable, leaves, weights))


@contextmanager
def nan_filled_empty() -> Iterator[None]:
    """Memory that torch hands out uninitialised is filled with NaN, so that an element never written shows."""
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
              torch.utils.deterministic.fill_uninitialized_memory)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    modules = [module for module in (extension._C, extension._C_cuda) if module is not None]
    for module in modules:
        module.set_nan_filled_empty(True)
    try:
        yield
    finally:
        for module in modules:
            module.set_nan_filled_empty(False)
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]


def assert_model_matches(stock: torch.nn.Module, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Asserts that an accelerated model's last hidden state equals stock's at kept positions; returns the largest difference.

    Args:
        stock, model: both take ``batch`` as keyword arguments and return an object with ``last_hidden_state`` or a tensor.
        batch: ``input_ids`` [B, L] and ``attention_mask`` [B, L] (1 = keep), as a tokenizer gives them.
    """
    with torch.no_grad():
        expected, actual = (_hidden(m(**batch)) for m in (stock, model))
    keep = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones(expected.shape[:2], dtype=torch.bool)
    difference = float((expected[keep].double() - actual[keep].double()).abs().max()) if bool(keep.any()) else 0.0
    scale = max(1.0, float(expected[keep].abs().max())) if bool(keep.any()) else 1.0
    assert difference <= MODEL_TOLERANCE * scale, f"model: largest difference {difference:.2e}, allowed {MODEL_TOLERANCE * scale:.2e}"
    return difference


def _hidden(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state
