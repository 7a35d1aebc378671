"""What every op refuses in the same words: tensors that are not dense, flags, probabilities and factors out of range."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENTS = ("top_left", "bottom_right")
_FLOAT32_MAX = torch.finfo(torch.float32).max
_NUMBERS = (int, float, torch.SymFloat, torch.SymInt)


def check_tensor(op: str, name: str, tensor: Tensor, expected: str = "a Tensor") -> None:
    """A dense tensor: the kernels read strides, which nested and sparse ones do not have."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} is a {type(tensor).__name__}, expected {expected}")
    if not is_dense(tensor):
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{op}: {name} is a {kind} tensor, expected a dense one")


def is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def check_scale(op: str, scale: float) -> float:
    """A number float32 holds; a tensor would break graphs and lose its gradient. A comparison, since it may be symbolic."""
    if isinstance(scale, bool) or not isinstance(scale, _NUMBERS):
        raise TypeError(f"{op}: scale is a {type(scale).__name__}, expected float")
    if not -_FLOAT32_MAX <= scale <= _FLOAT32_MAX:
        raise ValueError(f"{op}: scale is {scale}, expected a finite float32")
    return float(scale)


def check_eps(op: str, eps: float) -> None:
    """What may stand under a root."""
    if isinstance(eps, bool) or not isinstance(eps, _NUMBERS):
        raise TypeError(f"{op}: eps is a {type(eps).__name__}, expected a float")
    if not 0.0 <= eps <= _FLOAT32_MAX:
        raise ValueError(f"{op}: eps is {eps}, expected a finite number of at least 0")


def check_dropout(op: str, dropout_p: float) -> float:
    """A probability."""
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"{op}: dropout_p is a {type(dropout_p).__name__}, expected float")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p is {dropout_p}, expected 0 <= dropout_p <= 1")
    return float(dropout_p)


def check_flag(op: str, name: str, flag: bool) -> None:
    """A bool: a tensor here would be read on the host."""
    if not isinstance(flag, bool):
        raise TypeError(f"{op}: {name} is a {type(flag).__name__}, expected bool")


def check_alignment(op: str, alignment: str) -> bool:
    """True for "bottom_right"."""
    if alignment not in ALIGNMENTS:
        raise ValueError(f"{op}: causal_alignment is {alignment!r}, expected 'top_left' or 'bottom_right'")
    return alignment == "bottom_right"
