"""Attention's CUDA kernels keep the promises of CONTRACT section 2: every named family, forward and backward."""

import pytest
from emulated_promises import PROMISES, each, is_kept, measured_anew  # noqa: F401  a fixture

pytestmark = pytest.mark.usefixtures("measured_anew")


@each([promise for promise in PROMISES if promise.op == "attention" and promise.section == 2])
def test_promise_is_kept(promise, monkeypatch):
    is_kept(promise, monkeypatch)
