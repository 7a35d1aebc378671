"""What every function of kernels/cuda/ptx.cuh must do, as data written from the PTX ISA document (version 9.0).

    python tests/emulation/ptx_cases.py               # which functions have run on a device, and which never have
    python tests/emulation/ptx_cases.py --device      # compiles ptx_cases.cu with nvcc and runs all of it on this GPU

The emulator runs the same cases (test_emulation_ptx.py), so that a case which passes there and on a device ties the
two together. Source: https://docs.nvidia.com/cuda/parallel-thread-execution/, section by section below.
"""

import ctypes
import math
import shutil
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent

# Function -> where and when its cases have passed on hardware. What is not here is emulated only.
RUN_ON_A_DEVICE = {}


class Case(NamedTuple):
    """One launch of one kernel of ptx_cases.cu.

    Args:
        kernel: its name there; functions: what of ptx.cuh it shows.
        words: uint32, what the kernel reads; expected: uint32, what it must write.
        max_ulp: how far float results may be from `expected`, in units of float32's last place; 0: the very bits.
        architecture: the smallest that runs it; only: (lowest, highest) where the document leaves the result open and
            it is a model of the hardware that is tested.
    """

    name: str
    kernel: str
    functions: tuple[str, ...]
    words: np.ndarray
    expected: np.ndarray
    n: int = 0
    grid: int = 1
    block: int = 32
    shared_bytes: int = 0
    cluster: int = 1
    max_ulp: float = 0
    architecture: int = 80
    only: tuple[int, int] = (80, 999)

    def runs_on(self, architecture):
        return architecture >= self.architecture and self.only[0] <= architecture <= self.only[1]

    def mistakes(self, found):
        """Indices of the words that are not as expected."""
        found = np.asarray(found, dtype=np.uint32)
        wrong = found != self.expected
        if self.max_ulp:
            have, want = found.view(np.float32).astype(np.float64), self.expected.view(np.float32).astype(np.float64)
            with np.errstate(invalid="ignore", divide="ignore"):
                unit = np.spacing(np.abs(self.expected.view(np.float32))).astype(np.float64)
                # The exact value lies half a unit from `expected` at most.
                wrong &= ~(np.abs(have - want) <= (self.max_ulp + 0.5) * unit)
            wrong &= ~(np.isnan(have) & np.isnan(want))
        return np.flatnonzero(wrong)


def floats(*values):
    return np.array(values, dtype=np.float32).view(np.uint32)


def elementwise(function, special, ordinary, exact, max_ulp):
    """A table of special values, held to the bit, and ordinary ones, held to the document's error."""
    inputs, results = (np.concatenate([floats(v) for v in column]) for column in zip(*special, strict=True))
    yield Case(f"{function}: special values", function, (function,), inputs, results, n=len(inputs), block=64,
               max_ulp=1e-9)  # fmt: skip  # a NaN may be any NaN
    values = np.array(ordinary, dtype=np.float32)
    expected = exact(values.astype(np.float64)).astype(np.float32)
    yield Case(
        f"{function}: {len(values)} values",
        function,
        (function,),
        values.view(np.uint32),
        expected.view(np.uint32),
        n=len(values),
        grid=(len(values) + 63) // 64,
        block=64,
        max_ulp=max_ulp,
    )


INF, NAN, TINY = float("inf"), float("nan"), 2.0**-140  # TINY is subnormal


def approximations():
    """9.7.3: ex2, rcp, rsqrt with .approx.ftz; the tables of each instruction."""
    generator = np.random.default_rng(0)
    spread = generator.uniform(1, 2, 500) * 2.0 ** generator.integers(-120, 120, 500)
    yield from elementwise(
        "exp2_approx",
        (
            (-INF, 0.0),
            (-TINY, 1.0),
            (-0.0, 1.0),
            (0.0, 1.0),
            (TINY, 1.0),
            (INF, INF),
            (NAN, NAN),
            (128.0, INF),
            (-140.0, 0.0),
        ),
        generator.uniform(-125.9, 127.9, 2000),
        np.exp2,
        max_ulp=2,
    )
    yield from elementwise(
        "reciprocal_approx",
        ((-INF, -0.0), (-TINY, -INF), (-0.0, -INF), (0.0, INF), (TINY, INF), (INF, 0.0), (NAN, NAN), (2.0**127, 0.0)),
        np.concatenate([spread, -spread]),
        lambda x: 1 / x,
        max_ulp=1,
    )
    # A relative error of 2^-22.9 is up to 2 * 2^(24 - 22.9) / 2 units.
    yield from elementwise(
        "rsqrt_approx",
        ((-INF, NAN), (-1.0, NAN), (-0.0, -INF), (0.0, INF), (TINY, INF), (INF, 0.0), (NAN, NAN)),
        spread,
        lambda x: 1 / np.sqrt(x),
        max_ulp=2.0**1.1,
    )


