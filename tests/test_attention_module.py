"""transfuse.nn.MultiheadAttention gives what torch.nn.MultiheadAttention gives."""

import copy
import pickle

import pytest
import torch

from transfuse import use_backend
from transfuse.nn import MultiheadAttention
from transfuse.testing import assert_close, draw

BATCH, LEN_Q, LEN_K, EMBED, HEADS = 3, 6, 9, 24, 4
PADDING = torch.arange(LEN_K) >= torch.tensor([[9], [4], [7]])  # True = ignore
IGNORE = torch.rand(LEN_Q, LEN_K, generator=torch.Generator().manual_seed(1)) > 0.7
IGNORE[:, 0] = False  # torch gives NaN to a query with nothing left
IGNORE_PER_HEAD = torch.rand(BATCH * HEADS, LEN_Q, LEN_K, generator=torch.Generator().manual_seed(2)) > 0.7
IGNORE_PER_HEAD[..., 0] = False


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors: waking a second thread costs more than the work. Tests about threads set their own count."""
    torch.set_num_threads(1)

MODULES = {
    "plain": {},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True},
    "other key and value sizes": {"kdim": 10, "vdim": 14},
    "bias_k and bias_v": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True},
    "both additions, batch first": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}
CALLS = {
    "no mask": {},
    "padding": {"key_padding_mask": PADDING},
    "attn_mask": {"attn_mask": IGNORE},
    "attn_mask per head": {"attn_mask": IGNORE_PER_HEAD},
    "both": {"attn_mask": IGNORE, "key_padding_mask": PADDING},
    "float attn_mask": {"attn_mask": draw(LEN_Q, LEN_K, seed=8)},
    "float per head and padding": {
        "attn_mask": draw(BATCH * HEADS, LEN_Q, LEN_K, seed=8),
        "key_padding_mask": torch.zeros(BATCH, LEN_K).masked_fill(PADDING, -torch.inf),
    },
}


def pair(**options):
    """torch's module and ours with the same parameters, none of them zero."""
    stock = torch.nn.MultiheadAttention(EMBED, HEADS, **options)
    with torch.no_grad():
        for i, parameter in enumerate(stock.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=60 + i, scale=0.3))
    ours = MultiheadAttention(EMBED, HEADS, **options)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def call_inputs(module, batched=True):
    sizes = ((LEN_Q, EMBED), (LEN_K, module.kdim), (LEN_K, module.vdim))
    tensors = []
    for i, (length, size) in enumerate(sizes):
        shape = (length, size) if not batched else (BATCH, length, size) if module.batch_first else (length, BATCH, size)
        tensors.append(draw(*shape, seed=i, requires_grad=True))
    return tensors


def assert_same(stock, ours, tensors, **options):
    """Outputs and all gradients, of inputs and parameters."""
    results = []
    for module in (stock, ours):
        output, weights = module(*tensors, need_weights=False, **options)
        assert weights is None
        leaves = [*tensors, *module.parameters()]
        results.append([output, *torch.autograd.grad(output, leaves, draw(*output.shape, seed=5))])
    for expected, actual in zip(*results):
        assert_close(actual, expected.double(), EMBED, slack=4.0)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("module", MODULES)
def test_equals_torch(module, call):
    stock, ours = pair(**MODULES[module])
    assert_same(stock, ours, call_inputs(stock), **CALLS[call])


@pytest.mark.parametrize("batch_first", (False, True))
def test_self_attention_and_unbatched_inputs(batch_first):
    stock, ours = pair(batch_first=batch_first)
    (query, *_), options = call_inputs(stock), {"need_weights": False}
    assert_close(ours(query, query, query, **options)[0], stock(query, query, query, **options)[0].double(), EMBED)
    tensors = call_inputs(stock, batched=False)
    assert_same(stock, ours, tensors, key_padding_mask=PADDING[1], attn_mask=IGNORE)


def test_causal_hint():
    stock, ours = pair()
    query = draw(LEN_Q, BATCH, EMBED)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(LEN_Q)
    options = {"attn_mask": mask, "is_causal": True, "need_weights": False}
    assert_close(ours(query, query, query, **options)[0], stock(query, query, query, **options)[0].double(), EMBED)
    with pytest.raises(RuntimeError, match="MultiheadAttention: attn_mask is None"):
        ours(query, query, query, is_causal=True, need_weights=False)


def test_weights_come_from_torch():
    stock, ours = pair()
    tensors = call_inputs(stock)
    for average in (True, False):
        for actual, expected in zip(ours(*tensors, average_attn_weights=average), stock(*tensors, average_attn_weights=average)):
            assert torch.equal(actual, expected)


def test_a_query_with_nothing_left_is_the_projection_of_zero():
    _, ours = pair()
    output, _ = ours(*call_inputs(ours), attn_mask=torch.ones(LEN_Q, LEN_K).bool(), need_weights=False)
    assert torch.equal(output, ours.out_proj.bias.expand_as(output))


