"""Compiles CUDA sources with g++, runs them on the CPU and turns the emulator's findings into errors with source lines.

    library = emulator.library("layer_norm", ["kernels/cuda/layer_norm.cu", "tests/emulation/layer_norm_launcher.cpp"])
    with emulator.Memory() as memory:
        x = memory.place("x", input, "read-only")
        y = memory.place("y", torch.empty_like(input), "uninitialised")
        library.run("launch_layer_norm", x, y, ctypes.c_int64(rows))
        result = y.clone()

Compiled libraries are kept in build/emulation under the hash of everything that went into them.
"""

import ctypes
import fcntl
import hashlib
import mmap
import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "emulation"
COMPILER = os.environ.get("CXX", "g++")

CORE_SOURCES = ("machine.cpp", "synchronization.cpp", "memory.cpp", "tensor_core.cpp", "watchdog.cpp")
INSIDES = ("machine.h", "interface.h")  # headers that no kernel sees
CORE_FLAGS = "-std=c++20 -O3 -g1 -fPIC -Wall -Wextra -ffp-contract=off".split()
KERNEL_FLAGS = (
    *"-std=c++20 -O1 -g1 -fPIC -Wall -Wno-unknown-pragmas -Wno-attributes".split(),
    "-ffp-contract=off",  # as nvcc --fmad=false: an FMA is written
    "-fno-strict-aliasing",  # as nvcc: kernels read vectors through pointers to elements
    "-ftrivial-auto-var-init=pattern",  # what a register holds before it is written is no zero
    # Compile only: the functions these call are the emulator's own (memory.cpp).
    *"-fsanitize=thread --param=tsan-instrument-func-entry-exit=0".split(),
    "-fsanitize=alignment,bounds,signed-integer-overflow,shift,integer-divide-by-zero",
    *("-include", str(HERE / "cuda.h")),
)
HOST_FLAGS = (
    *"-std=c++20 -O1 -g1 -fPIC -w -DTORCH_TARGET_VERSION=0x020A000000000000".split(),
    *("-isystem", str(Path(torch.__file__).parent / "include"), "-include", str(HERE / "host.h")),
)
# Fused multiply-add and conversions to half in one instruction each, where this CPU has them: same results, sooner.
HARDWARE_FLAGS = {"fma": "-mfma", "f16c": "-mf16c"}
CORE_HARDWARE_FLAGS = HARDWARE_FLAGS | {"avx2": "-mavx2"}  # a tensor core's eight columns together

GUARD_BYTES = 1 << 20
ALIGNMENT = 256  # what cudaMalloc gives; a tensor keeps its distance from it
CONTENTS = {"read-only": 0, "initialised": 1, "uninitialised": 2}
MAP_NORESERVE = 0x4000
PATIENCE = 60.0


class KernelError(AssertionError):
    """What the emulator found; ``kind`` is the first words of the report: "race", "out of bounds", "deadlock", ..."""

    def __init__(self, report):
        super().__init__(report)
        self.kind = report.partition(":")[0]


# ---- building ----


def _hardware_flags(wanted=HARDWARE_FLAGS):
    words = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    return tuple(flag for word, flag in wanted.items() if word in words)


