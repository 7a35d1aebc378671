"""Raw ops stand in two namespaces with one schema, and Triton's import neither triton nor a compiled module early."""

import subprocess
import sys

import pytest
import torch

import transfuse.ops.attention
import transfuse.ops.decode_attention
import transfuse.ops.gelu
import transfuse.ops.layer_norm
import transfuse.ops.masked_softmax
import transfuse.ops.rms_norm
import transfuse.ops.rotary
import transfuse.ops.varlen_attention  # noqa: F401
from transfuse.raw_ops import RAW_OPS


def test_every_kind_has_every_raw_op():
    assert set(RAW_OPS["triton"]) == set(RAW_OPS["compiled"])


@pytest.mark.parametrize("name", sorted(RAW_OPS["triton"]))
def test_schemas_are_those_of_csrc(name):
    ours, compiled = (str(RAW_OPS[kind][name]._schema).partition("::")[2] for kind in ("triton", "compiled"))
    assert ours == compiled


def test_declaring_them_imports_no_triton():
    code = """
import sys, transfuse, torch
before = "triton" in sys.modules
transfuse.layer_norm(torch.ones(2, 8), (8,))
assert ("triton" in sys.modules) == before and hasattr(torch.ops.transfuse_triton, "layer_norm_forward")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_without_the_compiled_module_they_are_there():
    code = """
import sys
sys.modules["transfuse._C"] = None
import torch, transfuse
assert "transfuse._C is not there" in transfuse.backends()["cpu"]
with transfuse.use_backend("reference"):
    transfuse.gelu(torch.ones(3))
from transfuse.raw_ops import RAW_OPS
assert RAW_OPS["triton"] and not RAW_OPS["compiled"]
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_fake_kernel_gives_shapes():
    with torch.device("meta"):
        x, weight = torch.empty(2, 3, 8, dtype=torch.bfloat16), torch.empty(8)
    output, total = RAW_OPS["triton"]["add_layer_norm_forward"](x, x, weight, None, 1, 1e-5)
    assert output.shape == total.shape == x.shape and output.dtype == torch.bfloat16