def test_eval_and_fast_path_conditions():
    """In eval under no_grad torch takes another path of its own: still the same numbers."""
    stock, ours = pair(batch_first=True)
    stock.eval(), ours.eval()
    tensors = call_inputs(stock)
    with torch.no_grad():
        for options in ({}, {"key_padding_mask": PADDING}):
            expected = stock(tensors[1], tensors[1], tensors[1], need_weights=False, **options)[0]
            assert_close(ours(tensors[1], tensors[1], tensors[1], need_weights=False, **options)[0], expected.double(), EMBED)


def test_constructor_state_dict_copies_and_pickles():
    stock, ours = pair(add_bias_kv=True)
    assert isinstance(ours, torch.nn.MultiheadAttention)
    assert list(ours.state_dict()) == list(stock.state_dict())
    tensors = call_inputs(ours)
    expected = ours(*tensors, need_weights=False)[0]
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(*tensors, need_weights=False)[0], expected)
    stock.__class__ = MultiheadAttention
    assert torch.equal(stock(*tensors, need_weights=False)[0], expected)


@pytest.mark.filterwarnings("ignore::transfuse.TransfuseWarning")
def test_dropout_acts_in_training_only():
    _, ours = pair(dropout=0.5)
    tensors = call_inputs(ours)
    torch.manual_seed(0)
    first = ours(*tensors, need_weights=False)[0]
    assert not torch.equal(first, ours(*tensors, need_weights=False)[0])
    ours.eval()
    assert torch.equal(ours(*tensors, need_weights=False)[0], ours(*tensors, need_weights=False)[0])


def test_bfloat16_and_autocast():
    stock, ours = pair()
    tensors = [t.detach() for t in call_inputs(ours)]
    with use_backend("reference"):
        exact = copy.deepcopy(ours).double()(*(t.double() for t in tensors), need_weights=False)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ours(*tensors, need_weights=False)[0]
    assert output.dtype == torch.bfloat16
    assert_close(output, exact, EMBED, slack=4.0)
    low = copy.deepcopy(ours).bfloat16()(*(t.bfloat16() for t in tensors), need_weights=False)[0]
    assert_close(low, exact, EMBED, slack=8.0)


Q = torch.zeros(LEN_Q, BATCH, EMBED)
REFUSALS = (
    (ValueError, "MultiheadAttention: key has shape (6, 24), expected (batch, length, embed_dim) in the module's order", (Q, Q[:, 0], Q), {}),
    (ValueError, "MultiheadAttention: value has shape (6, 3, 24), expected (length, embed_dim)", (Q[:, 0], Q[:, 0], Q), {}),
    (ValueError, "MultiheadAttention: attn_mask has shape (6, 5), expected (6, 6) or (12, 6, 6)", (Q, Q, Q),
     {"attn_mask": torch.zeros(6, 5).bool()}),
    (ValueError, "MultiheadAttention: key_padding_mask has shape (6, 3), expected (3, 6)", (Q, Q, Q),
     {"key_padding_mask": torch.zeros(6, 3).bool()}),
    (TypeError, "MultiheadAttention: attn_mask has dtype int64, expected bool or a float dtype", (Q, Q, Q),
     {"attn_mask": torch.zeros(6, 6).long()}),
    (TypeError, "MultiheadAttention: query is a NoneType, expected a Tensor", (None, Q, Q), {}),
    (TypeError, "MultiheadAttention: attn_mask is a list, expected a Tensor or None", (Q, Q, Q), {"attn_mask": [[0]]}),
    (ValueError, "MultiheadAttention: query has 5 features, expected 24", (Q[..., :5], Q, Q), {}),
    (ValueError, "MultiheadAttention: value has 5 features, expected 24", (Q, Q, Q[..., :5]), {}),
    (ValueError, "MultiheadAttention: key has batch size 1, expected 3 (query's)", (Q, Q[:, :1], Q[:, :1]), {}),
    (ValueError, "MultiheadAttention: value has batch size 2, expected 3 (query's)", (Q, Q, Q[:, :2]), {}),
    (ValueError, "MultiheadAttention: key has batch size 3, expected 1 (query's)", (Q[:, :1], Q, Q), {}),
    (ValueError, "MultiheadAttention: value has 4 positions, expected 6 (key's)", (Q, Q, Q[:4]), {}),
)


@pytest.mark.parametrize("error, message, args, kwargs", REFUSALS, ids=[row[1] for row in REFUSALS])
def test_refusals_say_what_was_expected(error, message, args, kwargs):
    with pytest.raises(error) as raised:
        MultiheadAttention(EMBED, HEADS)(*args, need_weights=False, **kwargs)
    assert str(raised.value) == message
