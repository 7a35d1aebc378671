"""Mistakes put into copies of kernels as they ship: what the suites of mutants share.

A mutant is one replacement in one file of kernels/cuda, beside those that narrow the op to what its suite runs, so that
it compiles in seconds. It must be found: by a report of a kind that is named, or by its results.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import emulated_ops
import emulator
import pytest

NAMESPACE = "transfuse_mutant"
WRONG_RESULT = "wrong result"
SOON = ("-O0",)  # a mutant is compiled once and runs for a second


class KernelMutant(NamedTuple):
    name: str
    file: str  # in kernels/cuda
    old: str
    new: str
    kinds: tuple[str, ...]  # which of them depends on the order in which threads run


def replaced(text, old, new):
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times"
    return text.replace(old, new)


def side_by_side(build, mutants):
    """{mutant: what build(mutant) has made}"""
    emulator.core_path()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(mutants, pool.map(build, mutants), strict=True))


def copied(suite, mutant, narrowed):
    """A folder that holds cuda/, narrowed by (file, old, new) and with the mistake in it; mutant None: as it ships."""
    folder = emulator.BUILD / "mutants" / f"{suite}_{mutant.name if mutant else 'none'}".replace(" ", "_")
    shutil.copytree(emulator.ROOT / "kernels" / "cuda", folder / "cuda", dirs_exist_ok=True)
    for file, old, new in (*narrowed, *([(mutant.file, mutant.old, mutant.new)] if mutant else ())):
        path = folder / "cuda" / file
        path.write_text(replaced(path.read_text(), old, new))
    return folder


def mode_of(path, seed, namespace=NAMESPACE):
    """The raw ops of that library, which register in front of those of the mutant before it."""
    return emulated_ops.EmulatedKernels(seed, namespace, emulated_ops.load(path, namespace))


def is_killed(mutant, path, check, seeds, namespace=NAMESPACE):
    """check(mode) raises what the mutant must be found by, whatever the order of threads."""
    for seed in seeds:
        with pytest.raises(emulator.KernelError) as found:
            check(mode_of(path, seed, namespace))
        assert found.value.kind in mutant.kinds, str(found.value)


# ---- attention: one head dimension, bfloat16, one direction ----

ATTENTION_HEAD_DIM = 32
DIRECTIONS = {"forward": "AttentionParams& p", "backward": "AttentionGradParams& g"}
UNIT = """#include "cuda/attention_launch.cuh"
namespace transfuse::cuda {{
cudaError_t attention_{direction}_{head_dim}_bf16(const {params}, bool general, cudaStream_t stream) {{
  return attention_{direction}_of<bf16, {head_dim}>({params_name}, general, stream);
}}
}}  // namespace transfuse::cuda
"""
FLOAT32_CALL = "if (dtype == DType::f32) return attention_{direction}_f32(prepared<float>(params), stream);\n"
UNIT_CALL = "attention_{direction}_##of_unit##_{type}({params}, general, stream)"


def _narrowed_attention(kept):
    for direction, params in DIRECTIONS.items():
        yield "attention.cu", FLOAT32_CALL.format(direction=direction), ""
        units = {of_type: UNIT_CALL.format(direction=direction, type=of_type, params=params[-1])
                 for of_type in ("f16", "bf16")}  # fmt: skip
        chosen = f"dtype == DType::f16 ? {units['f16']}     \\\n                               : {units['bf16']};"
        yield "attention.cu", chosen, f"{units['bf16']};" if direction == kept else "cudaErrorNotSupported;"


def mutated_attention(direction, mutant):
    """Path of the library of one direction, with the mistake in it; mutant None: as it ships."""
    folder = copied(f"attention_{direction}", mutant, _narrowed_attention(direction))
    params = DIRECTIONS[direction]
    unit = UNIT.format(direction=direction, head_dim=ATTENTION_HEAD_DIM, params=params, params_name=params[-1])
    (folder / "unit.cu").write_text(unit)
    kernels = [folder / "cuda" / "attention.cu", folder / "cuda" / "attention_extra_grads.cu", folder / "unit.cu"]
    options = (*SOON, f"-DTRANSFUSE_ATTENTION_HEAD_DIMS=TRANSFUSE_UNIT({ATTENTION_HEAD_DIM})")
    return emulated_ops.compiled("attention", NAMESPACE, kernels, [folder], options)
