"""What is shipped: packages and version. How it is compiled stands in CMakeLists.txt.

No torch is imported and none is pinned when metadata is asked for; the build itself needs the torch it finds for its
headers, and the binary then serves every torch >= 2.10 (LibTorch stable ABI).
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = "0.1.0"
# Read from the environment, explained where CMake reads them: CMakeLists.txt and cmake/cuda.cmake.
BUILD_VARIABLES = ("TRANSFUSE_ISA_LEVELS", "TRANSFUSE_CUDA", "TORCH_CUDA_ARCH_LIST", "TRANSFUSE_ATTENTION_HEAD_DIMS")


class CMakeBuild(build_ext):
    """Configures once and lets Ninja decide what is stale, so that a second build takes seconds."""

    build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"

    def run(self):
        import pybind11

        torch_root = Path(importlib.util.find_spec("torch").origin).parent
        self.build_dir.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        self.spawn([
            "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(self.build_dir), "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTORCH_ROOT={torch_root}", f"-DTRANSFUSE_VERSION={VERSION}",
            *(f"-D{name}={os.environ.get(name, '')}" for name in BUILD_VARIABLES),
        ])
        self.spawn(["cmake", "--build", str(self.build_dir), "-j", jobs])
        super().run()

    def build_extension(self, ext):
        """Puts what CMake built in its place; of _C_cuda maybe nothing, and then nothing of an earlier build stays."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        module = ext.name.rpartition(".")[2]
        built = next(self.build_dir.glob(f"{module}.*"), None)
        if built is not None and built.name in (self.build_dir / "build.ninja").read_text():
            self.copy_file(str(built), str(target))
        else:
            for stale in (target, ROOT / "python" / "transfuse" / target.name):
                stale.unlink(missing_ok=True)


setup(
    version=VERSION,
    packages=find_packages("python") + ["transfuse.kernels.triton"],
    package_dir={"": "python", "transfuse.kernels.triton": "kernels/triton"},
    package_data={"transfuse": ["py.typed"], "transfuse.promises": ["masks.json"]},
    ext_modules=[Extension("transfuse._C", sources=[]), Extension("transfuse._C_cuda", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
