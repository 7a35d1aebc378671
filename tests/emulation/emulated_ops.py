"""The raw ops of transfuse on the emulated CUDA kernels: csrc/cuda_<op>.cpp and kernels/cuda/<op>.cu, as they ship.

    with EmulatedKernels(seed=1):
        transfuse.layer_norm(x, (768,), weight, bias)      # runs kernels/cuda/layer_norm.cu on the CPU

Tensors stay on the CPU, so all of transfuse's checks and promises run on the CUDA kernels unchanged: under this mode
a raw op that has an emulated kernel goes there, every other op runs as it always does.
"""

import itertools
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import emulator
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from transfuse import extension  # noqa: F401  registers the schemas
from transfuse.ops.attention_checks import CUDA_DECODE_HEAD_DIM

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STEMS = re.search(r"^set\(OPS ([^)]*)\)", (emulator.ROOT / "CMakeLists.txt").read_text(), re.M).group(1).split()


# Siblings with a library of their own: their tests and mutants need no unit of the op beside them.
APART = ("attention_decode",)


def sources_of(stem):
    """(kernels, host code) of one library, found as CMakeLists.txt finds them."""
    kernels = emulator.ROOT / "kernels" / "cuda"
    host = emulator.ROOT / "csrc"
    elsewhere = [sibling for sibling in APART if sibling != stem]
    return [
        sorted(
            path
            for path in {*folder.glob(f"{prefix}{stem}.{kind}"), *folder.glob(f"{prefix}{stem}_*.{kind}")}
            if not any(path.stem.removeprefix(prefix).startswith(sibling) for sibling in elsewhere)
        )
        for folder, prefix, kind in ((kernels, "", "cu"), (host, "cuda_", "cpp"))
    ]


# Of attention's units: one whose rows are whole groups of eight chunks, one of four, and the widest; `make test FULL=1`
# asks for all. A problem takes the next larger one.
ATTENTION_HEAD_DIMS = tuple(map(int, os.environ.get("TRANSFUSE_EMULATED_HEAD_DIMS", "64 96 256").split()))
# Attention in float32 multiplies on no tensor core: every product is a thread's own, and costs most here.
FLOAT32_SEEDS = int(os.environ.get("TRANSFUSE_EMULATED_SEEDS", "8"))
# Entries of the batches that attention's invariance is asked of: each is blocks of its own. FULL=1 takes all 512.
LARGEST_BATCH = int(os.environ.get("TRANSFUSE_EMULATED_BATCH", "17"))


def attention_units(head_dims=ATTENTION_HEAD_DIMS, types=("f16", "bf16")):
    """What the build makes of cmake/attention_unit.cu.in, and the definition that lists it for attention.cu."""
    template = (emulator.ROOT / "cmake" / "attention_unit.cu.in").read_text()
    folder = emulator.BUILD / "units"
    folder.mkdir(parents=True, exist_ok=True)
    units = []
    for head_dim, of_type in itertools.product(head_dims, types):
        unit = folder / f"attention_{head_dim}_{of_type}.cu"
        text = template.replace("@HEAD_DIM@", str(head_dim)).replace("@TYPE@", of_type)
        if not unit.exists() or unit.read_text() != text:
            unit.write_text(text)
        units.append(unit)
    listed = " ".join(f"TRANSFUSE_UNIT({head_dim})" for head_dim in head_dims)
    return units, (f"-DTRANSFUSE_ATTENTION_HEAD_DIMS={listed}",)


# Stems whose kernels and host code both exist.
EMULATED = tuple(stem for stem in STEMS if all(sources_of(stem)))
LIBRARIES = (*EMULATED, *APART)


@lru_cache(maxsize=None)
def _schemas(namespace):
    """The schemas of all raw ops once more, in a namespace of their own. The library lives as long as the process."""
    fragment = torch.library.Library(namespace, "FRAGMENT")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("transfuse::"):
            packet = getattr(torch.ops.transfuse, name.removeprefix("transfuse::").partition(".")[0])
            fragment.define(str(packet.default._schema).removeprefix("transfuse::"))
    return fragment


