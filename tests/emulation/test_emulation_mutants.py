"""The emulator is trusted after it has killed mutants: each mistake here, put into a clean kernel, must be found.

A mutant is one replacement in the source; the mutated copy is compiled in front of the original. What it must be found
by is named too: a report of that kind, or the comparison of the results where the mistake breaks no rule of memory.
"""

import ctypes
from typing import NamedTuple

import emulated_ops
import emulator
import pytest
import torch
from kernel_mutants import NAMESPACE, SOON, WRONG_RESULT, KernelMutant, copied, is_killed, replaced, side_by_side

import transfuse

# ---- mistakes in a small kernel that has one of everything ----

SAMPLE = "tests/emulation/kernels/sample.cu"
ROWS, COLUMNS = 3, 300  # the last of three tiles is cut


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
    Mutant(
        "missing barrier in the reduction",
        "  __syncthreads();\n  float total",
        "  float total",
        ("uninitialised read", "race"),
    ),
    Mutant(
        "barrier of a warp instead of the block",
        READY_BARRIER,
        "    __syncwarp();\n",
        ("pending copy", "uninitialised read", "race"),
    ),
    Mutant(
        "wrong tail predicate of the load",
        "inside = column < num_columns",
        "inside = column <= num_columns",
        ("out of bounds",),
    ),
    Mutant(
        "wrong tail predicate of the store",
        "column < params.num_columns; column +=",
        "column <= params.num_columns; column +=",
        ("out of bounds", "race"),
    ),  # the element behind a row is the next row's first
    Mutant(
        "tail left out",
        "column < params.num_columns; column +=",
        "column + 1 < params.num_columns; column +=",
        (WRONG_RESULT,),
    ),
    Mutant("wrong shuffle mask", "full_warp = 0xffffffffu", "full_warp = 0x0000ffffu", ("wrong lane mask",)),
    Mutant("shuffle over half of the warp", "lanes = 16", "lanes = 8", (WRONG_RESULT,)),
    Mutant(
        "int32 offset",
        "row * params.x_row_stride",
        "static_cast<int>(row) * static_cast<int>(params.x_row_stride)",
        ("integer overflow",),
        row_stride=(1 << 30) + 64,
    ),
    Mutant(
        "uint32 offset",
        "row * params.x_row_stride",
        "static_cast<unsigned>(row * params.x_row_stride)",
        ("out of bounds",),
        row_stride=(1 << 31) + 64,
    ),
    Mutant(
        "offset narrowed to int32",
        "row * params.x_row_stride",
        "static_cast<int>(row * params.x_row_stride)",
        ("out of bounds",),
        row_stride=(1 << 31) + 64,
    ),
    Mutant(
        "uninitialised shared read",
        "if (threadIdx.x % 32 == 0) partial",
        "if (threadIdx.x % 64 == 0) partial",
        ("uninitialised read",),
    ),
    Mutant("wait dropped", "    ptx::cp_async_wait<1>();\n", "", ("pending copy",)),
    Mutant("waits for one group too few", "cp_async_wait<1>", "cp_async_wait<2>", ("pending copy",)),
    Mutant(
        "barrier in a branch",
        READY_BARRIER,
        "    if (threadIdx.x < 64) __syncthreads();\n    else __syncthreads();\n",
        ("divergent barrier", "deadlock"),
    ),
)


def _library(mutant):
    folder = emulator.BUILD / "mutants" / mutant.name.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sample.cu").write_text(replaced((emulator.ROOT / SAMPLE).read_text(), mutant.old, mutant.new))
    return emulator.compiled("sample_mutant", [folder / "sample.cu"])


@pytest.fixture(scope="module")
def mutated():
    return side_by_side(_library, MUTANTS)


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
    library = emulator.load(mutated[mutant])
    with pytest.raises(emulator.KernelError) as found:
        run(library, mutant.row_stride, seed)
    assert found.value.kind in mutant.kinds, str(found.value)


# ---- mistakes in layer_norm as it ships ----

KERNEL_MUTANTS = (
    KernelMutant(
        "missing barrier",
        "reduce.cuh",
        "    __syncthreads();\n    return reduce_lanes<warps>",
        "    return reduce_lanes<warps>",
        ("uninitialised read", "race"),
    ),
    KernelMutant(
        "tail of a load", "vector.cuh", "if (at < end) v.word[i] |=", "if (at <= end) v.word[i] |=", ("out of bounds",)
    ),
    KernelMutant(
        "tail of a store", "vector.cuh", "if (at < end) set_bits", "if (at <= end) set_bits", ("out of bounds", "race")
    ),
    KernelMutant(
        "wrong shuffle mask", "reduce.cuh", "whole_warp = 0xFFFFFFFFu", "whole_warp = 0x0000FFFFu", ("wrong lane mask",)
    ),
    KernelMutant(
        "int32 offset", "norm_rows.cuh", "row * rows.stride", "static_cast<int>(row * rows.stride)", ("out of bounds",)
    ),
    KernelMutant(
        "uninitialised shared read",
        "reduce.cuh",
        "if (threadIdx.x % warp_size == 0) exchange",
        "if (threadIdx.x % (2 * warp_size) == 0) exchange",
        ("uninitialised read",),
    ),
    KernelMutant(
        "misaligned rows taken as vectors",
        "vector.cuh",
        "% vector_bytes == 0 && cols",
        "% vector_bytes != 1 && cols",
        ("misaligned access",),
    ),
)
# The forward in one dtype is enough, and compiles in a fraction of the time.
NARROWED = (
    (
        "vector.cuh",
        "      return body(bf16{});\n    case DType::f16:\n      return body(f16{});\n",
        "    case DType::f16:\n",
    ),
    ("layer_norm.cu", "return norm_backward<LayerNorm>(params, dtype, stream);", "return cudaErrorNotSupported;"),
)


def _mutated_layer_norm(mutant):
    folder = copied("layer_norm", mutant, NARROWED)
    return emulated_ops.compiled("layer_norm", NAMESPACE, [folder / "cuda" / "layer_norm.cu"], [folder], SOON)


@pytest.fixture(scope="module")
def mutated_kernels():
    return side_by_side(_mutated_layer_norm, KERNEL_MUTANTS)


def check_layer_norm(mode):
    """Rows of every kind: on vectors, with a tail, between alignments, far apart; one warp to a row and several."""
    with emulator.Memory() as memory:
        far = memory.strided("far", (3, 600), ((1 << 31) + 8, 1), torch.float32, "read-only")
        inputs = [
            torch.randn(5, 600),
            torch.randn(5, 603),
            torch.randn(5 * 600 + 1)[1:].view(5, 600),
            far.copy_(torch.randn(3, 600)),
        ]
        for input in inputs:
            cols = input.shape[-1]
            with mode:
                output = transfuse.layer_norm(input, (cols,))
            expected = torch.nn.functional.layer_norm(input.double(), (cols,))
            if not (output.double() - expected).abs().max() < 1e-5:
                raise emulator.KernelError(WRONG_RESULT)


def test_layer_norm_as_it_ships_passes_what_its_mutants_must_not():
    for seed in (0, 1):
        check_layer_norm(emulated_ops.EmulatedKernels(seed))


@pytest.mark.parametrize("mutant", KERNEL_MUTANTS, ids=lambda mutant: mutant.name)
@pytest.mark.filterwarnings("ignore:.*[Oo]verriding a previously registered kernel")
def test_mutant_of_layer_norm_is_killed(mutated_kernels, mutant):
    is_killed(mutant, mutated_kernels[mutant], check_layer_norm, seeds=(0, 1))
