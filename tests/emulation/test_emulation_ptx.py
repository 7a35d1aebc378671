"""Every function of kernels/cuda/ptx.cuh has cases from the PTX ISA document, and the emulator passes them."""

import ctypes
import os
import re
import shutil
import subprocess

import emulator
import numpy as np
import ptx_cases
import pytest
import torch

PTX = (emulator.ROOT / "kernels" / "cuda" / "ptx.cuh").read_text()
ARCHITECTURES = (80, 90)


@pytest.fixture(scope="module")
def library():
    return emulator.library("ptx_cases", ["tests/emulation/kernels/ptx_cases.cu"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", ptx_cases.CASES, ids=lambda case: case.name)
def test_case(library, case, architecture):
    if not case.runs_on(architecture):
        pytest.skip(f"not a case of sm_{architecture}")
    with emulator.Memory() as memory:
        words = torch.from_numpy(case.words.view(np.int32).copy())
        given = memory.place("in", words, "read-only")
        taken = memory.place("out", torch.empty(len(case.expected), dtype=torch.int32), "uninitialised")
        library.run(
            "run_ptx_case",
            case.kernel.encode(),
            given,
            taken,
            ctypes.c_int64(case.n),
            case.grid,
            case.block,
            ctypes.c_int64(case.shared_bytes),
            case.cluster,
            tensor_core=architecture,
        )
        found = taken.numpy().view(np.uint32).copy()
    wrong = case.mistakes(found)
    assert not len(wrong), f"words {wrong[:8]}: {found[wrong[:8]]}, expected {case.expected[wrong[:8]]}"


def test_every_function_has_cases():
    functions = set(re.findall(r"^__device__ __forceinline__ [\w*]+\*? (\w+)\(", PTX, re.M)) - {"shared_address"}
    assert functions == set(ptx_cases.FUNCTIONS)
    assert set(ptx_cases.RUN_ON_A_DEVICE) <= functions


def test_only_two_files_know_of_the_emulator():
    for path in sorted((emulator.ROOT / "kernels").rglob("*")):
        if path.is_file() and path.name not in ("ptx.cuh", "launch.cuh"):
            assert b"EMULATION" not in path.read_bytes(), f"{path.name} has an emulation branch"


@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_nvcc_takes_every_function(architecture, tmp_path):
    if shutil.which("nvcc") is None:
        message = "nvcc is missing: pip install nvidia-cuda-nvcc nvidia-cuda-cccl, and put it on the PATH"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    listing = ptx_cases.device_library(architecture, tmp_path)
    if shutil.which("cuobjdump"):
        sass = subprocess.run(["cuobjdump", "-sass", str(listing)], capture_output=True, text=True, check=True).stdout
        for instruction in ("LDGSTS", "LDSM", "HMMA.16816", "HMMA.1688", "MUFU.EX2", "MUFU.RCP", "MUFU.RSQ", "BAR.ARV"):
            assert instruction in sass, f"sm_{architecture} has no {instruction}"
