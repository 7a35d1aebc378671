"""Every environment variable of transfuse, declared once. This is the only file that reads the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """One variable: its name, how its text is read, what holds when it is unset, and what it does."""

    name: str
    kind: str  # "flag" | "choice"
    default: str
    meaning: str
    choices: tuple[str, ...] = ()


BACKENDS = ("auto", "cuda", "triton", "cpu", "torch", "reference")
GPU_BACKENDS = ("cuda", "triton")
CPU_ISA = ("best", "baseline", "avx2", "avx512", "avx512_bf16")

VARIABLES = (
    Variable("TRANSFUSE_BACKEND", "choice", "auto", "backend of every op where no use_backend() or accelerate(backend=) says otherwise",
             BACKENDS),
    Variable("TRANSFUSE_STRICT", "flag", "0", "1: a fallback raises instead of warning"),
    Variable("TRANSFUSE_CPU_ISA", "choice", "best", "instruction set that the CPU kernels use", CPU_ISA),
    Variable("TRANSFUSE_CHECK", "flag", "0",
             "1: lengths, offsets and block tables on a GPU are looked at, which waits for it; 0: kernels clamp them"),
    Variable("TRANSFUSE_DISABLE", "flag", "0", "1: accelerate() changes nothing"),
)
_BY_NAME = {variable.name: variable for variable in VARIABLES}


def get(name: str) -> str | bool:
    """The value of a declared variable: bool for a flag, str for a choice.

    Raises:
        ValueError: the text is none of the allowed ones.
    """
    variable = _BY_NAME[name]
    text = os.environ.get(name, variable.default)
    allowed = ("0", "1") if variable.kind == "flag" else variable.choices
    if text not in allowed:
        raise ValueError(f"environment: {name} is {text!r}, expected one of {', '.join(allowed)}")
    return text == "1" if variable.kind == "flag" else text


def triton_is_interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU: its own TRITON_INTERPRET, read as Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")
