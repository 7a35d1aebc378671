"""Lengths, offsets and block tables on a GPU: clamped by the kernels, looked at where TRANSFUSE_CHECK=1 asks for it."""

import pytest
import torch

from transfuse.ops import attention, attention_checks, decode_attention, varlen_attention

BAD = torch.tensor([0, 7, 4])


def elsewhere(*shape):
    """Stands for a tensor on a GPU."""
    return torch.empty(shape, device="meta")


def test_values_on_a_gpu_are_read_where_asked(monkeypatch):
    assert not attention_checks._may_wait_for("cuda")
    monkeypatch.setenv("TRANSFUSE_CHECK", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert attention_checks._may_wait_for("cuda") and not attention_checks._may_wait_for("meta")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not attention_checks._may_wait_for("cuda")


def test_what_cannot_be_read_is_left_to_the_kernels():
    assert not attention_checks.may_read_values(elsewhere(3))
    attention_checks.check_offset_values("op", "cu_seqlens_q", elsewhere(3), 4, "query", 4)
    attention_checks.check_length_values("op", "seqlens_k", elsewhere(3), 4)


CALLS = {
    "attention": lambda: attention._run_kernels(
        "compiled", *(elsewhere(3, 1, 5, 8),) * 3, None, None, BAD, 1.0, False, False, {}
    ),
    "varlen_attention": lambda: varlen_attention._run_kernels(
        "compiled", *(elsewhere(4, 1, 8),) * 3, BAD, BAD, 7, 7, 1.0, False, False, {}
    ),
    "decode_attention": lambda: decode_attention._run_kernels(
        "compiled", elsewhere(3, 1, 1, 8), *(elsewhere(3, 1, 5, 8),) * 2, BAD, None, None, None, None, 1.0, {}
    ),
}


@pytest.mark.parametrize("op", CALLS)
def test_the_page_looks_before_a_gpu_kernel_runs(op):
    """Of kernels that do not check for themselves: those of a device other than the CPU."""
    with pytest.raises(ValueError, match=r"\[1\] is 7, expected"):
        CALLS[op]()
