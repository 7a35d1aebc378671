"""What a figure depends on: commit, processor, GPU, versions. Read from files and libraries; starts nothing."""

import datetime
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

import torch

import transfuse


def git_commit(start=None):
    """The commit of the checkout this package runs from, read from .git itself; 'unknown' outside a checkout."""
    for folder in (Path(start or __file__).resolve(), *Path(start or __file__).resolve().parents):
        git = folder / ".git"
        if git.is_file():  # a worktree: the file names the real folder
            git = (folder / git.read_text().partition("gitdir:")[2].strip()).resolve()
        if not (git / "HEAD").is_file():
            continue
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head
        ref = head.partition("ref:")[2].strip()
        shared = (git / (git / "commondir").read_text().strip()) if (git / "commondir").is_file() else git
        for root in (git, shared):
            if (root / ref).is_file():
                return (root / ref).read_text().strip()
        if (shared / "packed-refs").is_file():
            for line in (shared / "packed-refs").read_text().splitlines():
                if line.endswith(" " + ref):
                    return line.split()[0]
        return "unknown"
    return "unknown"


def processor_name():
    """The processor's name as the kernel tells it ('AMD EPYC ...'); the architecture where it tells none."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment():
    """What a figure depends on, as a flat dict: it stands in every row that is written."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "machine": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_isa": cpu_isa(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transfuse": transfuse.__version__,
    }


def installed(name):
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def nvidia_driver():
    """The NVIDIA driver's version as the kernel module tells it, or None."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return None
    # "NVRM version: NVIDIA UNIX ... Kernel Module  580.159.03  Release Build ...": the first word that is a version.
    return next((word for word in words if word.count(".") >= 1 and word.replace(".", "").isdigit()), None)


def gpu_facts():
    """GPUs, driver, CUDA and compilers as a dict that JSON takes; asks torch only where torch was built with CUDA."""
    facts = {
        "torch_cuda": torch.version.cuda,
        "driver": nvidia_driver(),
        "nvcc": shutil.which("nvcc"),
        "triton": installed("triton"),
        "devices": [],
    }
    if not torch.cuda.is_available():
        facts["reason"] = "torch is built without CUDA" if torch.version.cuda is None else "torch sees no GPU"
        return facts
    facts["cudnn"] = torch.backends.cudnn.version()
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        facts["devices"].append(
            {
                "name": found.name,
                "compute_capability": f"{found.major}.{found.minor}",
                "memory_bytes": found.total_memory,
                "multiprocessors": found.multi_processor_count,
                "l2_bytes": getattr(found, "L2_cache_size", None),
            }
        )
    return facts


def cpu_isa():
    """The SIMD level that the compiled kernels run at here, or None without the compiled module."""
    try:
        from transfuse import _C
    except ImportError:
        return None
    return _C.cpu_isa()
