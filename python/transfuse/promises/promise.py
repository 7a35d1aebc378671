"""What a promise is, and how one is checked: the one mechanism behind `transfuse verify` and docs/numerics.md."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

import transfuse
from transfuse import env
from transfuse.dispatch import NoBackend, dtype_name
from transfuse.promises.cases import PARITY_CASES

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Figure:
    """What was measured: the worst case in the promise's unit, where it was found, and the peer's worst beside it.

    without: how many of the promise's cases the backend has no kernel for; detail says why.
    """

    worst: float
    detail: str = ""
    peer_worst: float | None = None
    without: int = 0


@dataclass(frozen=True)
class Promise:
    """One sentence of the contract that a machine can check: it is kept when ``worst <= bound``.

    Args:
        id: "<section>.<op>.<dtype>.<what>", what `transfuse verify --promise` takes.
        section: of the contract; see promises.SECTIONS.
        op, dtype: what it is about; op "all" and dtype None where it is about none in particular.
        statement: what is promised, in words that stand in a table.
        bound, unit: the largest figure that keeps the promise, and what it counts. Bounds come from transfuse.testing.
        measure: (backend, device) -> Figure. It runs under use_backend(backend).
        peer: whose figure stands beside ours, where there is one.
        slow: only under `--full`.
    """

    id: str
    section: int
    op: str
    dtype: torch.dtype | None
    statement: str
    bound: float
    unit: str
    measure: Callable[[str, str], Figure]
    peer: str | None = None
    slow: bool = False


_remembered = []


def remembered(function):
    """Keeps the latest results of a measurement that several promises look at; see forget()."""
    keeps = lru_cache(maxsize=2)(function)
    _remembered.append(keeps)
    return keeps


def forget():
    """Measures anew from here on: for whoever changes an op in a process that has measured it."""
    for function in _remembered:
        function.cache_clear()


def worst_of(found):
    """The (figure, words) of the largest figure. A NaN is larger than any: it compares with nothing by itself."""
    return max(((figure, *words) if figure == figure else (math.inf, *words) for figure, *words in found),
               key=lambda entry: entry[0])


def counted(items, noun):
    """As words: 1 case, 7 cases."""
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"


class NoKernel(Exception):
    """The backend does not run what the promise is about; the text is the dispatcher's reason."""


@dataclass(frozen=True)
class Outcome:
    """One promise, checked. status: "ok", "failed" or "no kernel"; reason says why where there is no figure."""

    promise: Promise
    backend: str
    device: str
    status: str
    figure: Figure | None
    reason: str
    seconds: float

    @property
    def repeat(self):
        level = env.get("TRANSFUSE_CPU_ISA")
        before = "" if level == "best" else f"TRANSFUSE_CPU_ISA={level} "
        return f"{before}transfuse verify --promise {self.promise.id} --backend {self.backend} --device {self.device}"

    def row(self):
        """The outcome as a flat dict, ready for JSON."""
        promise, figure = self.promise, self.figure or Figure(None)
        return {
            "id": promise.id,
            "section": promise.section,
            "op": promise.op,
            "dtype": promise.dtype and dtype_name(promise.dtype),
            "statement": promise.statement,
            "bound": promise.bound,
            "unit": promise.unit,
            "worst": figure.worst,
            "peer": promise.peer,
            "peer_worst": figure.peer_worst,
            "detail": figure.detail,
            "without": figure.without,
            "status": self.status,
            "reason": self.reason,
            "backend": self.backend,
            "device": self.device,
            "seconds": round(self.seconds, 3),
            "repeat": self.repeat,
        }


def check(promise, backend="auto", device="cpu"):
    """Measures one promise and judges it. Whatever goes wrong is an Outcome: one broken op hides no other's figures."""
    start = time.perf_counter()
    status, figure, reason = "failed", None, ""
    try:
        backend = taken_by(promise.op, promise.dtype, backend, device)
        with transfuse.use_backend(backend):
            figure = promise.measure(backend, device)
        status = "ok" if figure.worst <= promise.bound else "failed"  # NaN is not within any bound
    except (NoKernel, NoBackend) as error:
        status, reason = "no kernel", str(error)
    except Exception as error:
        lines = str(error).splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return Outcome(promise, backend, device, status, figure, reason, time.perf_counter() - start)


def taken_by(op, dtype, backend, device):
    """The backend that a call of `op` takes when `backend` is asked for. Raises NoKernel with the reasons."""
    case = next((case for case in PARITY_CASES if case.op == op), None)
    if case is None:
        return backend
    with transfuse.use_backend(backend):
        explanation = case.explain(*case.inputs(dtype or torch.float32, device))
    if explanation.chosen is None:
        raise NoKernel("; ".join(reasons_of(explanation, backend)))
    return explanation.chosen


def reasons_of(explanation, backend):
    """The dispatcher's reasons against `backend`; empty where it would run."""
    return next((reasons for name, reasons, _ in explanation.rows if name == backend), ("the op has no such backend",))
