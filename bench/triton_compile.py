"""Compiles Triton kernels for a GPU that is not there, and says what came out.

    with launch.recording(launch.SM90) as recorded:
        layer_norm_forward(torch.empty(8, 768, device="meta"), ...)
    found = compiled(recorded.calls[0], launch.SM90)
    found.ptx, found.spills, found.shared_bytes

Needs a process without TRITON_INTERPRET.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64", torch.bool: "*i1",
    torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8", torch.int8: "*i8",
}  # fmt: skip
_ALIGNED = 16


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel. ptx is "" on AMD, amdgcn on NVIDIA; spills counts spilled registers (None: not told)."""

    name: str
    ptx: str
    amdgcn: str
    spills: int | None
    registers: int | None
    shared_bytes: int


def specialization(call):
    """(types, constants, alignments) of a recorded launch.Call as the launch would find them: an integer of 1 is a
    constant, a multiple of 16 and an address on a 16-byte boundary are known, but where the kernel asks for neither."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(call.kernel.params):
        value = call.arguments.get(parameter.name, parameter.default)
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value.value if isinstance(value, tl.constexpr) else value
        else:
            plain = parameter.do_not_specialize
            unaligned = plain or parameter.do_not_specialize_on_alignment
            signature[parameter.name] = _type_of(value, (index,), constants, attributes, plain, unaligned)
    return signature, constants, attributes


def compiled(call, architecture):
    """Compiles a recorded launch.Call as the launch would."""
    signature, constants, attributes = specialization(call)
    target = GPUTarget(architecture.backend, architecture.name, architecture.warp_size)
    source = ASTSource(call.kernel, signature, constants, attributes)
    binary = triton.compile(source, target=target, options=dict(call.options))
    text, metadata = binary.asm, binary.metadata
    spills, registers = _resources(binary, architecture)
    return Compiled(
        call.kernel.fn.__name__, text.get("ptx", ""), text.get("amdgcn", ""), spills, registers, metadata.shared
    )


def _type_of(value, path, constants, attributes, plain, unaligned):
    """The type of an argument, or of a tuple's parts, as the launch would see it; what is known of it by its path."""
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_POINTERS[value.base.dtype][1:]}{list(value.block_shape)}>"
    if isinstance(value, tuple):
        told = (constants, attributes, plain, unaligned)
        parts = [_type_of(part, (*path, index), *told) for index, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if value is None or (type(value) is int and value == 1 and not plain):
        constants[path] = value
        return "constexpr"
    address = value.data_ptr() if isinstance(value, torch.Tensor) else value
    if type(address) is int and address % _ALIGNED == 0 and not unaligned:
        attributes[path] = [["tt.divisibility", _ALIGNED]]
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, int):
        return "i1" if isinstance(value, bool) else "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _resources(binary, architecture):
    """(spilled bytes or registers, registers per thread) as the assembler's own metadata tells them."""
    if architecture.backend == "hip":
        found = {}
        for line in binary.asm["amdgcn"].splitlines():
            key, _, value = line.strip().removeprefix(".").partition(":")
            if key in ("vgpr_spill_count", "sgpr_spill_count", "vgpr_count"):
                found[key] = int(value)
        return found.get("vgpr_spill_count", 0) + found.get("sgpr_spill_count", 0), found.get("vgpr_count")
    return _cubin_resources(binary.asm["cubin"])


def _cubin_resources(cubin):
    """Stack bytes (spills and nothing else: our kernels have no arrays) and registers, by Triton's own cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", text)[1]), int(re.search(r"REG:(\d+)", text)[1])
