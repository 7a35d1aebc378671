"""Limits on what the compiler made of every CUDA kernel: no spills, 128-bit accesses where rows are whole vectors."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("cuda_resources", ROOT / "bench" / "cuda_resources.py")
cuda_resources = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda_resources)

# Static shared memory that a block may have on every architecture, and that leaves a multiprocessor room for four
# blocks.
MAX_SHARED_BYTES = 40 * 1024
ELEMENT_BYTES = {"float": 4, "bf16": 2, "f16": 2}


@pytest.fixture(scope="module")
def resources():
    assert cuda_resources.tool("cuobjdump"), (
        "cuobjdump is missing: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    )
    return cuda_resources.resources(cuda_resources.module_path())


@pytest.fixture(scope="module")
def accesses(resources):
    """Of the newest architecture that is built."""
    return cuda_resources.accesses(cuda_resources.module_path(), sorted({arch for arch, _ in resources})[-1])


def test_no_kernel_spills(resources):
    spilling = [
        f"{kernel} on {arch}: {figures}" for (arch, kernel), figures in resources.items() if figures["stack_bytes"]
    ]
    assert not spilling, "registers spilled to memory:\n" + "\n".join(spilling)


def test_shared_memory_and_registers_leave_room(resources):
    for (arch, kernel), figures in resources.items():
        assert figures["shared_bytes"] <= MAX_SHARED_BYTES, f"{kernel} on {arch}: {figures}"
        assert figures["registers"] <= 255


def test_every_row_kernel_exists_for_every_type(resources):
    for name in cuda_resources.VECTOR_KERNELS:
        for element in ELEMENT_BYTES:
            found = [
                kernel
                for _, kernel in resources
                if kernel.startswith(f"{name}<") and re.search(rf"\b{element}\b", kernel)
            ]
            assert found, f"{name} has no kernel for {element}"


def test_rows_move_in_128_bit_accesses(accesses):
    judged = 0
    for kernel, counts in accesses.items():
        assert counts["local"] == 0, f"{kernel}: {counts}"
        if cuda_resources.moves_vectors(kernel):
            judged += 1
            assert counts["LDG.128"] and counts["STG.128"], f"{kernel}: {counts}"
    assert judged >= 3 * len(cuda_resources.VECTOR_KERNELS)


def test_held_rows_are_loaded_in_whole_vectors_alone(accesses):
    """A held row's kernel for whole vectors reads it in as many 128-bit loads as a thread has vectors, at least."""
    for kernel, counts in accesses.items():
        policy = re.search(r"RowPolicy<\w+, (\d+), (\d+), true>", kernel)
        if policy:
            assert counts["LDG.128"] >= int(policy[2]), f"{kernel}: {counts}"


def test_attention_multiplies_on_tensor_cores(accesses):
    """Two products at least, each of 32 dimensions or more in steps of 16, and of 32 keys in tiles of eight."""
    judged = set()
    for kernel, counts in accesses.items():
        if not any(counts.values()):
            continue  # a tile that this architecture has more memory than: its kernel is empty
        if kernel.partition("<")[0] in cuda_resources.TENSOR_CORE_KERNELS:
            judged.add(kernel)
            assert counts["HMMA"] >= 2 * 2 * 4, f"{kernel}: {counts}"
    for name in cuda_resources.TENSOR_CORE_KERNELS:
        kinds = 1 if name == "attention_grad_bias_kernel" else 2  # plain and general
        assert sum(kernel.startswith(f"{name}<") for kernel in judged) >= 2 * kinds, f"{name} in two types"


def test_decode_reads_its_cache_in_vectors(accesses):
    """A group of keys and one of values, each in as many 128-bit copies as a lane has vectors of them."""
    judged = 0
    for kernel, counts in accesses.items():
        if kernel.partition("<")[0] in cuda_resources.CACHE_KERNELS:
            judged += 1
            head_dim = int(re.search(r"Policy<(?:\w+, )?(\d+)>", kernel)[1])
            assert counts["LDG.128"] >= head_dim // 8, f"{kernel}: {counts}"
    assert judged == 2 * 3 + 2, "three head dimensions in two types, two in float32"
