"""The Triton row kernels keep the contract: its promises about masks, numerics, invariance and layout, interpreted.

Nothing here knows a bound or a family of inputs: transfuse.promises does, the same that `transfuse verify` runs on a
GPU. Sections 3 and 4 take a dtype of each op in every run, the others in the full one: kernels differ by dtype only in
how they load and store, which section 2 sees in all of them.
"""

import pytest
import torch

from transfuse import dispatch, promises
from transfuse.promises.cases import PARITY_CASES

OPS = ("masked_softmax", "layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm", "gelu", "rotary")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SECTIONS = {
    1: None,  # masks, as rules
    2: None,  # numerics: every named family, forward and backward
    3: ("batch", "position"),  # what threads and processes do is the interpreter's
    4: ("strides", "far-apart", "written", "backward-twice"),
}
EVERY_DTYPE = (1, 2)


def _is_slow(promise):
    taken = DTYPES[OPS.index(promise.op) % len(DTYPES)]
    return promise.slow or promise.section not in EVERY_DTYPE and promise.dtype != taken


def _promises():
    for promise in promises.every():
        named = SECTIONS.get(promise.section, ())
        if (
            promise.op not in OPS
            or promise.dtype not in DTYPES
            or named is not None
            and promise.id.rpartition(".")[2] not in named
        ):
            continue
        if "ulp-all" in promise.id or promise.id.endswith(".compiled") or promise.id.endswith("far-apart-full"):
            continue  # sweeps of the CPU's kernels; torch.compile has a test of its own; gigabytes
        yield pytest.param(promise, id=promise.id, marks=pytest.mark.slow if _is_slow(promise) else ())


@pytest.fixture(scope="module", autouse=True)
def measured_anew():
    promises.forget()
    yield
    promises.forget()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, where a family leaves float's range on purpose
@pytest.mark.parametrize("promise", list(_promises()))
def test_promise_is_kept(promise):
    torch.set_num_threads(1)
    outcome = promises.check(promise, "triton", "cpu")
    assert outcome.status == "ok", f"{outcome.status}: {outcome.reason} {outcome.figure}"


@pytest.mark.parametrize("op", OPS)
def test_triton_is_what_runs(op):
    case = next(case for case in PARITY_CASES if case.op == op)
    with dispatch.use_backend("triton"):
        assert case.explain(*case.inputs(torch.float32)).chosen == "triton"
    assert case.explain(*case.inputs(torch.float32)).chosen == "cpu", "auto never takes an interpreted kernel"