def asynchronous_copies():
    """9.7.9.25: cp.async, its source size, groups."""
    functions = ("cp_async", "cp_async_commit", "cp_async_wait")
    for size in (4, 8, 16):
        words = np.arange(1, 1 + 8 * size, dtype=np.uint32)
        for source_bytes in sorted({0, 1, 3, size // 2, size}):
            rows = words.view(np.uint8).reshape(32, size).copy()
            rows[:, source_bytes:] = 0
            yield Case(
                f"cp_async<{size}> of {source_bytes} bytes",
                f"cp_async<{size}>",
                functions,
                words,
                rows.view(np.uint32).ravel(),
                n=source_bytes,
                shared_bytes=32 * size,
            )
    words = np.arange(64, dtype=np.uint32) * 3 + 1
    yield Case("the older of two groups, then the newer", "cp_async_groups", functions, words, words, shared_bytes=256)


def matrix_loads():
    """9.7.14.5.15: ldmatrix. Thread i of a matrix receives row i / 4, elements 2 * (i % 4) and the next."""
    words = np.random.default_rng(1).integers(0, 2**32, 128, dtype=np.uint32)
    rows = words.view(np.uint16).reshape(32, 8)[np.arange(32) * 5 % 32]  # as the lanes point
    for matrices in (1, 2, 4):
        for transposed in (False, True):
            registers = []
            for matrix in rows[: 8 * matrices].reshape(matrices, 8, 8):
                matrix = matrix.T if transposed else matrix
                registers.append(
                    [int(matrix[i // 4, 2 * (i % 4)]) | int(matrix[i // 4, 2 * (i % 4) + 1]) << 16 for i in range(32)]
                )
            yield Case(
                f"ldmatrix x{matrices}{' transposed' if transposed else ''}",
                f"ldmatrix<{matrices}{', transposed' if transposed else ''}>",
                ("ldmatrix",),
                words,
                np.array(registers, dtype=np.uint32).ravel(),
                shared_bytes=512,
            )


def half_bits(values):
    return np.asarray(values, dtype=np.float16).view(np.uint16).astype(np.uint32)


def bfloat_bits(values):
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any(), "not a bfloat16"
    return bits >> 16


def fragments(kind, a, b, c):
    """The registers of each lane, by the formulas of 9.7.14.5.8 (m16n8k16) and 9.7.14.5.6 (m16n8k8, .tf32)."""
    words = np.zeros((32, 10), dtype=np.uint32)
    bits = {"f16": half_bits, "bf16": bfloat_bits}.get(kind)
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        if kind == "tf32":
            for i in range(4):
                row, column = (group if i in (0, 2) else group + 8), (thread if i < 2 else thread + 4)
                words[lane, i] = np.float32(a[row, column]).view(np.uint32)
            for i in range(2):
                words[lane, 4 + i] = np.float32(b[thread + 4 * i, group]).view(np.uint32)
        else:
            for i in range(8):  # a_i in register i / 2
                row = group if i < 2 or 4 <= i < 6 else group + 8
                column = thread * 2 + (i & 1) + (0 if i < 4 else 8)
                words[lane, i // 2] |= bits(a[row, column]) << (16 * (i & 1))
            for i in range(4):
                row = thread * 2 + (i & 1) + (0 if i < 2 else 8)
                words[lane, 4 + i // 2] |= bits(b[row, group]) << (16 * (i & 1))
        words[lane, 6:] = accumulators(c)[lane]
    return words.ravel()


def accumulators(matrix):
    """c_i and d_i: row group for i < 2, else group + 8; column 2 * thread + (i & 1)."""
    matrix = np.asarray(matrix, dtype=np.float32)
    lanes = [[matrix[lane // 4 + (0 if i < 2 else 8), lane % 4 * 2 + (i & 1)] for i in range(4)] for lane in range(32)]
    return np.array(lanes, dtype=np.float32).view(np.uint32)


ADDERS = {80: ({"f16": 8, "bf16": 8, "tf32": 4}, 1), 90: ({"f16": 16, "bf16": 16, "tf32": 8}, 2)}


def added_by_hardware(kind, architecture, a, b, c):
    """a @ b + c as tensor_core.cpp says that tensor cores add, here in exact arithmetic.

    So many products at once, each cut off some bits below float32's last place beside the largest, as is their sum.
    """
    blocks, extra_bits = ADDERS[architecture]
    smallest = -14 if kind == "f16" else -126

    def top(value):  # of a number over a power of two
        return abs(value.numerator).bit_length() - value.denominator.bit_length()

    def cut(value, place):
        return Fraction(math.trunc(value / Fraction(2) ** place)) * Fraction(2) ** place

    def add(total, pairs):
        pairs = [(Fraction(float(x)), Fraction(float(y))) for x, y in pairs if x and y]
        exponents = [max(top(x), smallest) + max(top(y), smallest) for x, y in pairs]
        exponents += [max(top(total), -126)] if total else []
        if not exponents:
            return total
        place = max(exponents) - 23 - extra_bits
        total = sum((cut(x * y, place) for x, y in pairs), cut(total, place))
        return cut(total, max(top(total), -126) - 23) if total else total

    result = np.empty(c.shape, dtype=np.float32)
    for row, column in np.ndindex(*c.shape):
        total = Fraction(float(c[row, column]))
        for start in range(0, a.shape[1], blocks[kind]):
            steps = slice(start, start + blocks[kind])
            total = add(total, zip(a[row, steps], b[steps, column], strict=True))
        result[row, column] = float(total)
    return result


def of_every_size(generator, kind, shape):
    """Operands from 2^-22 to 2^6, subnormal ones of float16 among them, and zeros."""
    values = np.ldexp(generator.standard_normal(shape), generator.integers(-20, 5, shape)).astype(np.float32)
    values[generator.random(shape) < 0.1] = 0
    if kind == "f16":
        return values.astype(np.float16).astype(np.float32)
    return (values.view(np.uint32) & np.uint32(0xFFFF0000 if kind == "bf16" else 0xFFFFE000)).view(np.float32)


def products():
    """mma.sync: layout with whole numbers, whose sums are exact in any order; then the hardware's way of adding."""
    generator = np.random.default_rng(2)
    for kind, function, k in (
        ("f16", "mma_m16n8k16_f16", 16),
        ("bf16", "mma_m16n8k16_bf16", 16),
        ("tf32", "mma_m16n8k8_tf32", 8),
    ):
        a, b, c = (generator.integers(-9, 10, shape).astype(np.float32) for shape in ((16, k), (k, 8), (16, 8)))

        def case(what, a, b, c, d, kind=kind, function=function, **options):
            return Case(
                f"{function}: {what}",
                function,
                (function,),
                fragments(kind, a, b, c),
                accumulators(d).ravel(),
                **options,
            )

        yield case("whole numbers", a, b, c, a.astype(np.float64) @ b + c)
        one_b = np.zeros((k, 8), dtype=np.float32)
        one_b[k - 1] = 1
        yield case("the last of k alone", a, one_b, c, c + a[:, k - 1 :])
        for value in (INF, -INF, NAN):
            special = c.copy()
            special[3, 5] = value
            expected = a.astype(np.float64) @ b + special
            yield case(f"{value} in the accumulator", a, b, special, expected, max_ulp=1e-9)
        # 1 + 7 * 2^-25 in one block: sm_80 cuts addends off below 2^-24, sm_90 below 2^-25, and sums below 2^-23.
        ones, small = np.zeros((16, k), dtype=np.float32), np.zeros((k, 8), dtype=np.float32)
        ones[:, : min(8, k)], small[: min(8, k)] = 2.0**-12, 2.0**-13
        ones[:, 0], small[0] = 1, 1
        zero = np.zeros((16, 8), dtype=np.float32)
        yield case("addends cut off, sm_80", ones, small, zero, zero + 1, only=(80, 89))
        yield case("addends cut off, sm_90", ones, small, zero, zero + np.float32(1 + 2.0**-23), only=(90, 90))
        mixed = [of_every_size(generator, kind, shape) for shape in ((16, k), (k, 8), (16, 8))]
        for architecture, last in ((80, 89), (90, 90)):
            expected = added_by_hardware(kind, architecture, *mixed)
            yield case(f"numbers of every size, sm_{architecture}", *mixed, expected, only=(architecture, last))
        # -(1 + 2^-23 + 2^-24) is cut towards 0, where rounding to nearest would give -(1 + 2^-22).
        cut = np.zeros((16, k), dtype=np.float32)
        cut[:, 0], cut[:, 1] = -1, -(2.0**-11)
        other = np.zeros((k, 8), dtype=np.float32)
        other[0], other[1] = 1, 2.0**-12 + 2.0**-13
        yield case("sums cut off towards 0", cut, other, zero, zero - np.float32(1 + 2.0**-23))
    # tf32's operands lose their last 13 bits.
    a, b = np.full((16, 8), 1 + 2.0**-10 + 2.0**-12, dtype=np.float32), np.zeros((8, 8), dtype=np.float32)
    b[2] = 1
    d = np.full((16, 8), 1 + 2.0**-10, dtype=np.float32)
    yield Case(
        "mma_m16n8k8_tf32: operands cut off",
        "mma_m16n8k8_tf32",
        ("mma_m16n8k8_tf32",),
        fragments("tf32", a, b, np.zeros((16, 8))),
        accumulators(d).ravel(),
    )


def barriers():
    """9.7.13.1: bar.sync and bar.arrive; 9.7.13.4: barrier.cluster; 9.7.9.23: mapa; 10: %cluster_ctarank."""
    words = np.arange(7, 12, dtype=np.uint32)
    yield Case(
        "five words handed from warp to warp",
        "named_barriers",
        ("named_barrier_sync", "named_barrier_arrive"),
        words,
        np.repeat(words, 32),
        n=5,
        block=64,
        shared_bytes=16,
    )
    words = np.arange(100, 108, dtype=np.uint32)
    expected = [(i % 4, 4, 100 + i // 4 * 4 + (i - 1) % 4) for i in range(8)]
    yield Case(
        "a ring of four blocks",
        "clusters",
        ("cluster_rank", "cluster_size", "cluster_sync", "cluster_shared"),
        words,
        np.array(expected, dtype=np.uint32).ravel(),
        grid=8,
        cluster=4,
        architecture=90,
    )


def nothing():
    """No instruction: what the compiler is not told has to come out as it went in."""
    words = np.arange(0xFFFFFFF0, 0x100000030, dtype=np.uint64).astype(np.uint32)
    yield Case("words as they were", "opaque", ("opaque",), words, words, n=len(words))


CASES = (*approximations(), *asynchronous_copies(), *matrix_loads(), *products(), *barriers(), *nothing())
FUNCTIONS = sorted({function for case in CASES for function in case.functions})
EMULATED_ONLY = [function for function in FUNCTIONS if function not in RUN_ON_A_DEVICE]


# ---- on a device ----


def device_library(architecture, folder):
    """ptx_cases.cu as a shared library for one architecture, such as "90a"."""
    target = Path(folder) / f"ptx_cases_sm_{architecture}.so"
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    command = [
        "nvcc",
        "-std=c++17",
        "-O2",
        "-shared",
        "-Xcompiler",
        "-fPIC",
        "-gencode",
        code,
        "-I",
        HERE.parent.parent / "kernels",
        HERE / "kernels" / "ptx_cases.cu",
        "-o",
        target,
    ]
    subprocess.run([str(part) for part in command], check=True, cwd=folder)  # -include looks where nvcc is started
    return target


def run_on_device(folder):
    """Runs every case on this GPU; yields (case, indices of wrong words)."""
    import torch

    architecture = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    run = ctypes.CDLL(str(device_library(f"{architecture}{'a' if architecture == 90 else ''}", folder))).run_ptx_case
    for case in CASES:
        if not case.runs_on(architecture):
            continue
        given = torch.from_numpy(case.words.view(np.int32).copy()).cuda()
        taken = torch.full((len(case.expected),), -1, dtype=torch.int32, device="cuda")
        torch.cuda.synchronize()  # the kernel runs on the default stream
        status = run(
            case.kernel.encode(),
            ctypes.c_void_p(given.data_ptr()),
            ctypes.c_void_p(taken.data_ptr()),
            ctypes.c_int64(case.n),
            case.grid,
            case.block,
            ctypes.c_int64(case.shared_bytes),
            case.cluster,
        )
        torch.cuda.synchronize()
        assert status == 0, f"{case.name}: cudaError_t {status}"
        yield case, case.mistakes(taken.cpu().numpy().view(np.uint32))


def main():
    if "--device" not in sys.argv:
        print("run on a device:", ", ".join(sorted(RUN_ON_A_DEVICE)) or "none")
        print("emulated only:  ", ", ".join(EMULATED_ONLY))
        return 0
    if shutil.which("nvcc") is None:
        print("PTX cases: not run, there is no nvcc on the PATH")
        return 0
    passed = failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for case, wrong in run_on_device(folder):
            if len(wrong):
                print(f"PTX case FAILED: {case.name}, words {wrong[:8].tolist()}")
            failed += bool(len(wrong))
            passed += not len(wrong)
    print(f"PTX cases: {passed} passed, {failed} failed; functions: {', '.join(FUNCTIONS)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
