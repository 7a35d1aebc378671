"""The two norms side by side, and what exact arithmetic says of them: what their tests share.

The oracle here is numpy's long double, so that float64 results have one too and the package's own oracle is tested.
"""

import importlib
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import transfuse
from transfuse import extension
from transfuse.testing import draw

needs_kernels = pytest.mark.skipif(bool(extension.cpu_unavailable), reason=extension.cpu_unavailable)
needs_long_double = pytest.mark.skipif(np.finfo(np.longdouble).eps > 2.0**-60, reason="long double is a double here")

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = (F32, BF16, F16, F64)
# (dtype of the input, dtype of the parameters)
PAIRS = ((F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32), (F64, F64))
LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 384, 768, 1000)
EPS = 0.3  # large, so that a wrong eps shows


@dataclass(frozen=True)
class Family:
    """Rows that random inputs never show.

    Args:
        scale, shift: standard deviation and mean of a row.
        eps: of the norm.
        grad: size of the incoming gradient that keeps gradients in range.
    """

    scale: float = 1.0
    shift: float = 0.0
    eps: float = EPS
    grad: float = 1.0


_COMMON = {
    "plain": Family(),
    "mean/std 1e4": Family(shift=1e4),
    "mean/std 1e6": Family(shift=1e6),
    "tiny std": Family(1e-6, 1.0, 1e-5),
}
_FLOAT32_RANGE = {
    "|x| 1e30": Family(1e30, grad=1e20),
    "|x| 1e37": Family(1e37, grad=1e20),
    "mean/std 1e6 at 1e36": Family(1e30, 1e36, grad=1e20),
    "subnormals": Family(1e-40, grad=1e20),
    "subnormals, eps 0": Family(1e-40, eps=0.0, grad=1e-8),
}
FAMILIES = {
    F32: _COMMON | _FLOAT32_RANGE,
    BF16: _COMMON | _FLOAT32_RANGE,
    F16: {name: _COMMON[name] for name in ("plain", "mean/std 1e4", "tiny std")}
    | {"|x| 1e4": Family(1e4, grad=512.0), "subnormals": Family(1e-6, eps=1e-6)},
    F64: _COMMON
    | {
        "|x| 1e300": Family(1e300, grad=1e200),
        "mean/std 1e6 at 1e300": Family(1e294, 1e300, grad=1e200),
        "subnormals": Family(1e-310, grad=1e200),
        "subnormals, eps 0": Family(1e-310, eps=0.0, grad=1e-8),
    },
}


@dataclass(frozen=True)
class Norm:
    """layer_norm or rms_norm: the functions of one stem, and its formula in long double."""

    stem: str
    parameter_names: tuple[str, ...]

    def __str__(self):
        return self.stem

    @property
    def centered(self):
        return "bias" in self.parameter_names

    @property
    def function(self):
        return getattr(transfuse, self.stem)

    @property
    def add(self):
        return getattr(transfuse, f"add_{self.stem}")

    @property
    def stock(self):
        return getattr(torch.nn.functional, self.stem)

    @property
    def page(self):
        return importlib.import_module(f"transfuse.ops.{self.stem}")

    @property
    def module(self):
        return getattr(transfuse.nn, {"layer_norm": "LayerNorm", "rms_norm": "RMSNorm"}[self.stem])

    def raw(self, direction):
        """forward, add_forward or backward: the op of csrc/<stem>.cpp."""
        prefix, _, direction = direction.rpartition("_")
        return getattr(torch.ops.transfuse, f"{prefix}_{self.stem}_{direction}".lstrip("_")).default

    def parameters(self, shape, dtype=F32, grad=False):
        """Weight, and bias where there is one; neither is near 1 or 0, so that each shows."""
        shape = shape if isinstance(shape, tuple) else (shape,)
        weight = draw(*shape, dtype=dtype, seed=11, scale=0.5, shift=1.5, requires_grad=grad)
        bias = draw(*shape, dtype=dtype, seed=12, shift=-0.25, requires_grad=grad)
        return (weight, bias)[: len(self.parameter_names)]

    def __call__(self, x, *parameters, eps=EPS, ndim=1):
        """The norm over the last dimensions, however many of the parameters are given."""
        return self.function(x, x.shape[-ndim:], *parameters, eps=eps)

    def add_norm(self, x, residual, *parameters, eps=EPS, ndim=1, **options):
        return self.add(x, residual, x.shape[-ndim:], *parameters, eps=eps, **options)

    def exact(self, x, *parameters, eps=EPS):
        """(output, its size in the contract's measure) in long double; the size is max(|weight * xhat|, |bias|, 1)."""
        xhat, _ = self._normalized(x, eps)
        weight = _long(parameters[0]) if parameters else 1.0
        bias = _long(parameters[1]) if len(parameters) == 2 else 0.0
        scaled = xhat * weight
        return scaled + bias, np.maximum(np.maximum(abs(scaled), abs(bias)), 1.0)

    def exact_gradients(self, grad, x, *parameters, eps=EPS):
        """Gradients of input and parameters in long double."""
        xhat, rstd = self._normalized(x, eps)
        grad = _long(grad)
        g = grad * _long(parameters[0]) if parameters else grad
        grad_input = g - xhat * _mean(g * xhat)
        if self.centered:
            grad_input = grad_input - _mean(g)
        rows = tuple(range(grad.ndim - 1))
        return [grad_input * rstd, (grad * xhat).sum(rows), grad.sum(rows)][: 1 + len(parameters)]

    def _normalized(self, x, eps):
        x = _long(x)
        if self.centered:
            x = x - _mean(x)
            x = x - _mean(x)  # what the mean was rounded by, at mean/std 1e6
        rstd = 1.0 / np.sqrt(_mean(x * x) + np.longdouble(eps))
        return x * rstd, rstd


def _long(tensor):
    return tensor.detach().double().numpy().astype(np.longdouble)


def _mean(x):
    return x.mean(-1, keepdims=True)


LAYER_NORM = Norm("layer_norm", ("weight", "bias"))
RMS_NORM = Norm("rms_norm", ("weight",))
NORMS = (LAYER_NORM, RMS_NORM)


def family_cases(dtypes=DTYPES):
    """pytest parameters (dtype, family) of every named family of every dtype."""
    return [
        pytest.param(dtype, family, id=f"{str(dtype).removeprefix('torch.')}-{name}")
        for dtype in dtypes
        for name, family in FAMILIES[dtype].items()
    ]


def rows_of(family, rows, cols, dtype, seed=0):
    """Rows of a family. No row is constant where eps is 0, which would be 0/0: None where every row is."""
    if family.eps == 0.0 and cols == 1:
        return None
    x = draw(rows, cols, dtype=dtype, seed=seed, scale=family.scale, shift=family.shift)
    if family.eps == 0.0:
        x[:, 0] = 100 * family.scale
    return x


def ulps(norm, x, *parameters, eps=EPS):
    """Largest error of the norm in the contract's measure: units of last place of max(|weight * xhat|, |bias|, 1)."""
    exact, size = norm.exact(x, *parameters, eps=eps)
    unit = torch.finfo(x.dtype).eps * np.exp2(np.floor(np.log2(size)))
    return float(np.max(abs(_long(norm(x, *parameters, eps=eps)) - exact) / unit))
