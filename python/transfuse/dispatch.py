"""Which backend runs an op: a visible ordered list per op, each entry with reasons instead of booleans.

An op's page (ops/<op>.py) declares ``IMPLEMENTATIONS``, most wanted first. ``select`` walks it for a ``Problem``, plain
data, so that support is decided and tested without a device. On the hot path no Problem is built: the choice is looked
up under (backend setting, device type, dtype, flags).

The backend that use_backend() sets is one per process, like torch's own backend flags: torch.compile guards on a global
and compiles again when it changes. A model's own pin is one per thread (it comes and goes within each forward).
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch

from transfuse import env, extension


class TransfuseWarning(UserWarning):
    """A fallback to a slower path, or something that was asked for and had no effect. Once per reason."""


@dataclass(frozen=True)
class Problem:
    """What an implementation decides on. Each op subclasses it with its own shapes and flags."""

    op: str
    device: str  # as it prints: "cpu", "cuda:1"
    dtype: torch.dtype
    requires_grad: bool


@dataclass(frozen=True)
class Implementation:
    """One backend of one op.

    Args:
        name: backend name, one of ``env.BACKENDS`` without "auto".
        unsupported: Problem -> reasons why it cannot run; empty when it can.
        run: executes the op, with autograd, on the op's normalised positional arguments.
        automatic: taken by "auto"; False for what runs only when asked for by name, a device type for what is taken
            there alone.
    """

    name: str
    unsupported: Callable[[Any], tuple[str, ...]]
    run: Callable[..., Any]
    automatic: bool | str = True

    def is_automatic_on(self, device: str) -> bool:
        return self.automatic is True or self.automatic == device.partition(":")[0]


_default: str = env.get("TRANSFUSE_BACKEND")  # read once: the environment costs a microsecond per look
_override: str | None = None  # use_backend


class _Pin(threading.local):
    """prefer_backend, of this thread. Dynamo reads it without a guard: a model's pin is part of its code."""

    backend: str | None = None


_pin = _Pin()
_choices: dict[tuple, Implementation] = {}
_warned: set[tuple[str, str]] = set()
_fallbacks: Counter[tuple[str, str]] = Counter()


def setting() -> str:
    """The backend asked for now: use_backend, else the model's own, else TRANSFUSE_BACKEND, else "auto"."""
    if _override is not None:
        return _override
    return _pin.backend or _default


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every op on one backend; an op it cannot run raises RuntimeError with the list of reasons.

    The setting is the process's, so every thread follows it: enter it where no other thread enters another.

    Args:
        name: "auto", "cuda", "triton", "cpu", "torch" or "reference". "auto" restores the ordered choice.
    Raises:
        ValueError: an unknown name. TypeError: not a string.
    """
    global _override
    check_backend("use_backend", "name", name)
    before, _override = _override, name
    try:
        yield
    finally:
        _override = before


@contextmanager
def prefer_backend(name: str) -> Iterator[None]:
    """What ``accelerate(model, backend=name)`` asks for: use_backend(name) in this thread, behind any use_backend()."""
    before, _pin.backend = _pin.backend, name
    try:
        yield
    finally:
        _pin.backend = before


def check_backend(op: str, argument: str, name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{op}: {argument} is a {type(name).__name__}, expected str")
    if name not in env.BACKENDS:
        raise ValueError(f"{op}: {argument} is {name!r}, expected one of {', '.join(env.BACKENDS)}")


def backends() -> dict[str, bool | str]:
    """Each backend's name -> True, or the reason why it is not available on this machine."""
    gpu = "" if torch.cuda.is_available() else "torch sees no GPU"
    return {
        "cuda": extension.cuda_unavailable or gpu or unserved_gpu() or True,
        "triton": extension.triton_missing() or (not env.triton_is_interpreted() and _unfit_gpu()) or True,
        "cpu": extension.cpu_unavailable or True,
        "torch": True,
        "reference": True,
    }


ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def cpu_reasons(problem: Problem, dtypes: Sequence[torch.dtype] = ALL_DTYPES) -> tuple[str, ...]:
    """The reasons every compiled CPU kernel shares: module, device, dtype."""
    reasons = []
    if extension.cpu_unavailable:
        reasons.append(extension.cpu_unavailable)
    if problem.device != "cpu":
        reasons.append(f"device is {problem.device}, the kernel takes cpu")
    if problem.dtype not in dtypes:
        reasons.append(f"dtype is {dtype_name(problem.dtype)}, the kernel takes {', '.join(map(dtype_name, dtypes))}")
    return tuple(reasons)


CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cuda_reasons(problem: Problem, dtypes: Sequence[torch.dtype] = CUDA_DTYPES) -> tuple[str, ...]:
    """The reasons every compiled CUDA kernel shares: module, device, dtype, the GPU's architecture."""
    reasons = []
    if extension.cuda_unavailable:
        reasons.append(extension.cuda_unavailable)
    if problem.device.partition(":")[0] != "cuda":
        reasons.append(f"device is {problem.device}, the kernel takes cuda")
    if problem.dtype not in dtypes:
        reasons.append(f"dtype is {dtype_name(problem.dtype)}, the kernel takes {', '.join(map(dtype_name, dtypes))}")
    if not reasons and (reason := unserved_gpu(problem.device)):
        reasons.append(reason)
    return tuple(reasons)


TRITON_DTYPES = CUDA_DTYPES
OLDEST_GPU = (8, 0)  # what the Triton kernels are compiled and tested for


def triton_reasons(problem: Problem, dtypes: Sequence[torch.dtype] = TRITON_DTYPES) -> tuple[str, ...]:
    """The reasons every Triton kernel shares: Triton, device (the CPU where Triton interprets), dtype, the GPU's age."""
    reasons = []
    if extension.triton_missing():
        reasons.append(extension.triton_missing())
    device = problem.device.partition(":")[0]
    if device == "cpu" and not env.triton_is_interpreted():
        reasons.append("device is cpu, the kernel takes cuda (cpu under TRITON_INTERPRET=1)")
    elif device not in ("cpu", "cuda"):
        reasons.append(f"device is {problem.device}, the kernel takes cuda")
    if problem.dtype not in dtypes:
        reasons.append(f"dtype is {dtype_name(problem.dtype)}, the kernel takes {', '.join(map(dtype_name, dtypes))}")
    if not reasons and extension.triton_unavailable():
        reasons.append(extension.triton_unavailable())
    if not reasons and device == "cuda" and (reason := _unfit_gpu(problem.device)):
        reasons.append(reason)
    return tuple(reasons)


