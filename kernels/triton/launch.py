"""How kernels are launched: architectures, launch rows, and the one function that launches.

A launch row is frozen data with provenance; an op chooses one by a pure function of sizes and architecture, so that the
choice can be tested, and every row compiled, on a machine with no GPU. Nothing is tuned at run time: what is measured
by `bench_<op>.py --tune` is pasted into the tables by hand.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch

from .versions import INTERPRETED

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Architecture:
    """What a launch may depend on.

    Args:
        backend: "cuda" or "hip", as Triton names them; "interpreter" where kernels run on the CPU.
        name: 80, 90, 100, 120; "gfx942".
        warp_size: threads that run together.
        shared_bytes: most shared memory that one program may take.
    """

    backend: str
    name: int | str
    warp_size: int
    shared_bytes: int


SM80 = Architecture("cuda", 80, 32, 163 << 10)
SM90 = Architecture("cuda", 90, 32, 227 << 10)
SM100 = Architecture("cuda", 100, 32, 227 << 10)
SM120 = Architecture("cuda", 120, 32, 99 << 10)
GFX942 = Architecture("hip", "gfx942", 64, 64 << 10)
INTERPRETER = Architecture("interpreter", 90, 32, SM90.shared_bytes)
ARCHITECTURES = (SM80, SM90, SM100, SM120, GFX942)
# 8.6 and 8.9, too, hold 100 KB where 8.0 holds 164.
_SMALL_SHARED = (86, 89)


@dataclass(frozen=True)
class Launch:
    """One launch row: what the compiler is told, and where it comes from.

    Args:
        num_warps, num_stages: as Triton has them.
        spill_bytes: of stack for each thread, on sm_90, that the row is known to take: the next row down is no better.
        measured: "<device>, <dtype>, <date>: <figure>; <rejected neighbour>", or NOT_MEASURED.
    """

    num_warps: int
    num_stages: int = 1
    spill_bytes: int = 0
    measured: str = NOT_MEASURED


@lru_cache(maxsize=None)
def _architecture_of_gpu(index: int) -> Architecture:
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
        return Architecture("hip", name, GFX942.warp_size, GFX942.shared_bytes)
    major, minor = torch.cuda.get_device_capability(index)
    number = 10 * major + minor
    if number in _SMALL_SHARED:
        return Architecture("cuda", number, 32, SM120.shared_bytes)
    family = {8: SM80, 9: SM90, 10: SM100}.get(major, SM120)
    return Architecture("cuda", number, 32, family.shared_bytes)


def architecture_of(device: torch.device) -> Architecture:
    """The architecture that a tensor's device has; that of the recording, where one is made."""
    if _recording is not None:
        return _recording.architecture
    if device.type == "cpu":
        return INTERPRETER
    return _architecture_of_gpu(torch.cuda.current_device() if device.index is None else device.index)


@dataclass(frozen=True)
class Call:
    """One launch as it was asked for: kernel, grid, launch row, arguments by name, the compiler's options."""

    kernel: object
    grid: tuple[int, ...]
    row: Launch
    arguments: dict[str, object]
    options: dict[str, object]


class Recording:
    """Launches that are written down in place of being run."""

    def __init__(self, architecture: Architecture):
        self.architecture = architecture
        self.calls: list[Call] = []


_recording: Recording | None = None


@contextmanager
def recording(architecture: Architecture) -> Iterator[Recording]:
    """Within it, kernels are not run but listed, as for a GPU of that architecture: meta tensors serve as operands."""
    global _recording
    before, _recording = _recording, Recording(architecture)
    try:
        yield _recording
    finally:
        _recording = before


def is_recording() -> bool:
    """Whether launches are written down and not run, so that what they would write is not there."""
    return _recording is not None


# (a row of a table, what is taken in its place)
_trial: tuple[object, object] | None = None


@contextmanager
def trying(present: object, candidate: object) -> Iterator[None]:
    """Within it, whoever chooses the row `present` of a table is given `candidate`: for bench_<op>.py --tune alone.

    The tables themselves never change. `present` is told by identity: an equal row of another table stays.
    """
    global _trial
    before, _trial = _trial, (present, candidate)
    try:
        yield
    finally:
        _trial = before


def taken(row):
    """The row, or what is tried in its place: every row of a table passes here on its way to a launch."""
    return _trial[1] if _trial is not None and _trial[0] is row else row


_interpreter = threading.RLock()  # it keeps its state in module globals


def launch(kernel, grid: tuple[int, ...], row: Launch, device: torch.device, **arguments) -> None:
    """Runs a kernel on the device of its operands.

    A grid with no program is no launch. Contraction of a * b + c into an FMA is off: two-float arithmetic takes exact
    products and sums apart, and what is to be fused is written tl.fma.
    """
    if 0 in grid:
        return
    options = {"num_warps": row.num_warps, "num_stages": row.num_stages, "enable_fp_fusion": False}
    if _recording is not None:
        _recording.calls.append(Call(kernel, grid, row, arguments, options))
        return
    _run(kernel, grid, arguments, options, device)


def run(call: Call, device: torch.device) -> None:
    """Runs a recorded launch whose operands lie on `device`."""
    _run(call.kernel, call.grid, call.arguments, call.options, device)


def _run(kernel, grid, arguments, options, device) -> None:
    with _interpreter if INTERPRETED else torch.cuda.device(device):
        kernel[grid](**arguments, **options)
