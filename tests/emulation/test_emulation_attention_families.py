"""Attention's CUDA kernels keep the promises of CONTRACT section 2: every named family, forward and backward."""

import emulated_ops
import pytest
import torch
from test_emulation_parity import OF_ATTENTION, is_kept, measured_anew  # noqa: F401  a fixture

from transfuse.promises import attention_numerics


@pytest.mark.parametrize("promise", OF_ATTENTION, ids=lambda promise: promise.id)
def test_promise_is_kept(promise, monkeypatch):
    if promise.dtype == torch.float32:
        monkeypatch.setattr(attention_numerics, "SEEDS", emulated_ops.FLOAT32_SEEDS)
    is_kept(promise)