def compiled(stem, namespace="transfuse_emulated", kernels=None, include=(), options=()):
    """Path of the library of one op, for load(). kernels: instead of those of kernels/cuda."""
    shipped, host = sources_of(stem)
    if kernels is None:
        kernels = shipped
        if stem == "attention":
            units, options = attention_units()
            kernels = [*shipped, *units]
    return emulator.compiled(stem, kernels, host, include, namespace, options)


def load(path, namespace="transfuse_emulated"):
    """The library, whose loading registers its raw ops under torch.ops.<namespace>."""
    _schemas(namespace)
    return emulator.load(path)


@lru_cache(maxsize=None)
def library(stem):
    """The library of one op, compiled if it is not there yet."""
    return load(compiled(stem))


def libraries():
    """Compiles all of them side by side."""
    emulator.core_path()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compiled, LIBRARIES))


def stem_of(name):
    """Whose kernels run the raw op of that name: the stem stands after what says add_ or varlen_."""
    if name.startswith("decode_attention_"):
        return "attention_decode"
    name = name.removeprefix("add_").removeprefix("varlen_")
    return next((stem for stem in EMULATED if name.startswith(f"{stem}_")), None)


def beyond(stem, name, args):
    """Whether a problem is one that the ops page keeps from CUDA."""
    if stem == "attention_decode":  # slopes and sinks are float64 on the CPU, whatever query is
        tensors = args[:2] if name.endswith("_append") else args[:3]
        return args[0].dtype == torch.float64 or max(t.shape[-1] for t in tensors) > CUDA_DECODE_HEAD_DIM
    floats = [t for t in args if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if any(t.dtype == torch.float64 for t in floats):
        return True
    if stem != "attention":
        return False
    backward = name.endswith("_backward")
    return max(t.shape[-1] for t in (args[2:5] if backward else args[:3])) > max(ATTENTION_HEAD_DIMS)


class EmulatedKernels(TorchDispatchMode):
    """Sends raw ops to emulated kernels.

    Args:
        seed: of the order of blocks and threads; 0 is the ascending one.
        blocks_at_ends: n > 0 runs only the first and the last n blocks of every grid.
        namespace, library: a namespace other than that of kernels/cuda, and what serves it; mutants have their own.
    """

    def __init__(self, seed=0, namespace="transfuse_emulated", library=None, blocks_at_ends=0):
        super().__init__()
        self.seed, self.namespace, self.library, self.blocks_at_ends = seed, namespace, library, blocks_at_ends
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = function.name().partition("::")
        stem = stem_of(name) if namespace == "transfuse" else None
        served_by = None if stem is None or beyond(stem, name, args) else self.library or library(stem)
        if served_by is None or not torch._C._dispatch_has_kernel_for_dispatch_key(f"{self.namespace}::{name}", "CPU"):
            return function(*args, **(kwargs or {}))
        self.calls += 1
        arguments = function._schema.arguments
        if stem == "attention_decode":  # as the ops page hands slopes and sinks to a GPU
            args = [t.float() if isinstance(t, torch.Tensor) and t.dtype == torch.float64 else t for t in args]
        with emulator.Memory() as memory, served_by.watched(self.seed, blocks_at_ends=self.blocks_at_ends):
            written = [a.alias_info is not None and a.alias_info.is_write for a in arguments]
            given = _placed(memory, [argument.name for argument in arguments], args, written)
            result = getattr(getattr(torch.ops, self.namespace), name).default(*given)
            for before, after, is_written in zip(args, given, written, strict=True):
                if is_written:
                    before.copy_(after)
            return result


def _placed(memory, names, args, written):
    """The arguments in the emulator's memory. Beside one that is written, those that share memory still share it."""
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    shared, given = {}, []
    for name, value, is_written in zip(names, args, written, strict=True):
        if not isinstance(value, torch.Tensor):
            given.append(value)
            continue
        storage = value.untyped_storage().data_ptr()
        if any(written) and storages.count(storage) > 1 and value.numel():
            if storage not in shared:
                whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
                shared[storage] = memory.place(name, whole, "initialised")
            given.append(shared[storage].as_strided(value.shape, value.stride(), value.storage_offset()))
        else:
            given.append(memory.place(name, value, "initialised" if is_written else "read-only"))
    return given
