"""_C_cuda on a machine with no GPU: what it registers and refuses, why it is not in use, and when it is not built."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import transfuse
from transfuse import _C, _C_cuda, dispatch, extension

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
# The raw ops that kernels/cuda computes.
RAW_OPS = (
    "layer_norm_forward", "add_layer_norm_forward", "layer_norm_backward",
    "rms_norm_forward", "add_rms_norm_forward", "rms_norm_backward",
    "gelu_forward", "gelu_backward", "rotary_forward", "rotary_backward",
    "masked_softmax_forward", "masked_softmax_backward", "masked_softmax_mask_backward",
)  # fmt: skip


@pytest.mark.parametrize("name", RAW_OPS)
def test_ops_are_registered_for_cuda(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"transfuse::{name}", "CUDA")


def _refusal(name, *arguments):
    """What the CUDA implementation says to tensors on the CPU, past the dispatcher's choice."""
    with pytest.raises((ValueError, RuntimeError)) as refused:
        getattr(torch.ops.transfuse, name).default.redispatch(CUDA, *arguments)
    return str(refused.value)


X = torch.zeros(3, 5)
ROWS = torch.zeros(2, 3, 4, 8)
TABLE = torch.zeros(4, 4)
REFUSALS = (
    ("layer_norm_forward", (X, torch.ones(4), None, 1, 1e-5),
     "layer_norm: weight has shape (4,), expected the last dimensions of input's (3, 5)"),
    ("layer_norm_forward", (X.double(), None, None, 1, 1e-5),
     "layer_norm: input has dtype float64, expected float32, bfloat16 or float16"),
    ("layer_norm_forward", (X, None, None, 3, 1e-5),
     "layer_norm: normalized_ndim is 3, expected 1 to 2 (input's number of dimensions)"),
    ("layer_norm_forward", (X, None, None, 1, 1e-5), "layer_norm: input is on another device, expected cuda"),
    ("rms_norm_forward", (X, torch.ones(5).half(), 1, 1e-5), "rms_norm: weight has dtype float16, expected float32"),
    ("rms_norm_backward", (X, None, X, None, 1, 1e-5, True, True),
     "rms_norm_backward: input is on another device, expected cuda"),
    ("gelu_forward", (X, torch.zeros(4), False), "gelu: bias has shape (4,), expected (5,) (input's last dimension)"),
    ("gelu_backward", (X.half(), X, None, False, False), "gelu: grad_output has dtype float16, expected float32"),
    ("gelu_forward", (X, None, False), "gelu: input is on another device, expected cuda"),
    ("masked_softmax_forward", (X, X[:2], 1.0, False, False),
     "masked_softmax: mask has shape (2, 5), expected (3, 5) (input's)"),
    ("masked_softmax_forward", (X, None, float("inf"), False, False),
     "masked_softmax: scale is inf, expected a finite float32"),
    ("masked_softmax_backward", (X, X, 1.0), "masked_softmax: output is on another device, expected cuda"),
    ("rotary_forward", (ROWS, TABLE[:3], TABLE, False, False), "rotary: input is on another device, expected cuda"),
    ("rotary_forward", (ROWS[0], TABLE, TABLE, False, False),
     "rotary: input has shape (3, 4, 8), expected 4 dimensions"),
)  # fmt: skip


@pytest.mark.parametrize("name,arguments,text", REFUSALS)
def test_arguments_are_checked_without_a_gpu(name, arguments, text):
    assert _refusal(name, *arguments) == text


def test_import_needs_no_gpu_and_the_reason_is_told():
    assert _C_cuda.build_info()["architectures"]
    assert _C.build_info()["cuda"].startswith("built with nvcc ")
    state = transfuse.backends()["cuda"]
    if torch.version.cuda is None:
        assert state == extension.cuda_unavailable == "this torch is built without CUDA"
        problem = dispatch.Problem("layer_norm", "cuda", torch.float64, False)
        assert dispatch.cuda_reasons(problem) == (
            "this torch is built without CUDA",
            "dtype is float64, the kernel takes float32, bfloat16, float16",
        )


