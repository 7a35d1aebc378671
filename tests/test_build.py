"""The package as people get it: wheel, pip install, editable, from an empty folder; and what the binary needs."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("_C", "_C_cuda")
USE = """
import sys, torch, transfuse, transfuse.kernels.triton as triton_kernels
x = torch.randn(4, 48)
with transfuse.use_backend("cpu"):
    y = transfuse.layer_norm(x, (48,))
assert (y - torch.nn.functional.layer_norm(x, (48,))).abs().max() < 1e-5
print(transfuse.__file__)
print(triton_kernels.__file__)
"""


def _run(*command, cwd, **env):
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def _use_from(folder, empty):
    """Runs USE with ``folder`` first on the path, from an empty folder, with no compiler on the PATH."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n" + USE
    out = _run(sys.executable, "-c", code, cwd=empty, PATH="/nonexistent", CC="/nonexistent", CXX="/nonexistent", PYTHONPATH="")
    return [Path(line) for line in out.splitlines()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT, cwd=folder,
         PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return next(folder.glob("transfuse-*.whl"))


def test_wheel_holds_the_package_and_needs_no_compiler(wheel, tmp_path):
    names = zipfile.ZipFile(wheel).namelist()
    for module in MODULES:
        pattern = rf"transfuse/{module}\.cpython-\d+-.*\.so"
        assert any(re.fullmatch(pattern, name) for name in names), f"{module} is missing"
    assert "transfuse/kernels/triton/__init__.py" in names and "transfuse/py.typed" in names
    assert "transfuse/promises/masks.json" in names
    assert not [name for name in names if name.startswith(("tests/", "bench/", "kernels/"))]
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA"))).decode()
    requires = re.findall(r"^Requires-Dist: (.*)$", metadata, re.M)
    assert [r for r in requires if "extra" not in r] == ["torch>=2.10"], requires
    target, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    _run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel, cwd=empty)
    package, triton_kernels = _use_from(target, empty)
    assert package.is_relative_to(target) and triton_kernels.is_relative_to(target)


def test_pip_install(tmp_path):
    target, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    _run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", target, ROOT, cwd=empty,
         PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    package, triton_kernels = _use_from(target, empty)
    assert package.is_relative_to(target) and triton_kernels.is_relative_to(target)


def test_editable_install(tmp_path):
    """An editable install in a fresh environment that borrows torch from this one."""
    empty, env = tmp_path / "empty", tmp_path / "env"
    empty.mkdir()
    _run(sys.executable, "-m", "venv", "--without-pip", env, cwd=empty)
    purelib = Path(_run(env / "bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=empty).strip())
    _run(sys.executable, "-m", "pip", "--python", env / "bin/python", "install", "-q", "--no-deps", "setuptools>=77", "pybind11", cwd=empty)
    # Only torch's own folder and what it imports: not this environment's transfuse.
    here = Path(torch.__file__).parent.parent
    for entry in here.iterdir():
        if "transfuse" not in entry.name and not (purelib / entry.name).exists():
            (purelib / entry.name).symlink_to(entry)
    _run(sys.executable, "-m", "pip", "--python", env / "bin/python", "install", "-q", "--no-deps", "--no-build-isolation", "-e", ROOT,
         cwd=empty, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    out = _run(env / "bin/python", "-c", USE, cwd=empty, PATH="/nonexistent", PYTHONPATH="")
    package, triton_kernels = map(Path, out.splitlines())
    assert package == ROOT / "python/transfuse/__init__.py" and triton_kernels == ROOT / "kernels/triton/__init__.py"


def _binary(module):
    return Path(importlib.import_module(f"transfuse.{module}").__file__)


def _undefined_symbols(binary):
    assert shutil.which("nm"), "nm (binutils) is needed for the symbol audit"
    return [line.split()[-1].split("@")[0] for line in _run("nm", "-D", "--undefined-only", binary, cwd=ROOT).splitlines()]


@pytest.mark.parametrize("module", MODULES)
def test_symbols_are_stable_and_of_torch_2_10(module):
    """The binary asks torch for C functions that torch 2.10 exports, and for nothing from at:: or c10::."""
    exported = set((ROOT / "tests/data/torch_2_10_stable_symbols.txt").read_text().split())
    symbols = _undefined_symbols(_binary(module))
    mangled = [s for s in symbols if re.match(r"_ZNK?(2at|3c10|5torch)", s) or "N3c10" in s or "N2at" in s]
    assert not mangled, f"C++ symbols of torch: {mangled}"
    used = {s for s in symbols if s.startswith(("aoti_torch", "torch_"))}
    assert used, "no torch symbol at all: is this the right binary?"
    assert used <= exported, f"newer than torch 2.10: {sorted(used - exported)}"
    assert not [s for s in symbols if s.startswith(("cuda", "cu"))], "CUDA's runtime belongs inside the binary"


@pytest.mark.parametrize("module", MODULES)
def test_binary_needs_only_the_cpu_libraries(module):
    out = _run("readelf", "-d", _binary(module), cwd=ROOT)
    needed = set(re.findall(r"NEEDED\).*\[(.*)\]", out))
    assert {n for n in needed if "torch" in n or "c10" in n} == {"libtorch_cpu.so", "libc10.so"}
    assert not [n for n in needed if "python" in n or "cuda" in n or "gomp" in n]
    assert "RPATH" not in out and "RUNPATH" not in out, "a path of the build machine is in the binary"


@pytest.mark.slow
def test_source_distribution_builds(tmp_path):
    """The sdist holds all that a build needs (a full compile: several minutes)."""
    _run(sys.executable, "-c", "from setuptools.build_meta import build_sdist; import sys; print(build_sdist(sys.argv[1]))", tmp_path, cwd=ROOT)
    archive = next(tmp_path.glob("transfuse-*.tar.gz"))
    _run("tar", "xzf", archive, cwd=tmp_path)
    tree = next(p for p in tmp_path.glob("transfuse-*") if p.is_dir())
    _run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, tree, cwd=tmp_path,
         PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert list(tmp_path.glob("transfuse-*.whl"))
