"""The interpreted promises are trusted after they have killed mutants: one mistake each, in a copy of the kernels."""

import importlib
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from test_triton_rows import check_add_norm, check_gelu_slope, check_hard_rows, check_sharp_softmax
from torch.utils._python_dispatch import TorchDispatchMode

import transfuse
from transfuse import promises

KERNELS = Path(transfuse.__file__).resolve().parents[2] / "kernels" / "triton"
STEMS = ("masked_softmax", "layer_norm", "rms_norm", "gelu", "rotary")


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    killed_by: str | Callable  # a promise, or what fails


MUTANTS = (
    Mutant("mean left in", "norm.py", "tl.where(inside, x - shift[:, None], 0.0)", "tl.where(inside, x, 0.0)",
           "2.layer_norm.float32.agrees-forward"),
    Mutant("tail columns counted", "norm.py", "tl.where(inside, x - shift[:, None], 0.0)", "x - shift[:, None]",
           "2.layer_norm.float32.agrees-forward"),
    Mutant("mean not corrected", "norm.py", "return quick, offset_hi + offset_lo,", "return quick, offset_hi * 0.0,",
           partial(check_hard_rows, "layer_norm", 700)),
    Mutant("eps half of it", "norm.py", "variance_lo, eps_hi, eps_lo)", "variance_lo, eps_hi * 0.5, eps_lo)",
           "2.rms_norm.bfloat16.agrees-forward"),
    Mutant("no wide statistics", "norm.py", "if any_true(quick == 0):\n        wide_mean",
           "if False:\n        wide_mean", partial(check_hard_rows, "rms_norm", 700)),
    Mutant("sum not rounded before the norm", "norm.py", "x = widened(rounded)", "x = x + y",
           partial(check_add_norm, "layer_norm", torch.bfloat16)),
    Mutant("gradient past the norm lost", "norm.py", "return fma(projected, scale[:, None], past)",
           "return projected * scale[:, None]", partial(check_add_norm, "rms_norm", torch.float32)),
    Mutant("last row of a chunk lost", "norm.py", "* (chunk + 1) // chunks", "* (chunk + 1) // chunks - 1",
           "2.rms_norm.float32.agrees-backward"),
    Mutant("a line of partial sums lost", "rows.py", "range(0, num_lines, AT_ONCE)", "range(1, num_lines, AT_ONCE)",
           "2.layer_norm.float16.agrees-backward"),
    Mutant("score rounded", "masked_softmax.py", "lo = fma(x, tl.zeros_like(x) + scale_rest, error)",
           "lo = error * 0.0", check_sharp_softmax),
    Mutant("mask dropped", "masked_softmax.py", "(tl.load(mask, mask=inside, other=0) != 0)", "valid",
           "1.masked_softmax.float32.rule-1"),
    Mutant("causal one further", "masked_softmax.py", "causal_offset + 1", "causal_offset + 2",
           "2.masked_softmax.bfloat16.agrees-forward"),
    Mutant("NaN hidden", "exact.py", "tl.where(x != x, 1, 0)", "tl.where(x != x, 0, 0)",
           "1.masked_softmax.float32.rule-4"),
    Mutant("excluded keys take gradients", "masked_softmax.py", "tl.where(weight == 0, 0.0, weight * ((grad",
           "tl.where(weight != weight, 0.0, (weight + 1e-3) * ((grad", "2.masked_softmax.float32.agrees-backward"),
    Mutant("exp with another ln 2", "exp.py", "0x1.7f7d1cp-20", "0x1.7f7d1cp-19", check_sharp_softmax),
    Mutant("tail of the other form", "gelu.py", "tail = erf_tail(", "tail = tanh_tail(",
           "2.gelu.float32.forward-ulp.none"),
    Mutant("wrong side of the middle", "gelu.py", "y = tl.where(x == _X1, _Y1, y)", "y = y",
           "2.gelu.float16.forward-misrounded.none"),
    Mutant("slope rounded early", "gelu_far.py", "fma(a, excess, a) * factor", "(1.0 + excess) * 1.000001 * a * factor",
           check_gelu_slope),
    Mutant("bias not added", "gelu.py", "x = _with_bias(", "x * _with_bias(", "2.gelu.bfloat16.agrees-forward"),
    Mutant("sine's sign", "rotary.py", "a * cosine - b * sine", "a * cosine + b * sine",
           "2.rotary.float32.agrees-forward"),
    Mutant("rounded to even, then again", "exact.py", "narrowed(round_to_odd(x)", "narrowed(1.001 * x.to(tl.float32)",
           "2.rotary.float16.forward-ulp"),
)  # fmt: skip


class KernelsOf(TorchDispatchMode):
    """Raw ops of Triton run from another package of kernels."""

    def __init__(self, package):
        super().__init__()
        self.package, self.calls = package, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = function.name().partition("::")
        if namespace != "transfuse_triton":
            return function(*args, **(kwargs or {}))
        self.calls += 1
        stem = next(stem for stem in STEMS if name.removeprefix("add_").startswith(f"{stem}_"))
        return getattr(importlib.import_module(f"{self.package}.{stem}"), name)(*args)


def _outcome(promise, package):
    promises.forget()
    with KernelsOf(package) as mode:
        outcome = promises.check(promises.find(promise), "triton", "cpu")
    promises.forget()
    assert mode.calls
    return outcome


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A package that is a copy of the kernels, with one replacement."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def make(name, file=None, old="", new=""):
        shutil.copytree(KERNELS, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        if file:
            text = (tmp_path / name / file).read_text()
            assert old in text, f"{file} has changed"
            (tmp_path / name / file).write_text(text.replace(old, new, 1))
        importlib.invalidate_caches()
        names.append(name)
        return name

    yield make
    for module in [module for module in sys.modules if module.partition(".")[0] in names]:
        del sys.modules[module]


def test_a_copy_without_a_mistake_keeps_the_promises(copy):
    package = copy("mutant_none")
    for promise in ("2.layer_norm.float32.agrees-backward", "1.masked_softmax.float32.rule-4"):
        assert _outcome(promise, package).status == "ok"


@pytest.mark.parametrize("number", range(len(MUTANTS)), ids=[mutant.name for mutant in MUTANTS])
def test_mutant_is_killed(number, copy):
    mutant = MUTANTS[number]
    if callable(mutant.killed_by):
        with transfuse.use_backend("triton"), pytest.raises(AssertionError):
            with KernelsOf(copy(f"mutant_{number}", mutant.file, mutant.old, mutant.new)):
                mutant.killed_by()
        return
    outcome = _outcome(mutant.killed_by, copy(f"mutant_{number}", mutant.file, mutant.old, mutant.new))
    assert outcome.status == "failed" and not outcome.reason, (
        f"survived {mutant.killed_by}: {outcome.figure} {outcome.reason}"
    )
