"""The ISA levels with FMA agree bit for bit: natively where the CPU has AVX-512, through emulated intrinsics where not.

vec.h holds sixteen lanes on every level and never contracts, so one reduction tree serves all of them; what runs on an
AVX-512 machine is checked here on any x86-64 machine. The portable baseline has no FMA: it keeps the same contract with
bits of its own, so every op test of the suite that is marked by levels() runs on it as well.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest
import torch

from transfuse import _C

ROOT = Path(__file__).resolve().parent.parent
EMULATION = ROOT / "tests/isa/avx512_on_avx2.h"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
BASELINE = ["-Wno-psabi"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
SIMDE = Path("/usr/include/simde/x86/avx512.h")

LEVELS = _C.build_info()["isa_levels"]
NATIVE_AVX512 = "avx512" in _C.cpu_isa_levels()
SLOW_BESIDE_NATIVE = pytest.mark.slow if NATIVE_AVX512 else lambda test: test
NEEDS_AVX2 = pytest.mark.skipif("avx2" not in _C.cpu_isa_levels(), reason="this CPU has no AVX2")
OPS = re.search(r"^set\(OPS ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text(), re.M).group(1).split()


@pytest.fixture(scope="module")
def simde():
    if not SIMDE.exists():
        message = "SIMDe is missing: apt-get install libsimde-dev"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)


def _run(*command, **env):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def _hash_of(folder, level, flags):
    binary = folder / level
    _run("g++", "-std=c++17", "-O2", "-ffp-contract=off", *flags, f"-I{ROOT / 'kernels'}", f"-I{ROOT / 'kernels/cpu'}", f"-DTRANSFUSE_ISA={level}",
         ROOT / "tests/isa/vec_parity.cpp", "-o", binary)
    return _run(binary)


@NEEDS_AVX2
def test_vector_operations_agree(simde, tmp_path):
    """Every operation of vec.h: AVX2 against the portable level and AVX-512, emulated, and native where there is one."""
    expected = _hash_of(tmp_path, "avx2", AVX2)
    assert _hash_of(tmp_path, "baseline", BASELINE).split()[0] == expected.split()[0]  # all but fused multiply-adds
    assert _hash_of(tmp_path, "avx512", [*AVX2, "-w", "-include", EMULATION]) == expected
    if NATIVE_AVX512:
        assert _hash_of(tmp_path, "avx512", [*AVX2, *AVX512]) == expected


# Runs in its own process, on whatever build of _C is first on the path: hashes of all ops on every level.
ALL_OPS = """
import hashlib, json, sys
import torch, transfuse
from transfuse import _C
from transfuse.testing import draw

