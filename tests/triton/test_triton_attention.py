"""Triton's attention keeps the contract, interpreted: its promises, a pairwise cover of its features, invariance, dropout.

Bounds and families are transfuse.promises', the same that `transfuse verify --backend triton` runs on a GPU. What takes
long here runs with FULL=1; where a kernel's code is the same for two dtypes, one of them is enough otherwise.
"""

import re

import pytest
import torch
from feature_cases import CASES, compare

import transfuse
from transfuse import promises
from transfuse.dispatch import TRITON_DTYPES, dtype_name
from transfuse.promises.cases import gradients_of, selected, PARITY_CASES
from transfuse.reference.attention import dropout_keep_mask
from transfuse.testing import draw

OPS = ("attention", "varlen_attention", "decode_attention")
SECTIONS = {
    1: ("rule-", "bad-offsets", "compiled"),
    2: ("agrees-", "rms.", "row.", "huge-equal-scores", "infinite-score", "poisoned-keys", "head-dims"),
    4: ("strides", "far-apart", "written", "backward-twice"),
    5: ("bad-calls",),
}
# What runs without FULL=1, as regular expressions of ids.
QUICK = (
    r"1\.attention\.float32\.rule-\d",
    r"1\.attention\.bfloat16\.rule-[57]",
    r"1\.varlen_attention\.(float32|bfloat16)\.rule-\d",
    r"1\.varlen_attention\.(any\.bad-offsets|float32\.compiled)",
    r"2\.\w+\.\w+\.agrees-forward",
    r"2\.\w+\.(float32|bfloat16)\.agrees-backward",
    r"2\.attention\.\w+\.huge-equal-scores",
    r"2\.attention\.(float32|bfloat16)\.(infinite-score|poisoned-keys)",
    r"2\.attention\.float32\.(rms|row)\.logits-1e4",
    r"2\.attention\.bfloat16\.(rms|row)\.(normal|very-negative)",
    r"2\.attention\.float16\.(rms|row)\.subnormal",
    r"2\.decode_attention\.bfloat16\.(rms|row)\.logits-1e3",
    r"4\.varlen_attention\.bfloat16\.(written|backward-twice)",
    r"4\.decode_attention\.float16\.written",
    r"5\..*",
)


def _parameters():
    for promise in promises.every():
        what = promise.id.split(".", 3)[3]
        if promise.op not in OPS or promise.dtype not in (*TRITON_DTYPES, None) or promise.slow:
            continue
        if any(what.startswith(start) for start in SECTIONS.get(promise.section, ())):
            quick = any(re.fullmatch(pattern, promise.id) for pattern in QUICK)
            yield pytest.param(promise, id=promise.id, marks=() if quick else pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def measured_anew():
    """What one promise has measured the next may use; what the CPU's kernels measured it may not."""
    promises.forget()
    yield
    promises.forget()


@pytest.mark.parametrize("promise", list(_parameters()))
def test_promise_is_kept(promise):
    torch.set_num_threads(1)
    outcome = promises.check(promise, "triton", "cpu")
    assert outcome.status == "ok", f"{outcome.reason} {outcome.figure}"


@pytest.mark.parametrize("index", range(len(CASES)))
def test_features_together(index):
    dtype = TRITON_DTYPES[0] if index % 4 else TRITON_DTYPES[1 + index // 4 % 2]
    compare(CASES[index], dtype)
