"""The CPU's own tests of the row ops and of decoding once more, on emulated CUDA kernels: shapes, strides, masks."""

import os
import re
import subprocess
import sys

import emulator
import pytest

# File -> what else is left out. Of decoding: a hundred repeats and forty steps take minutes, values out of range and
# tables that do not fit are the CPU's to refuse, vmap compares with the CPU.
FILES = {
    "test_norms.py": (),
    "test_gelu.py": (),
    "test_masked_softmax.py": (),
    "test_rotary.py": (),
    "test_decode_attention.py": ("repeats", "generation", "vmap"),
    "test_decode_attention_refusals.py": ("out_of_range", "does_not_fit"),
}
# Compilers do not look through a dispatch mode; raw ops name other dtypes; sweeps and threads are the CPU's own.
LEFT_OUT = ("compile", "inductor", "export", "raw_op", "sweep", "thread", "gradcheck")
LEAST_CALLS = {"test_decode_attention.py": 400, "test_decode_attention_refusals.py": 5}  # of the others 250


@pytest.mark.parametrize("file", FILES)
def test_tests_of_the_op_pass(file):
    wanted = " and ".join(f"not {word}" for word in (*LEFT_OUT, *FILES[file]))
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "on_emulated_kernels",
         "-m", "not slow", "-k", wanted, emulator.ROOT / "tests" / file],
        capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(emulator.HERE), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-2000:]
    assert int(re.search(r"(\d+) calls of emulated kernels", found.stdout)[1]) > LEAST_CALLS.get(file, 250)