def _unfit_gpu(device: str = "cuda") -> str:
    """Why the Triton kernels do not take a GPU, or nothing; AMD's capability counts otherwise."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) >= OLDEST_GPU:
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, the kernels take 8.0 and newer"


def unserved_gpu(device: str = "cuda") -> str:
    """Why a GPU cannot run the architectures that _C_cuda was built for; nothing where it can."""
    built = extension.cuda_architectures
    major, minor = torch.cuda.get_device_capability(device)
    if any(serves(name, major, minor) for name in built):
        return ""
    name = torch.cuda.get_device_name(device)
    return f"{name} has compute capability {major}.{minor}, the kernels are built for {', '.join(built)}"


def serves(architecture: str, major: int, minor: int) -> bool:
    """Whether code for ``architecture`` ("8.0", "9.0a", "12.0+PTX") runs on a GPU of that compute capability."""
    name = architecture.removesuffix("+PTX")
    built_major, built_minor = (int(part) for part in name.rstrip("af").split("."))
    if name.endswith("a"):
        return (major, minor) == (built_major, built_minor)
    if architecture.endswith("+PTX") and (major, minor) >= (built_major, built_minor):
        return True
    return major == built_major and minor >= built_minor


def supports_all(problem: Problem) -> tuple[str, ...]:
    """``unsupported`` of the reference, which takes everything."""
    return ()


class NoBackend(RuntimeError):
    """The backend that was asked for cannot run the problem; the text has its reasons."""


def select(op: str, implementations: Sequence[Implementation], key: tuple, make_problem: Callable[[], Problem]) -> Implementation:
    """The implementation that runs, by the ordered list. A fallback is seen: a warning once per (op, reason).

    Args:
        op: op stem.
        implementations: the op's ordered list.
        key: hashable facts the choice depends on (device, dtype, flags), never batch or size.
        make_problem: builds the Problem on a miss.
    Raises:
        NoBackend: the backend asked for cannot run the problem. RuntimeError: TRANSFUSE_STRICT=1 forbids the fallback.
    """
    full_key = (setting(), op, key)
    chosen = _choices.get(full_key)
    if chosen is None:
        chosen = _choose(op, implementations, full_key, make_problem())
    return chosen


def _choose(op: str, implementations: Sequence[Implementation], full_key: tuple, problem: Problem) -> Implementation:
    wanted = full_key[0]
    passed_over: list[tuple[str, tuple[str, ...]]] = []
    for implementation in implementations:
        if wanted == "auto" and not implementation.is_automatic_on(problem.device) or wanted not in ("auto", implementation.name):
            continue
        reasons = implementation.unsupported(problem)
        if reasons:
            passed_over.append((implementation.name, reasons))
            continue
        fallback = wanted == "auto" and implementation.name == "reference"
        if fallback:
            _tell_fallback(op, _reason_lines(passed_over))
        else:
            _choices[full_key] = implementation
        return implementation
    if not passed_over:
        passed_over.append((wanted, ("the op has no such backend",)))
    raise NoBackend(f"{op}: no backend can run this under use_backend({wanted!r}):\n{_reason_lines(passed_over)}")


def _tell_fallback(op: str, reason: str) -> bool:
    _fallbacks[(op, reason)] += 1
    if env.get("TRANSFUSE_STRICT"):
        raise RuntimeError(f"{op}: TRANSFUSE_STRICT=1 and only the reference can run this:\n{reason}")
    if (op, reason) not in _warned:
        _warned.add((op, reason))
        warnings.warn(f"{op}: running the slow reference, because\n{reason}", TransfuseWarning, stacklevel=5)
    return True


# torch.compile calls it while tracing: the warning is not part of the graph. This is what the decorator
# torch.compiler.assume_constant_result does, which would import all of Dynamo, and triton with it, for every user.
_tell_fallback._dynamo_marked_constant = True


def _reason_lines(passed_over: list[tuple[str, tuple[str, ...]]]) -> str:
    return "\n".join(f"  {name}: {'; '.join(reasons)}" for name, reasons in passed_over)


def forget_choices() -> None:
    """Has every choice made anew at its next call (tests)."""
    _choices.clear()


def fallback_counts() -> dict[tuple[str, str], int]:
    """How often each (op, reasons) fell back to the reference in this process."""
    return dict(_fallbacks)


@dataclass(frozen=True)
class Explanation:
    """What explain() found: the problem and, per backend in order, the reasons against it and whether it is chosen."""

    problem: Problem
    rows: tuple[tuple[str, tuple[str, ...], bool], ...]

    @property
    def chosen(self) -> str | None:
        """Name of the backend that would run, or None when none can."""
        return next((name for name, _, is_chosen in self.rows if is_chosen), None)

    def __str__(self) -> str:
        facts = ", ".join(f"{field.name}={dtype_name(getattr(self.problem, field.name))}" for field in fields(self.problem)[1:])
        lines = [f"{self.problem.op}({facts})"]
        for name, reasons, is_chosen in self.rows:
            lines.append(f"  {'->' if is_chosen else '  '} {name:<10} {'; '.join(reasons) or ('runs' if is_chosen else 'could run')}")
        return "\n".join(lines)


def explain(function: Callable, *args: Any, **kwargs: Any) -> Explanation:
    """The ordered list of backends for one call, each with every reason against it. Runs nothing.

    Args:
        function: a public op, such as ``transfuse.layer_norm``.
        args, kwargs: the arguments of the call.
    Raises:
        TypeError: ``function`` is not an op of transfuse. ValueError: the arguments are not valid for it.
    """
    if not hasattr(function, "explain_problem"):
        raise TypeError(f"explain: function is {getattr(function, '__name__', function)!r}, expected an op of transfuse")
    op, implementations, problem = function.explain_problem(*args, **kwargs)
    wanted = setting()
    rows, chosen = [], False
    for implementation in implementations:
        reasons = implementation.unsupported(problem)
        if wanted == "auto" and not implementation.is_automatic_on(problem.device):
            reasons += (f"runs only under use_backend({implementation.name!r})",)
        elif wanted not in ("auto", implementation.name):
            reasons += (f"use_backend({wanted!r}) is in force",)
        takes = not reasons and not chosen
        chosen = chosen or takes
        rows.append((implementation.name, reasons, takes))
    return Explanation(problem, tuple(rows))


def dtype_name(value: object) -> str:
    """torch.float32 as float32; anything else as it prints."""
    return str(value).removeprefix("torch.")