@lru_cache(maxsize=1)
def _compiler_version():
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _hash(*parts):
    digest = hashlib.sha256(_compiler_version().encode())
    for part in parts:
        digest.update(part if isinstance(part, bytes) else str(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _made(target, command):
    """The file, made by the command if it is not there; under another name first, so that none is half made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be at it
        if target.exists():
            return target
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            unfinished = Path(folder) / target.name
            done = subprocess.run([str(part) for part in (*command, "-o", unfinished)], capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")
            unfinished.rename(target)
    return target


def _object(source, flags, headers):
    contents = (part for path in (source, *headers) for part in (path, path.read_bytes()))
    target = BUILD / "objects" / f"{source.stem}-{_hash(*flags, *contents)}.o"
    return _made(target, [COMPILER, *flags, "-x", "c++", "-c", source])


def _linked(name, compilations, link):
    """A shared library of (source, flags, headers), compiled side by side."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda compilation: _object(*compilation), compilations))
    target = BUILD / f"{name}-{_hash(*objects, *link)}.so"
    return _made(target, [COMPILER, "-shared", *objects, *link])


@lru_cache(maxsize=1)
def core_path():
    headers = sorted(HERE.glob("*.h"))
    flags = (*CORE_FLAGS, *_hardware_flags(CORE_HARDWARE_FLAGS))
    return _linked("libemulator", [(HERE / name, flags, headers) for name in CORE_SOURCES], ["-ldl"])


@lru_cache(maxsize=1)
def core():
    """The emulator itself; kernel libraries find its functions by name."""
    library = ctypes.CDLL(str(core_path()), mode=ctypes.RTLD_GLOBAL)
    library.emulation_report.restype = ctypes.c_char_p
    return library


def compiled(name, sources, host_sources=(), include=(), namespace="emulated", options=()):
    """Path of the library made of these sources, compiled if it is not there yet.

    Args:
        name: for the file's name.
        sources: of kernels and launchers, paths absolute or from the root of the repository.
        host_sources: of csrc, compiled with host.h and without checks.
        include: folders searched for the kernels' headers before kernels/, as mutants use them.
        namespace: of torch.ops that host_sources register in.
        options: of the compiler, for the kernels.
    """
    ours = [header for header in sorted(HERE.glob("*.h")) if header.name not in INSIDES]
    kernels, host = ROOT / "kernels", ROOT / "csrc"
    folders = (*map(Path, include), kernels)
    flags = (*KERNEL_FLAGS, *_hardware_flags(), *options, *_search(*folders, HERE))
    headers = [*ours, *(path for folder in folders for path in sorted(folder.rglob("*.*h")))]
    compilations = [(ROOT / source, flags, headers) for source in sources]
    flags = (*HOST_FLAGS, f"-DTRANSFUSE_EMULATED_NAMESPACE={namespace}", *_search(kernels, HERE))
    headers = [*ours, *sorted(kernels.rglob("*.*h")), *sorted(host.glob("*.h"))]
    compilations += [(ROOT / source, flags, headers) for source in host_sources]
    torch_libraries = Path(torch.__file__).parent / "lib"
    wrapped = [f"-Wl,--wrap={function}" for function in ("memcpy", "memmove", "memset")]
    link = [f"-L{torch_libraries}", f"-Wl,-rpath,{torch_libraries}", "-ltorch_cpu", "-lc10"] if host_sources else []
    return _linked(name, compilations, [core_path(), *link, *wrapped])


def _search(*folders):
    return tuple(part for folder in folders for part in ("-I", str(folder)))


def library(name, sources, **options):
    """The library of compiled(), loaded."""
    return load(compiled(name, sources, **options))


def load(path):
    core()
    return Library(path)


class Library:
    """A loaded library of kernels and their launchers."""

    def __init__(self, path):
        self.path = path
        self.loaded = ctypes.CDLL(str(path))
        self.base = ctypes.c_size_t.from_address(self.loaded._handle).value  # struct link_map begins with l_addr
        self.shared_variables = list(_thread_locals(path))
        for offset, size, _ in self.shared_variables:
            core().emulation_shared_variable(ctypes.c_size_t(self.base), ctypes.c_size_t(offset), ctypes.c_size_t(size))

    def run(self, function, *arguments, seed=0, tensor_core=80, patience=PATIENCE):
        """Calls an extern "C" launcher, which returns a cudaError_t. Tensors are passed as pointers.

        Args:
            seed: 0 runs blocks and threads in ascending order, anything else in an order drawn from it.
            tensor_core: 80 or 90, whose way of adding is taken.
            patience: seconds of CPU time that a block, or a cluster, may take.
        Raises: KernelError with what the emulator found.
        """
        passed = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
        with self.watched(seed, tensor_core, patience=patience):
            status = getattr(self.loaded, function)(*passed)
        if status != 0:
            raise RuntimeError(f"{function} returned cudaError_t {status}")

    @contextmanager
    def watched(self, seed=0, tensor_core=80, blocks_at_ends=0, patience=PATIENCE):
        """Launches in here run in this order; what the emulator finds wrong is raised at the end, as KernelError.

        Args:
            blocks_at_ends: n > 0 runs only the first and the last n blocks of every grid.
        """
        emulator = core()
        emulator.emulation_set_blocks_at_ends(ctypes.c_uint64(blocks_at_ends))
        emulator.emulation_set_patience(ctypes.c_double(patience))
        emulator.emulation_set_order(ctypes.c_uint64(seed))
        assert emulator.emulation_set_tensor_core(tensor_core) == 0, f"no model of the tensor cores of sm_{tensor_core}"
        emulator.emulation_clear_report()
        failed = None
        try:
            yield
        except RuntimeError as error:  # the host code's words for a launch that failed
            failed = error
        finally:
            emulator.emulation_forget_made()
        report = emulator.emulation_report().decode()
        emulator.emulation_clear_report()
        if report:
            raise KernelError(self._explained(report)) from failed
        if failed:
            raise failed

    def _explained(self, report):
        """[line N] -> source lines, [function N] -> its name, [shared N] -> the variable."""
        report = re.sub(r" \[line (\d+)\]", lambda m: self._place(int(m[1])), report)
        report = re.sub(r"\[function (\d+)\]", lambda m: self._frames(int(m[1]))[-1][0], report)
        return re.sub(r" \[shared (\d+)\]", lambda m: self._shared_variable(int(m[1])), report)

    def _frames(self, address):
        """(function, file, line) of an address, what was inlined first."""
        command = ["addr2line", "-e", str(self.path), "-f", "-C", "-i", hex(address - self.base)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        places = [re.match(r"(.*):(\d+|\?)", line).groups() for line in lines[1::2]]
        return [(name, Path(file), line) for name, (file, line) in zip(lines[::2], places, strict=True)]

    def _place(self, address):
        frames = [frame for frame in self._frames(address) if frame[1].parent != HERE or frame[1].suffix != ".h"]
        return " at " + ", called at ".join(f"{file.name}:{line}" for _, file, line in frames) if frames else ""

    def _shared_variable(self, offset):
        for start, size, name in self.shared_variables:
            if start <= offset < start + size:
                return f", {name} + {offset - start} of {size} bytes"
        return f" + {offset}"


def _thread_locals(path):
    """(offset, size, name) of the library's shared variables."""
    table = subprocess.run(["readelf", "-sW", "-C", str(path)], capture_output=True, text=True, check=True).stdout
    seen = set()
    for line in table.splitlines():
        found = re.match(r"\s*\d+: ([0-9a-f]+)\s+(\d+|0x[0-9a-f]+) TLS\s+\S+\s+\S+\s+(?:\S+)\s+(.*)", line)
        if found and found[1] not in seen:
            seen.add(found[1])
            yield int(found[1], 16), int(found[2], 0), found[3].rpartition("::")[2]


# ---- memory ----


class Memory:
    """Tensors as a kernel may see them: each between guard zones, known to the emulator byte by byte.

    Contents: "read-only" may not be written, "uninitialised" not be read before it is written.
    """

    in_use = set()  # addresses of tensors placed by any Memory

    def __init__(self):
        self._placed = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for address, *_ in self._placed:
            core().emulation_forget(ctypes.c_size_t(address))
            Memory.in_use.discard(address)
        self._placed.clear()

    def place(self, name, tensor, contents):
        """A copy with the same strides and the same alignment, in memory of its own; itself where it lies in such."""
        if tensor.data_ptr() in Memory.in_use:
            return tensor
        placed = self.strided(
            name, tensor.shape, tensor.stride(), tensor.dtype, contents, tensor.data_ptr() % ALIGNMENT
        )
        if contents != "uninitialised":
            _once(placed).copy_(_once(tensor.detach()))
        return placed

    def strided(self, name, sizes, strides, dtype, contents, misaligned_by=0):
        """A new tensor. Memory is reserved and not used: rows may lie gigabytes apart.

        What lies between the elements of a view belongs to nobody. Uninitialised elements are NaN in every dtype.
        """
        span = (
            1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) if 0 not in sizes else 0
        )
        pages, start = (
            _reserve(GUARD_BYTES + misaligned_by + span * dtype.itemsize + GUARD_BYTES),
            GUARD_BYTES + misaligned_by,
        )
        elements = torch.frombuffer(pages, dtype=dtype, offset=start, count=max(span, 1))
        placed = torch.as_strided(elements, sizes, strides)
        if contents == "uninitialised" and span > 0:
            _bytes_of(pages, start, _once(placed)).fill_(0xFF)
        marks, marks_at = None, None
        if span > _once(placed).numel():
            marks = _reserve(span * dtype.itemsize)
            _bytes_of(marks, 0, _once(placed)).fill_(1)
            marks_at = torch.frombuffer(marks, dtype=torch.uint8).data_ptr()
        address = elements.data_ptr()
        core().emulation_register(
            ctypes.c_size_t(address),
            ctypes.c_size_t(span * dtype.itemsize),
            CONTENTS[contents],
            name.encode(),
            ctypes.c_void_p(marks_at),
        )
        self._placed.append((address, pages, marks))
        Memory.in_use.add(address)
        return placed


def _reserve(num_bytes):
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)


def _once(tensor):
    """The view with every element once: an expanded dimension has one."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _bytes_of(pages, start, like):
    """The bytes of a tensor's elements, as a view of pages from start on, shaped like it."""
    item = like.element_size()
    raw = torch.frombuffer(pages, dtype=torch.uint8, offset=start)
    return torch.as_strided(raw, (*like.shape, item), (*(stride * item for stride in like.stride()), 1))
