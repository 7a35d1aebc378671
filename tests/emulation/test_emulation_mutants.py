"""The emulator is trusted after it has killed mutants: each mistake here, put into a kernel that is clean, must be found.

A mutant is one replacement in the source; the mutated copy is compiled in front of the original. What it must be found
by is named too: a report of that kind, or the comparison of the results where the mistake breaks no rule of memory.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import emulator
import pytest
import torch

SAMPLE = "tests/emulation/kernels/sample.cu"
ROWS, COLUMNS = 3, 300  # the last of three tiles is cut
WRONG_RESULT = "wrong result"


class Mutant(NamedTuple):
    name: str
    old: str
    new: str
    kinds: tuple[str, ...]  # which of them depends on the order in which threads run
    row_stride: int = COLUMNS


READY_BARRIER = "    __syncthreads();  // the tile is there for all\n"
DONE_BARRIER = "    __syncthreads();  // and may be overwritten\n"
MUTANTS = (
    Mutant("missing barrier before reading", READY_BARRIER, "", ("pending copy", "uninitialised read", "race")),
    Mutant("missing barrier before overwriting", DONE_BARRIER, "", ("pending copy", "race")),
    Mutant("missing barrier in the reduction", "  __syncthreads();\n  float total", "  float total", ("uninitialised read", "race")),
    Mutant("barrier of a warp instead of the block", READY_BARRIER, "    __syncwarp();\n", ("pending copy", "uninitialised read", "race")),
    Mutant("wrong tail predicate of the load", "inside = column < num_columns", "inside = column <= num_columns", ("out of bounds",)),
    Mutant("wrong tail predicate of the store", "column < params.num_columns; column +=", "column <= params.num_columns; column +=",
           ("out of bounds", "race")),  # the element behind a row is the next row's first
    Mutant("tail left out", "column < params.num_columns; column +=", "column + 1 < params.num_columns; column +=", (WRONG_RESULT,)),
    Mutant("wrong shuffle mask", "full_warp = 0xffffffffu", "full_warp = 0x0000ffffu", ("wrong lane mask",)),
    Mutant("shuffle over half of the warp", "lanes = 16", "lanes = 8", (WRONG_RESULT,)),
    Mutant("int32 offset", "row * params.x_row_stride", "static_cast<int>(row) * static_cast<int>(params.x_row_stride)",
           ("integer overflow",), row_stride=(1 << 30) + 64),
    Mutant("uint32 offset", "row * params.x_row_stride", "static_cast<unsigned>(row * params.x_row_stride)",
           ("out of bounds",), row_stride=(1 << 31) + 64),
    Mutant("offset narrowed to int32", "row * params.x_row_stride", "static_cast<int>(row * params.x_row_stride)",
           ("out of bounds",), row_stride=(1 << 31) + 64),
    Mutant("uninitialised shared read", "if (threadIdx.x % 32 == 0) partial", "if (threadIdx.x % 64 == 0) partial", ("uninitialised read",)),
    Mutant("wait dropped", "    ptx::cp_async_wait<1>();\n", "", ("pending copy",)),
    Mutant("waits for one group too few", "cp_async_wait<1>", "cp_async_wait<2>", ("pending copy",)),
    Mutant("barrier in a branch", READY_BARRIER, "    if (threadIdx.x < 64) __syncthreads();\n    else __syncthreads();\n",
           ("divergent barrier", "deadlock")),
)  # fmt: skip


def _library(mutant):
    source = (emulator.ROOT / SAMPLE).read_text()
    assert source.count(mutant.old) == 1, f"{mutant.name}: {mutant.old!r} stands {source.count(mutant.old)} times in {SAMPLE}"
    folder = emulator.BUILD / "mutants" / mutant.name.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sample.cu").write_text(source.replace(mutant.old, mutant.new))
    return emulator.library("sample_mutant", [folder / "sample.cu"])


@pytest.fixture(scope="module")
def mutated():
    emulator.core()
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(MUTANTS, pool.map(_library, MUTANTS), strict=True))


def run(library, row_stride, seed):
    """What the sample computes, compared with torch."""
    with emulator.Memory() as memory:
        x = memory.strided("x", (ROWS, COLUMNS), (row_stride, 1), torch.float32, "read-only")
        x.copy_(torch.rand(ROWS, COLUMNS) + 0.5)
        y = memory.place("y", torch.empty(ROWS, COLUMNS), "uninitialised")
        sizes = [ctypes.c_int64(n) for n in (ROWS, COLUMNS, row_stride, COLUMNS)]
        library.run("launch_sample", x, y, *sizes, seed=seed)
        expected = x.double() / x.double().sum(1, keepdim=True)
        right = (y.double() - expected).abs() <= 1e-6 * expected
    if not right.all():
        raise emulator.KernelError(f"{WRONG_RESULT}: {int((~right).sum())} elements")


@pytest.mark.parametrize("row_stride", sorted({mutant.row_stride for mutant in MUTANTS}))
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_the_sample_is_clean(row_stride, seed):
    run(emulator.library("sample", [SAMPLE]), row_stride, seed)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_killed(mutated, mutant, seed):
    with pytest.raises(emulator.KernelError) as found:
        run(mutated[mutant], mutant.row_stride, seed)
    assert found.value.kind in mutant.kinds, str(found.value)