def run():
    results = {}
    def keep(name, *tensors):
        results[name] = hashlib.sha256(b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)).hexdigest()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for n in (1, 15, 16, 33, 384):
            x, r, w, b = (draw(7, n, dtype=dtype, seed=1, requires_grad=True), draw(7, n, dtype=dtype, seed=2, requires_grad=True),
                          draw(n, dtype=dtype, seed=3, requires_grad=True), draw(n, dtype=dtype, seed=4, requires_grad=True))
            y = transfuse.layer_norm(x, (n,), w, b)
            keep(f"layer_norm {dtype} {n}", y.detach(), *torch.autograd.grad(y.sum() + (y * y).sum(), (x, w, b)))
            y, s = transfuse.add_layer_norm(x, r, (n,), w, b)
            keep(f"add_layer_norm {dtype} {n}", y.detach(), s.detach(), *torch.autograd.grad((y * s).sum(), (x, r, w, b)))
            y = transfuse.rms_norm(x, (n,), w)
            keep(f"rms_norm {dtype} {n}", y.detach(), *torch.autograd.grad(y.sum() + (y * y).sum(), (x, w)))
            y, s = transfuse.add_rms_norm(x, r, (n,), w)
            keep(f"add_rms_norm {dtype} {n}", y.detach(), s.detach(), *torch.autograd.grad((y * s).sum(), (x, r, w)))
            for approximate in ("none", "tanh"):
                y = transfuse.gelu(x * 3, approximate, bias=b)
                keep(f"gelu {approximate} {dtype} {n}", y.detach(), *torch.autograd.grad((y * y).sum(), (x, b)))
            mask = torch.arange(7 * n).view(7, n) % 3 > 0
            y = transfuse.masked_softmax(x, mask, scale=2.0)
            keep(f"masked_softmax {dtype} {n}", y.detach(), *torch.autograd.grad((y * y).sum(), (x,)))
        for lq, lk, d in ((1, 1, 1), (5, 17, 8), (33, 65, 32), (70, 130, 64), (9, 20, 100)):
            q, k, v = (draw(2, 4, lq, d, dtype=dtype, seed=5, requires_grad=True), draw(2, 2, lk, d, dtype=dtype, seed=6, requires_grad=True),
                       draw(2, 2, lk, d, dtype=dtype, seed=7, requires_grad=True))
            bias = draw(1, 4, lq, lk, dtype=dtype, seed=8, requires_grad=True)
            for causal in (False, True):
                y = transfuse.scaled_dot_product_attention(q, k, v, attn_bias=bias, is_causal=causal, enable_gqa=True)
                keep(f"attention {dtype} {lq} {lk} {d} {causal}", y.detach(), *torch.autograd.grad((y * y).sum(), (q, k, v, bias)))
        slopes, sinks = draw(4, dtype=dtype, seed=15), draw(4, dtype=dtype, seed=16, requires_grad=True)
        torch.manual_seed(0)
        y = transfuse.scaled_dot_product_attention(q, k, v, dropout_p=0.3, enable_gqa=True, window=(12, 3), softcap=4.0,
                                                   causal_alignment="bottom_right", alibi_slopes=slopes, sinks=sinks)
        keep(f"attention {dtype} options", y.detach(), *torch.autograd.grad((y * y).sum(), (q, k, v, sinks)))
        for interleaved in (False, True):
            x, cos, sin = (draw(2, 3, 9, 40, dtype=dtype, seed=9, requires_grad=True), draw(9, 17, dtype=dtype, seed=10, requires_grad=True),
                           draw(9, 17, dtype=dtype, seed=11, requires_grad=True))
            y = transfuse.rotary(x, cos, sin, interleaved=interleaved)
            keep(f"rotary {dtype} {interleaved}", y.detach(), *torch.autograd.grad((y * y).sum(), (x, cos, sin)))
        for n, d in ((1, 1), (40, 24), (300, 64)):
            q, k, v = draw(2, 4, 2, d, dtype=dtype, seed=12), draw(2, 2, n, d, dtype=dtype, seed=13), draw(2, 2, n, d, dtype=dtype, seed=14)
            keep(f"decode_attention {dtype} {n} {d}", *transfuse.decode_attention(
                q, k, v, torch.tensor([n, n // 2]), softcap=5.0, window=(200, 0), sinks=draw(4), alibi_slopes=draw(4), return_lse=True))
    return results

report = {}
with transfuse.use_backend("cpu"):
    for level in _C.cpu_isa_levels():
        _C.set_cpu_isa(level)
        report[level] = run()
json.dump(report, sys.stdout)
"""


def _assert_levels_agree(report):
    assert set(report) >= {"avx2", "avx512"}, f"levels run: {list(report)}"
    assert len(report["avx2"]) > 60
    for level, results in report.items():
        if level == "baseline":  # no FMA: bits of its own
            continue
        wrong = {name for name, digest in results.items() if digest != report["avx2"][name]}
        if level == "avx512_bf16":  # multiplies pairs of bfloat16 there, with a rounding of its own
            wrong = {name for name in wrong if "attention torch.bfloat16" not in name}
        assert not wrong, f"{level} differs from avx2 in {sorted(wrong)}"


@NEEDS_AVX2
def test_ops_agree_between_levels_natively():
    """All ops on every level this CPU has."""
    if not NATIVE_AVX512:
        pytest.skip("this CPU has no AVX-512; test_ops_agree_between_levels_emulated covers it")
    _assert_levels_agree(json.loads(_run(sys.executable, "-c", ALL_OPS)))


@SLOW_BESIDE_NATIVE
@NEEDS_AVX2
def test_ops_agree_between_levels_emulated(simde):
    """All ops with the AVX-512 levels compiled for AVX2 through emulated intrinsics, in a build of their own.

    In CI only where the CPU has no AVX-512 to run them on: it takes minutes.
    """
    build, package = ROOT / "build/emulated", ROOT / "build/emulated/package"
    _run("cmake", "-G", "Ninja", "-S", ROOT, "-B", build, "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}",
         f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DTORCH_ROOT={Path(torch.__file__).parent}",
         "-DTRANSFUSE_CUDA=0",
         f"-DTRANSFUSE_EMULATED_INTRINSICS={EMULATION}", PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    _run("cmake", "--build", build, "-j", os.cpu_count())
    package.mkdir(exist_ok=True)
    mirror = package / "transfuse"
    mirror.mkdir(exist_ok=True)
    for entry in (ROOT / "python/transfuse").iterdir():
        link = mirror / entry.name
        if entry.suffix != ".so" and not link.exists():
            link.symlink_to(entry)
    binary = next(build.glob("_C.*.so"))
    link = mirror / binary.name
    link.unlink(missing_ok=True)
    link.symlink_to(binary)
    _assert_levels_agree(json.loads(_run(sys.executable, "-c", ALL_OPS, PYTHONPATH=str(package))))


def _assert_tests_pass(level, selection, *files):
    """Test files again, in a process of their own with the level forced."""
    if level not in _C.cpu_isa_levels():
        pytest.skip(f"this CPU has no {level}")
    out = _run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow",
               "-k", f"not compile and not isa {selection}", *files, TRANSFUSE_CPU_ISA=level)
    assert re.search(r"\d{3,} passed", out), out[-2000:]


def _test_files(*stems):
    """Without the graphs', which are the same on every level."""
    paths = [path for stem in stems for path in sorted((ROOT / "tests").glob(f"test_{stem}.py"))]
    return [path for path in paths if "graphs" not in path.name]


@pytest.mark.parametrize("level", [level if level == "baseline" else pytest.param(level, marks=pytest.mark.slow) for level in LEVELS])
def test_op_tests_pass_on_every_level(level):
    """The op tests again with the level forced. The levels with FMA have the same bits: in CI the one without is enough."""
    files = _test_files(*(f"{op}*" for op in OPS), "norms", "varlen_attention", "decode_attention",
                        "packed_linear", "encoder_layer")
    _assert_tests_pass(level, "", *files)


def test_bfloat16_attention_without_products_of_pairs():
    """Where the CPU multiplies pairs of bfloat16 the rest of the suite runs that path alone; this is every other CPU's."""
    _assert_tests_pass("avx2", "and bfloat16", *_test_files("attention*", "varlen_attention", "packed_linear"))


@pytest.mark.slow
def test_kernels_serve_aarch64(tmp_path):
    """Every kernel source compiles for aarch64, and there vec.h gives the bits it gives with AVX2, fused or not."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")
    assert compiler and emulator, "apt-get install g++-aarch64-linux-gnu qemu-user-static"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi", "-DTRANSFUSE_ISA=baseline",
             "-DTRANSFUSE_HAS_BASELINE", f"-I{ROOT / 'kernels'}", f"-I{ROOT / 'kernels/cpu'}"]
    for source in sorted((ROOT / "kernels/cpu").glob("*.cpp")):
        _run(compiler, *flags, "-Wall", "-Wextra", "-Werror", "-c", source, "-o", tmp_path / f"{source.stem}.o")
    _run(compiler, *flags, "-static", ROOT / "tests/isa/vec_parity.cpp", "-o", tmp_path / "vec_parity")
    assert _run(emulator, tmp_path / "vec_parity") == _hash_of(tmp_path, "avx2", AVX2)
