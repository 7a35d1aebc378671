"""The CPU's own tests of the row ops once more, on the emulated CUDA kernels: shapes, strides, masks, gradients."""

import os
import re
import subprocess
import sys

import emulator
import pytest

FILES = ("test_norms.py", "test_gelu.py", "test_masked_softmax.py", "test_rotary.py")
# Compilers do not look through a dispatch mode; raw ops name other dtypes; sweeps and threads are the CPU's own.
LEFT_OUT = ("compile", "inductor", "export", "raw_op", "sweep", "thread", "gradcheck")
LEAST_CALLS = 1000


@pytest.mark.parametrize("file", FILES)
def test_tests_of_the_op_pass(file):
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "on_emulated_kernels",
         "-m", "not slow", "-k", " and ".join(f"not {word}" for word in LEFT_OUT), emulator.ROOT / "tests" / file],
        capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(emulator.HERE), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-2000:]
    assert int(re.search(r"(\d+) calls of emulated kernels", found.stdout)[1]) > LEAST_CALLS / len(FILES)
