"""Mistakes in the sources: each is put into a copy of the tree, compiled, and a test of that file must turn red.

That each mistake finds its place is checked in every run; that it is seen, by make test FULL=1.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from transfuse import _C

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "mutants"


class Patch(NamedTuple):
    """One mistake in one file, and the tests (pytest's arguments) of which one must fail."""

    file: str
    what: str
    old: str
    new: str
    tests: str


KERNELS, PAGES = "kernels/cpu", "python/transfuse"
PATCHES = (
    Patch("kernels/gelu_tables.h", "tail cut at 6", "constexpr float cut = 18.0f;", "constexpr float cut = 6.0f;",
          "test_gelu.py"),
    Patch("kernels/gelu_tables.h", "polynomial used beyond its interval", "segments_end = 63.0f / 16;",
          "segments_end = 75.0f / 16;", "test_gelu.py"),
    Patch(f"{KERNELS}/gelu.cpp", "a gathered lane is never written", "for (int64_t lane = 0; lane < n; ++lane) results",
          "for (int64_t lane = 1; lane < n; ++lane) results", "test_gelu.py"),
    Patch(f"{KERNELS}/gelu.cpp", "a 16-bit row's end one short", "for (int64_t k = 0; k < n; ++k) results[i + k]",
          "for (int64_t k = 1; k < n; ++k) results[i + k]", "test_gelu.py"),
    Patch(f"{KERNELS}/gelu.cpp", "gradient of the wrong side",
          "return grad_output * select(x < zero(), h, set1(1.0f) - h);",
          "return grad_output * select(zero() < x, h, set1(1.0f) - h);", "test_gelu.py"),
    Patch(f"{KERNELS}/masked_softmax.cpp", "causal row one key short", "i % p.queries + p.causal_offset + 1;",
          "i % p.queries + p.causal_offset;", "test_masked_softmax.py"),
    Patch(f"{KERNELS}/masked_softmax.cpp", "causal tail not written",
          "fill_zero(rows[r].output, rows[r].length, p.keys);",
          "fill_zero(rows[r].output, rows[r].length, rows[r].length);", "test_masked_softmax.py"),
    Patch(f"{KERNELS}/masked_softmax.cpp", "0 * inf of an excluded key", "? sum : sum_of_products<true>(row);",
          "? sum : sum;", "test_masked_softmax.py"),
    Patch(f"{KERNELS}/norm_rows.h", "unbiased variance", "variance = mean_square - offset * offset;",
          "variance = (mean_square - offset * offset) * cols / (cols - 1);", "test_layer_norm.py"),
    Patch(f"{KERNELS}/norm_rows.h", "eps outside the root", "1 / __builtin_sqrt(variance + eps)};",
          "1 / (__builtin_sqrt(variance) + eps)};", "test_rms_norm.py"),
    Patch(f"{KERNELS}/norm_rows.h", "grad_bias of the last row of a group", "bias_sum = bias_sum + grad;",
          "bias_sum = grad;", "test_layer_norm.py"),
    Patch(f"{KERNELS}/norm_rows.h", "grad_sum past the norm dropped",
          "grad_sum ? load_as<V>(grad_sum + at, n) : splat<V>(0);", "splat<V>(0);", "test_rms_norm.py"),
    Patch(f"{KERNELS}/attention.cpp", "query heads grouped wrongly", "kv_head = head / group;",
          "kv_head = head % p.num_kv_heads;", "test_attention.py"),
    Patch(f"{KERNELS}/attention.cpp", "no rescaling when the maximum rises",
          "select(same, fill(1), weight(before - maximum));", "fill(1);", "test_attention.py"),
    Patch(f"{KERNELS}/attention.cpp", "0 * NaN of an excluded value", "if (ordinary || !excludes)",
          "if (ordinary || !excludes || excludes)", "test_attention.py"),
    Patch(f"{KERNELS}/attention.cpp", "sink left out of the division", "    sums[i] = static_cast<real>(total);\n", "",
          "test_attention_features.py"),
    Patch(f"{KERNELS}/attention_scores.h", "window and causality one key short",
          "diagonal(p, s) + p.window_right + 1, s.seqlen_k", "diagonal(p, s) + p.window_right, s.seqlen_k",
          "test_attention.py"),
    Patch(f"{KERNELS}/attention_scores.h", "ALiBi of a signed distance", "? fnma(slope, abs(distance), score)",
          "? fnma(slope, distance, score)", "test_attention_features.py"),
    Patch(f"{KERNELS}/attention_backward.cpp", "delta not subtracted",
          "w * (load_row(grad_scores + j * panel) - delta);", "w * load_row(grad_scores + j * panel);",
          "test_attention.py"),
    Patch(f"{KERNELS}/attention_backward.cpp", "grad_lse ignored",
          "delta = delta - load_statistic(t, t.params.grad_lse, r);", "delta = delta - fill(0);", "test_attention.py"),
    Patch(f"{KERNELS}/attention_dropout.h", "half the probability", "__builtin_ceil(dropout.probability * 0x1p32);",
          "__builtin_ceil(dropout.probability * 0x1p31);", "test_attention_dropout.py"),
    Patch(f"{KERNELS}/philox.h", "seven rounds", "constexpr int rounds = 10;", "constexpr int rounds = 7;",
          "test_attention_dropout.py"),
    Patch(f"{KERNELS}/attention_decode.cpp", "every query at the last position",
          "p.lengths[t.batch] - p.seqlen_q + row.query;", "p.lengths[t.batch] - 1;",
          "test_decode_attention.py -k reference"),
    Patch(f"{KERNELS}/attention_decode.cpp", "chunks folded without the new maximum",
          "state.sum[r] * f.first + partial.sum[r] * f.second;", "state.sum[r] + partial.sum[r] * f.second;",
          "test_decode_attention.py -k reference"),
    Patch(f"{KERNELS}/packed_linear.cpp", "last channel of an odd number dropped", "last[r][0] = x[r * row + i];",
          "last[r][0] = {};", "test_packed_linear.py"),
    Patch(f"{KERNELS}/packed_linear.cpp", "every chunk starts anew", "sums + row * columns, channel > 0);",
          "sums + row * columns, false);", "test_packed_linear.py"),
    Patch(f"{KERNELS}/packed_linear.cpp", "tiles overlap by a row", "const int64_t row = rows * tile / tiles, of",
          "const int64_t row = rows * tile / tiles - (tile > 0), of", "test_packed_linear.py"),
    Patch("csrc/encoder_layer.cpp", "residual of the second norm", "add_norm(a.output_norm, update, output, output)",
          "add_norm(a.output_norm, update, update, output)", "test_encoder_layer.py"),
    Patch("csrc/encoder_layer.cpp", "only the first block", "block < blocks * (worker + 1) / workers", "block < 1",
          "test_encoder_layer.py"),
    Patch(f"{KERNELS}/rotary.cpp", "never inverse", "const wide sine = p.inverse ? -s : s;", "const wide sine = s;",
          "test_rotary.py"),
    Patch(f"{KERNELS}/rotary.cpp", "last column not copied", "for (int64_t c = 2 * p.pairs; c < p.head_dim; ++c)",
          "for (int64_t c = 2 * p.pairs; c < p.head_dim - 1; ++c)", "test_rotary.py"),
    Patch(f"{PAGES}/ops/attention.py", "default scale 1", "scale = head_dim**-0.5 if", "scale = 1.0 if",
          "test_attention.py"),
    Patch(f"{PAGES}/nn/transformer.py", "residual of the norm", "return x + self._ff_block(normed)",
          "return normed + self._ff_block(normed)", "test_transformer.py"),
    Patch(f"{PAGES}/nn/transformer.py", "bias of linear1 dropped", "form, bias=first.bias)", "form)",
          "test_transformer.py"),
    Patch(f"{PAGES}/nn/transformer.py", "tanh form taken for erf", "return activation.approximate if",
          'return "none" if', "test_transformer.py"),
    Patch(f"{PAGES}/nn/transformer.py", "padding ignored", '"key_padding_mask": src_key_padding_mask, "is',
          '"key_padding_mask": None, "is', "test_transformer.py"),
    Patch(f"{PAGES}/nn/transformer.py", "a hook is not heard", "torch.nn.LayerNorm) and unhooked(norm)",
          "torch.nn.LayerNorm)", "test_transformer.py"),
    Patch(f"{PAGES}/nn/attention.py", "padding kept instead of ignored", "keep = given.logical_not()",
          "keep = given.clone()", "test_attention_module.py"),
)  # fmt: skip


def copy_sources():
    """Brings TREE's sources to ROOT's, touching only what differs, so that Ninja compiles only that."""
    for name in ("CMakeLists.txt", "setup.py", "cmake", "csrc", "kernels", "python"):
        files = {}
        for root in (ROOT, TREE):
            found = [root / name] if (root / name).is_file() else (root / name).rglob("*")
            sources = (path for path in found if path.is_file() and path.suffix not in (".so", ".pyc"))
            files[root] = {path.relative_to(root) for path in sources}
        for path in files[TREE] - files[ROOT]:
            (TREE / path).unlink()
        for path in files[ROOT]:
            text = (ROOT / path).read_bytes()
            if path not in files[TREE] or (TREE / path).read_bytes() != text:
                (TREE / path).parent.mkdir(parents=True, exist_ok=True)
                (TREE / path).write_bytes(text)


def environment(**more):
    """Without the settings of whoever runs the tests: these would choose other kernels than those that were built."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFUSE_")}
    return {**kept, "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}", **more}


def build():
    """Compiles TREE for one ISA level, the widest of this machine."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=TREE, capture_output=True, text=True,
        env=environment(TRANSFUSE_ISA_LEVELS=_C.cpu_isa_levels()[-1], TRANSFUSE_CUDA="0"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def run_tests(tests):
    """pytest's exit code on TREE's package: 0 all green, 1 some red. Anything else is an error of this test."""
    where = "import transfuse; print(transfuse.__file__)"
    paths = environment(PYTHONPATH=os.pathsep.join([str(TREE / "python"), os.environ.get("PYTHONPATH", "")]))
    found = subprocess.run([sys.executable, "-c", where], cwd=TREE, capture_output=True, text=True, env=paths).stdout
    assert found.startswith(str(TREE)), f"the copy is not what is imported, but {found}"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests.split()]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, env=paths, timeout=900)
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-3000:]
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def tree():
    """The copy, built; every test that a mutant must turn red is green on it."""
    copy_sources()
    build()
    for tests in sorted({patch.tests for patch in PATCHES}):
        code, output = run_tests(tests)
        assert code == 0, output[-3000:]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: f"{patch.file}: {patch.what}")
def test_patches_apply(patch):
    """Each text stands exactly once in its file: a mistake that is put nowhere proves nothing."""
    assert (ROOT / patch.file).read_text().count(patch.old) == 1 and patch.old != patch.new


@pytest.mark.slow
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: f"{patch.file}: {patch.what}")
def test_mutants_of_the_sources_are_seen(patch, tree):
    path, text = TREE / patch.file, (ROOT / patch.file).read_text()
    try:
        path.write_text(text.replace(patch.old, patch.new))
        build()
        code, _ = run_tests(patch.tests)
        assert code == 1, f"{patch.tests} is green although {patch.what}"
    finally:
        path.write_text(text)