def _loaded_beside(driver, tmp_path):
    """What loading the package says of a driver, given in C."""
    (tmp_path / "driver.c").write_text(driver)
    subprocess.run(["gcc", "-shared", "-fPIC", tmp_path / "driver.c", "-o", tmp_path / "libcuda.so.1"], check=True)
    code = "import torch; torch.version.cuda = '13.0'\nfrom transfuse import extension; print(extension.cuda_unavailable)"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(ROOT / "python")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_driver_is_asked_for_its_version_and_not_initialised(tmp_path):
    """A process that has called cuInit cannot fork and use CUDA, nor choose its GPUs any more."""
    driver = "#include <stdlib.h>\nint cuInit(unsigned flags) { abort(); }\nint cuDriverGetVersion(int* v) { *v = %s; return 0; }"
    assert _loaded_beside(driver % 13000, tmp_path) == ""
    words = "the NVIDIA driver serves CUDA 12.8, the module needs 13.0"
    assert _loaded_beside(driver % 12080, tmp_path) == words
    assert _loaded_beside("int nothing;", tmp_path) == "no NVIDIA driver is installed"


@pytest.fixture
def gpu_of_sm_90(monkeypatch):
    """As on a machine with an H100, up to the launch."""
    monkeypatch.setattr(extension, "cuda_unavailable", "")
    monkeypatch.setattr(extension, "cuda_architectures", ("8.0", "9.0a"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5) if device == "cuda:1" else (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "T4")
    monkeypatch.setattr(dispatch, "_choices", {})


def _problem(device):
    return dispatch.Problem("layer_norm", device, torch.bfloat16, False)


def test_the_first_call_may_be_a_compiled_one(gpu_of_sm_90):
    """The choice is traced with the call: nothing on its way may break the graph."""
    implementations = (dispatch.Implementation("cuda", dispatch.cuda_reasons, lambda x: x + 1),)

    def call(x):
        chosen = dispatch.select("layer_norm", implementations, ("cuda:0", x.dtype), lambda: _problem("cuda:0"))
        return chosen.run(x)

    assert torch.compile(call, fullgraph=True, backend="eager")(torch.zeros(1)) == 1


def test_each_gpu_is_asked_for_itself(gpu_of_sm_90):
    assert dispatch.cuda_reasons(_problem("cuda:0")) == ()
    words = "T4 has compute capability 7.5, the kernels are built for 8.0, 9.0a"
    assert dispatch.cuda_reasons(_problem("cuda:1")) == (words,)


def test_unloadable_module_is_told(tmp_path):
    """A _C_cuda that the loader refuses leaves the package usable, with the loader's words as the reason."""
    package = tmp_path / "transfuse"
    shutil.copytree(Path(transfuse.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "_C_cuda*"))
    (package / Path(_C_cuda.__file__).name).write_bytes(b"no library")
    code = (
        "import torch; torch.version.cuda = '13.0'\n"
        "import transfuse; print(transfuse.backends()['cuda']); print(transfuse.backends()['cpu'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    reason, cpu = done.stdout.splitlines()
    assert reason.startswith("the compiled module transfuse._C_cuda cannot be loaded: ") and "_C_cuda" in reason
    assert cpu == "True"


@pytest.mark.parametrize(
    "architecture,capability,runs",
    [
        ("8.0", (8, 0), True), ("8.0", (8, 6), True), ("8.6", (8, 0), False), ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True), ("9.0a", (9, 0), True), ("9.0a", (10, 0), False), ("9.0a+PTX", (10, 0), False),
        ("12.0+PTX", (12, 1), True),
    ],
)  # fmt: skip
def test_which_gpus_an_architecture_serves(architecture, capability, runs):
    assert dispatch.serves(architecture, *capability) == runs


def _configure(tmp_path, path, **variables):
    """CMake alone, on the cuda part alone: the answer takes a second."""
    project = tmp_path / "project"
    project.mkdir(exist_ok=True)
    (project / "CMakeLists.txt").write_text(
        f'cmake_minimum_required(VERSION 3.20)\nproject(p LANGUAGES CXX)\ninclude("{ROOT / "cmake/cuda.cmake"}")\n'
        'message(STATUS "BUILD=${TRANSFUSE_CUDA_BUILD} COMPILER=${CMAKE_CUDA_COMPILER} '
        'ARCH=${CMAKE_CUDA_ARCHITECTURES}")\n'
        'cmake_architectures("8.0 9.0a+PTX" narrowed)\nmessage(STATUS "NARROWED=${narrowed}")\n'
    )
    command = [
        shutil.which("cmake"),
        "-S",
        project,
        "-B",
        tmp_path / "build",
        *(f"-D{k}={v}" for k, v in variables.items()),
    ]
    environment = {key: value for key, value in os.environ.items() if key not in ("CUDACXX", "CUDA_PATH")}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env={**environment, "PATH": path})
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.fixture
def path_without_nvcc(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in (
        "c++",
        "g++",
        "cc",
        "gcc",
        "make",
        "ninja",
        "ld",
        "ar",
        "ranlib",
        "as",
        "nm",
        "strip",
        "objdump",
        "objcopy",
        "readelf",
        "uname",
    ):
        if shutil.which(name):
            (tools / name).symlink_to(shutil.which(name))
    return str(tools)


def test_a_missing_nvcc_is_an_error_only_when_cuda_is_asked_for(tmp_path, path_without_nvcc):
    code, text = _configure(tmp_path, path_without_nvcc, TRANSFUSE_CUDA="1")
    assert (
        code != 0
        and "TRANSFUSE_CUDA=1 asks for _C_cuda, and no nvcc was found." in text
        and "pip install nvidia-cuda-nvcc" in text
    )
    code, text = _configure(tmp_path, path_without_nvcc, TRANSFUSE_CUDA="")
    assert code == 0 and "BUILD=not built: no nvcc was found COMPILER= " in text


def test_the_nvcc_of_a_python_package_is_found(tmp_path, path_without_nvcc):
    packaged = tmp_path / "site-packages/nvidia/cu13/bin/nvcc"  # where the package nvidia-cuda-nvcc puts it
    packaged.parent.mkdir(parents=True)
    packaged.write_text(f'#!/bin/sh\nexec {shutil.which("nvcc")} "$@"\n')
    packaged.chmod(0o755)
    site = packaged.parents[3]
    code, text = _configure(tmp_path, path_without_nvcc, TRANSFUSE_CUDA="1", Python_SITELIB=site)
    assert code == 0 and f"COMPILER={packaged} " in text, text


def test_cuda_can_be_left_out_and_narrowed(tmp_path):
    code, text = _configure(tmp_path, os.environ["PATH"], TRANSFUSE_CUDA="0")
    assert code == 0 and "BUILD=not built: TRANSFUSE_CUDA was 0 COMPILER= " in text
    code, text = _configure(tmp_path, os.environ["PATH"], TRANSFUSE_CUDA="2")
    assert code != 0 and "TRANSFUSE_CUDA is '2', expected 0, 1 or nothing" in text
    code, text = _configure(tmp_path, os.environ["PATH"], TRANSFUSE_CUDA="", TORCH_CUDA_ARCH_LIST="7")
    assert code != 0 and "TORCH_CUDA_ARCH_LIST holds '7'" in text


def test_all_architectures_by_default(tmp_path):
    code, text = _configure(tmp_path, os.environ["PATH"], TRANSFUSE_CUDA="1", TORCH_CUDA_ARCH_LIST="")
    assert code == 0 and "ARCH=80-real;86-real;89-real;90a-real;100-real;120-real;120-virtual" in text
    assert "NARROWED=80-real;90a-real;90a-virtual" in text
