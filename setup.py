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


class CMakeBuild(build_ext):
    """Configures once and lets Ninja decide what is stale, so that a second build takes seconds."""

    def build_extension(self, ext):
        import pybind11

        torch_root = Path(importlib.util.find_spec("torch").origin).parent
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        self.spawn([
            "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build_dir), "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTORCH_ROOT={torch_root}", f"-DTRANSFUSE_VERSION={VERSION}",
            f"-DTRANSFUSE_ISA_LEVELS={os.environ.get('TRANSFUSE_ISA_LEVELS', '')}",
        ])
        self.spawn(["cmake", "--build", str(build_dir), "-j", jobs])
        built = next(build_dir.glob("_C.*"))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(built), str(target))


setup(
    version=VERSION,
    packages=find_packages("python") + ["transfuse.kernels.triton"],
    package_dir={"": "python", "transfuse.kernels.triton": "kernels/triton"},
    package_data={"transfuse": ["py.typed"]},
    ext_modules=[Extension("transfuse._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
