"""What the compiler made of every CUDA kernel, read from transfuse._C_cuda: no GPU is needed.

    python bench/cuda_resources.py [--write bench/results/offline]

Registers, stack, shared memory per kernel and architecture, and the accesses to memory that its machine code holds.
Needs cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm, or a CUDA toolkit on the PATH.
tests/test_cuda_resources.py holds the figures to their limits.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import defaultdict
from pathlib import Path

# Kernels that move their rows in vectors of 16 bytes wherever whole_vectors says so. The others add up small sums.
VECTOR_KERNELS = (
    "norm_forward_kernel", "norm_wide_forward_kernel", "norm_backward_kernel", "norm_wide_backward_kernel",
    "masked_softmax_forward_kernel", "masked_softmax_wide_forward_kernel",
    "masked_softmax_backward_kernel", "masked_softmax_wide_backward_kernel", "gelu_kernel", "rotary_forward_kernel",
)  # fmt: skip
# Kernels whose products must be the tensor cores' and nobody else's.
TENSOR_CORE_KERNELS = (
    "attention_forward_kernel", "attention_grad_query_kernel", "attention_grad_key_kernel", "attention_grad_bias_kernel",
    "attention_decode_kernel",
)  # fmt: skip
# Kernels that read keys and values past the registers, in vectors of 16 bytes (LDGSTS counts as LDG here).
CACHE_KERNELS = ("attention_decode_kernel", "attention_decode_simt_kernel")
REGISTERS_PER_MULTIPROCESSOR = 65536
RESERVED_SHARED = 1024  # of each block on sm_80 and later, counted by cuobjdump from sm_90 on


def module_path():
    """The built _C_cuda, found without importing it."""
    return Path(importlib.util.find_spec("transfuse._C_cuda").origin)


def tool_folders():
    """Where the two packages put their tools."""
    return [Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"]


def tool(name):
    """The path of a CUDA tool, or None."""
    return shutil.which(name, path=os.pathsep.join([*map(str, tool_folders()), os.environ.get("PATH", "")]))


def _run(*command):
    path = os.pathsep.join([*map(str, tool_folders()), os.environ.get("PATH", "")])  # cuobjdump starts nvdisasm
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
    ).stdout


def kernel_name(demangled):
    """norm_forward_kernel<LayerNorm, RowPolicy<bf16, 32, 4, true>> of what c++filt prints."""
    name = demangled.removeprefix("void ").partition("(transfuse")[0]
    name = re.sub(r"transfuse::cuda::|\(anonymous namespace\)::", "", name)
    return re.sub(r"\((?:int|bool)\)", "", name).replace("> >", ">>")


def _demangled(names):
    return dict(zip(names, map(kernel_name, _run("c++filt", *names).splitlines()), strict=True))


def resources(path):
    """{(architecture, kernel): {"registers", "stack_bytes", "shared_bytes"}}, as cuobjdump tells them."""
    architecture, mangled, found = None, None, {}
    for line in _run(tool("cuobjdump"), "--dump-resource-usage", path).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            mangled = match[1]
        elif mangled and (match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line)):
            registers, stack, shared, local = map(int, match.groups())
            if shared and int(re.search(r"\d+", architecture)[0]) >= 90:
                shared -= RESERVED_SHARED
            found[architecture, mangled] = {
                "registers": registers,
                "stack_bytes": stack + local,
                "shared_bytes": shared,
            }
            mangled = None
    names = _demangled(sorted({name for _, name in found}))
    return {(architecture, names[name]): figures for (architecture, name), figures in found.items()}


def accesses(path, architecture):
    """{kernel: {"LDG.128", "LDG", "STG.128", "STG", "local", "HMMA"}}: instructions in one architecture's machine code."""
    kinds = ("LDG.128", "LDG", "STG.128", "STG", "local", "HMMA")
    counts, current = defaultdict(lambda: dict.fromkeys(kinds, 0)), None
    for line in _run(tool("cuobjdump"), "-arch", architecture, "-sass", path).splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            current = counts[match[1]]
        elif re.search(r"\bHMMA\.16816\.F32", line):
            current["HMMA"] += 1
        elif match := re.search(r"\b(LDG|STG|LDL|STL)(\S*)", line):
            kind, suffix = match.groups()
            current["local" if kind in ("LDL", "STL") else f"{kind}.128" if ".128" in suffix else kind] += 1
    names = _demangled(sorted(counts))
    return {names[name]: figures for name, figures in counts.items()}


def moves_vectors(kernel):
    """Whether this kernel must read and write rows in 128-bit accesses: a row kernel not compiled for other rows."""
    return kernel.partition("<")[0] in VECTOR_KERNELS and not kernel.rstrip(">").endswith("false")


def table(rows):
    """A Markdown table, one line per kernel and architecture."""
    lines = ["| kernel | arch | registers | stack | shared | LDG.128 | STG.128 |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| `{row['kernel']}` | {row['architecture']} | {row['registers']} | {row['stack_bytes']} | "
            f"{row['shared_bytes']} | "
            f"{row['LDG.128']} | {row['STG.128']} |"
        )
    return "\n".join(lines) + "\n"


def measured(path):
    """Every kernel's row, sorted."""
    figures = resources(path)
    machine_code = {architecture: accesses(path, architecture) for architecture in sorted({key[0] for key in figures})}
    return [
        {
            "kernel": kernel,
            "architecture": architecture,
            **figures[architecture, kernel],
            **machine_code[architecture][kernel],
        }
        for architecture, kernel in sorted(figures)
    ]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, metavar="DIR", help="write resources.json and resources.md there")
    options = parser.parse_args(argv)
    if tool("cuobjdump") is None or tool("nvdisasm") is None:
        print(
            "cuda_resources: needs cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm",
            file=sys.stderr,
        )
        return 2
    rows = measured(module_path())
    if options.write:
        options.write.mkdir(parents=True, exist_ok=True)
        (options.write / "resources.json").write_text(
            '{"schema": 1, "command": "cuda_resources", "rows": [\n'
            + ",\n".join(json.dumps(row) for row in rows)
            + "\n]}\n"
        )
        (options.write / "resources.md").write_text(
            "# What the compiler made of every CUDA kernel\n\n"
            "Written by `python bench/cuda_resources.py --write bench/results/offline`; "
            "no GPU was involved. Bytes; accesses are instructions in the machine code.\n\n" + table(rows)
        )
    spilling = [row for row in rows if row["stack_bytes"] or row["local"]]
    print(table(spilling or sorted(rows, key=lambda row: -row["registers"])[:10]), end="")
    print(
        f"{len(rows)} kernels, {len(spilling)} with a stack or spills, "
        f"at most {max(row['registers'] for row in rows)} registers"
    )
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
