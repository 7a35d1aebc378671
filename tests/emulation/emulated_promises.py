"""Which promises of the contract the emulated CUDA kernels are held to, and how one is asked.

Nothing here knows a bound or a family of inputs: transfuse.promises does, the same that `transfuse verify` runs on a
GPU. Every access of every thread is checked on the way (README.md), and the order of blocks and threads differs from
promise to promise.
"""

import zlib

import emulated_ops
import pytest
import torch

from transfuse import promises
from transfuse.promises import attention_numerics, determinism
from transfuse.promises.cases import OPS as ALL_OPS

OPS = [op for op in ALL_OPS if emulated_ops.stem_of(f"{op}_")]
# Attention's promises cost most, so their tests are files of their own, which run side by side.
ATTENTION_OPS = ("attention", "varlen_attention", "decode_attention")
SECTIONS = {
    1: None,  # masks, as rules
    2: None,  # numerics: every named family, forward and backward
    3: ("batch", "position"),  # what threads and processes do is the host's
    4: ("strides", "far-apart", "written", "backward-twice"),
}
PROMISES = [
    promise
    for promise in promises.every()
    if promise.op in OPS and promise.dtype in emulated_ops.DTYPES and promise.section in SECTIONS and not promise.slow
    if not promise.id.endswith(".compiled")  # torch.compile does not look through a dispatch mode
    if SECTIONS[promise.section] is None or promise.id.rpartition(".")[2] in SECTIONS[promise.section]
]
SMALLER_BATCHES = ("attention", "varlen_attention")  # of emulated_ops.LARGEST_BATCH entries


@pytest.fixture(scope="module")
def measured_anew():
    """What one promise has measured the next may use; what the CPU's kernels measured it may not."""
    emulated_ops.libraries()  # a kernel that does not compile is one failure
    promises.forget()
    yield
    promises.forget()


def is_kept(promise, monkeypatch):
    """Fails unless the emulated kernels keep it."""
    torch.set_num_threads(1)
    if promise.op in SMALLER_BATCHES:
        monkeypatch.setattr(determinism, "LARGEST_BATCH", emulated_ops.LARGEST_BATCH)
    if promise.op == "attention" and promise.section == 2 and promise.dtype == torch.float32:
        monkeypatch.setattr(attention_numerics, "SEEDS", emulated_ops.FLOAT32_SEEDS)
    with emulated_ops.EmulatedKernels(seed=zlib.crc32(promise.id.encode())):
        outcome = promises.check(promise, "cpu")
    assert outcome.status == "ok", f"{outcome.reason} {outcome.figure}"


def each(chosen):
    return pytest.mark.parametrize("promise", chosen, ids=lambda promise: promise.id)
