"""Attention's CUDA kernels keep the other promises: its masks, batches and layouts, and all of varlen and decode."""

import pytest
from emulated_promises import ATTENTION_OPS, PROMISES, each, is_kept, measured_anew  # noqa: F401  a fixture

pytestmark = pytest.mark.usefixtures("measured_anew")
HERE = [p for p in PROMISES if p.op in ATTENTION_OPS and not (p.op == "attention" and p.section == 2)]


@each(HERE)
def test_promise_is_kept(promise, monkeypatch):
    is_kept(promise, monkeypatch)
