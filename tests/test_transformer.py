"""transfuse.nn.TransformerEncoderLayer and TransformerEncoder give what torch.nn's give."""

import copy
import pickle
import warnings

import pytest
import torch
from torch.nn.functional import gelu as torch_gelu

import transfuse
from transfuse.nn import LayerNorm, MultiheadAttention, TransformerEncoder, TransformerEncoderLayer
from transfuse.testing import assert_close, draw

# torch deprecates masks of two kinds in one call; both sides take them.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched")

BATCH, LENGTH, WIDTH, HEADS, HIDDEN = 3, 7, 24, 4, 40
SIZES = {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": HIDDEN, "dropout": 0.0, "layer_norm_eps": 0.3}
PADDING = torch.arange(LENGTH) >= torch.tensor([[7], [4], [6]])  # True = ignore
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
PER_HEAD = torch.rand(BATCH * HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) > 0.7
PER_HEAD[..., 0] = False  # torch gives NaN to a query with nothing left
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def squared_relu(x):
    return torch.relu(x).square()


LAYERS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "norm first": {"norm_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "gelu": {"activation": "gelu", "batch_first": True},
    "gelu module, tanh": {"activation": torch.nn.GELU("tanh"), "norm_first": True},
    "our gelu": {"activation": transfuse.gelu, "bias": False},
    "custom activation": {"activation": squared_relu, "batch_first": True},
    "activation module": {"activation": torch.nn.SiLU(), "norm_first": True, "batch_first": True},
}
CALLS = {
    "no mask": {},
    "boolean mask": {"src_mask": CAUSAL},
    "causal hint": {"src_mask": CAUSAL, "is_causal": True},
    "float mask": {"src_mask": draw(LENGTH, LENGTH, seed=8)},
    "mask per head": {"src_mask": PER_HEAD},
    "padding": {"src_key_padding_mask": PADDING},
    "float padding": {"src_key_padding_mask": torch.zeros(BATCH, LENGTH).masked_fill(PADDING, -torch.inf)},
    "both": {"src_mask": CAUSAL, "src_key_padding_mask": PADDING},
    "float mask, boolean padding": {"src_mask": draw(LENGTH, LENGTH, seed=8), "src_key_padding_mask": PADDING},
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors: waking a second thread costs more than the work."""
    torch.set_num_threads(1)


def pair(**options):
    """torch's layer and ours with the same parameters, none of them zero."""
    stock = torch.nn.TransformerEncoderLayer(**SIZES | options)
    with torch.no_grad():
        for i, parameter in enumerate(stock.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=60 + i, scale=0.3))
    ours = TransformerEncoderLayer(**SIZES | options)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def source(module, dtype=torch.float32, batch=BATCH, seed=0):
    """src in the module's order, wanting a gradient."""
    batch_first = (module.layers[0] if hasattr(module, "layers") else module).self_attn.batch_first
    shape = (batch, LENGTH, WIDTH) if batch_first else (LENGTH, batch, WIDTH)
    return draw(*shape, dtype=dtype, seed=seed, requires_grad=True)


def assert_module_matches(stock, ours, *args, num_terms=1024, gradients=True, one_scale=False, **kwargs):
    """Output and every gradient of ours against torch's module in float64 on the same numbers.

    Args:
        stock, ours: modules with the same parameters, ours in the dtype under test.
        args, kwargs: of forward; floating tensors go to stock widened. Those that require grad have their gradients
            compared, and so have all parameters.
        gradients: False runs both without autograd and compares outputs alone.
        one_scale: gradients that cancel are measured against the output's gradient or the largest of all.
    """
    results = []
    for module, widen in ((copy.deepcopy(stock).double(), True), (ours, False)):
        leaves = []

        def prepare(value):
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                return value
            leaf = value.detach().to(torch.float64) if widen else value.detach()
            if value.requires_grad and gradients:
                leaves.append(leaf.requires_grad_())
            return leaf

        with torch.set_grad_enabled(gradients):
            output = module(*map(prepare, args), **{name: prepare(value) for name, value in kwargs.items()})
        output = output[0] if isinstance(output, tuple) else output
        results.append([output])
        if gradients:
            # bfloat16 values are exact in every dtype, so that both sides get the same incoming gradient.
            grad = draw(*output.shape, dtype=torch.bfloat16, seed=5).to(output.dtype)
            results[-1] += torch.autograd.grad(output, [*leaves, *module.parameters()], grad)
    (expected, *exact_grads), (actual, *grads) = results
    assert_close(actual, expected, num_terms, "output", slack=4.0)
    entering = max([1.0, *(float(grad.abs().max()) for grad in exact_grads if grad.numel())]) if one_scale else 0.0
    for i, (a, e) in enumerate(zip(grads, exact_grads, strict=True)):
        assert_close(a, e, num_terms, f"gradient {i}", slack=4.0, entering=entering)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("layer", LAYERS)
def test_equals_torch(layer, call):
    stock, ours = pair(**LAYERS[layer])
    assert_module_matches(stock, ours, source(ours), **CALLS[call])


@pytest.mark.parametrize("layer", ("gelu", "gelu module, tanh"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype, layer):
    """Smooth activations: a ReLU's gradient jumps where 16 bits round its input across 0, torch's as much as ours."""
    for call in ("no mask", "float mask", "both"):
        stock, ours = (module.to(dtype) for module in pair(**LAYERS[layer]))
        kwargs = dict(CALLS[call])
        if call == "float mask":
            kwargs["src_mask"] = kwargs["src_mask"].to(dtype)
        assert_module_matches(stock, ours, source(ours, dtype), **kwargs)


@pytest.mark.parametrize("layer", LAYERS)
def test_unbatched(layer):
    stock, ours = pair(**LAYERS[layer])
    src = draw(LENGTH, WIDTH, requires_grad=True)
    assert_module_matches(stock, ours, src)
    assert_module_matches(stock, ours, src, src_mask=CAUSAL, src_key_padding_mask=PADDING[1])


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("layer", LAYERS)
def test_eval_equals_training_and_torchs_fast_path(layer, call):
    """Without dropout the mode changes nothing."""
    stock, ours = pair(**LAYERS[layer])
    src = source(ours).detach()
    with torch.no_grad():
        trained = ours(src, **CALLS[call])
        stock.eval(), ours.eval()
        if layer == "gelu module, tanh" or "float mask" in call:
            # torch's fast path computes every GELU as the erf form and takes any mask value but 0 for "ignore".
            stock.activation_relu_or_gelu = 0
        expected, actual = stock(src, **CALLS[call]), ours(src, **CALLS[call])
    assert torch.equal(actual, trained)
    assert_close(actual, expected, 1024, slack=4.0)


@pytest.mark.parametrize("layer", ("gelu", "norm first"))
def test_an_entry_of_padding_alone(layer):
    """torch gives NaN, to all gradients too. Ours is finite, and the other entries never see it."""
    _, ours = pair(**LAYERS[layer])
    padding = torch.cat((PADDING, torch.ones(1, LENGTH, dtype=torch.bool)))
    src = source(ours, batch=BATCH + 1)
    batch_dim = 0 if ours.self_attn.batch_first else 1
    rest = src.narrow(batch_dim, 0, BATCH)
    grad = draw(*rest.shape, seed=5)
    leaves = [src, *ours.parameters()]
    output = ours(src, src_key_padding_mask=padding)
    assert output.isfinite().all()
    assert torch.equal(output.narrow(batch_dim, 0, BATCH), ours(rest, src_key_padding_mask=PADDING))
    actual = torch.autograd.grad(output.narrow(batch_dim, 0, BATCH), leaves, grad)
    expected = torch.autograd.grad(ours(rest, src_key_padding_mask=PADDING), leaves, grad)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e.double(), BATCH * LENGTH)


@pytest.mark.parametrize("part", ("dropout", "dropout1", "dropout2"))
@pytest.mark.parametrize("norm_first", (False, True))
def test_dropout_acts_where_torchs_does(norm_first, part):
    """p = 1 drops all there is at one place, whatever the random numbers, in training only."""
    stock, ours = pair(norm_first=norm_first, activation="gelu")
    getattr(stock, part).p = getattr(ours, part).p = 1.0
    src = source(ours)
    assert_module_matches(stock, ours, src)
    dropped = ours(src)
    stock.eval(), ours.eval()
    assert not torch.equal(ours(src), dropped)
    assert_module_matches(stock, ours, src)


@pytest.mark.parametrize("norm_first", (False, True))
def test_dropout_draws_anew_in_training_only(norm_first):
    """Attention's alone, then all four."""
    for attention_alone in (True, False):
        _, ours = pair(dropout=0.5, norm_first=norm_first)
        for dropout in (ours.dropout, ours.dropout1, ours.dropout2) if attention_alone else ():
            dropout.p = 0.0
        src = source(ours)
        torch.manual_seed(3)
        first, second = ours(src), ours(src)
        torch.manual_seed(3)
        assert torch.equal(ours(src), first) and not torch.equal(second, first)
        ours.eval()
        assert torch.equal(ours(src), ours(src))


def test_constructor_draws_torchs_initial_values():
    built = []
    for cls in (torch.nn.TransformerEncoderLayer, TransformerEncoderLayer):
        torch.manual_seed(0)
        built.append(cls(WIDTH, HEADS, HIDDEN, dtype=torch.float64))
    stock, ours = built
    assert isinstance(ours, torch.nn.TransformerEncoderLayer)
    assert type(ours.self_attn) is MultiheadAttention and type(ours.norm1) is type(ours.norm2) is LayerNorm
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), stock.state_dict().values(), strict=True))
    stock.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("layer", ("gelu", "custom activation"))
def test_copies_and_pickles(layer):
    _, ours = pair(**LAYERS[layer])
    stack = TransformerEncoder(ours, 2, LayerNorm(WIDTH))
    for module in (ours, stack):
        src = source(module)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert type(other) is type(module)
            assert torch.equal(other(src), module(src))


@pytest.mark.parametrize("layer", ("gelu", "norm first", "custom activation"))
def test_compiles_whole(layer):
    _, ours = pair(**LAYERS[layer])
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for call in ("both", "float mask"):
        src = source(ours)
        leaves = [src, *ours.parameters()]
        outputs = [module(src, **CALLS[call]) for module in (ours, compiled)]
        assert_close(outputs[1], outputs[0].double(), 1024)
        grads = [torch.autograd.grad(output, leaves, draw(*output.shape, seed=5)) for output in outputs]
        for expected, actual in zip(*grads, strict=True):
            assert_close(actual, expected.double(), 1024, slack=4.0)


def test_autocast():
    stock, ours = pair(activation="gelu")
    src = source(ours)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = stock(src), ours(src)
    assert actual.dtype == expected.dtype
    exact = copy.deepcopy(stock).double()(src.double())
    error, torchs = (float((output.detach().double() - exact.detach()).abs().max()) for output in (actual, expected))
    assert error <= max(2 * torchs, 1e-2), (error, torchs)


def test_parts_that_differ_are_called():
    """Hooks are heard, subclasses and replaced parts run, whatever may be fused."""
    parts = ("self_attn", "norm1", "norm2", "linear1", "activation", "linear2", "dropout", "dropout1", "dropout2")
    for norm_first in (False, True):
        for name in parts:
            heard = []
            stock, ours = pair(activation="gelu", norm_first=norm_first)
            ours.activation = torch.nn.GELU()
            getattr(ours, name).register_forward_hook(lambda *_: heard.append(1))
            assert_module_matches(stock, ours, source(ours))
            assert len(heard) == 1, f"{name} was called {len(heard)} times"

    class Doubled(torch.nn.LayerNorm):
        def forward(self, input):
            return 2 * super().forward(input)

    for norm_first in (False, True):
        stock, ours = pair(norm_first=norm_first)
        stock.norm2 = ours.norm2 = Doubled(WIDTH)
        stock.norm1 = ours.norm1 = torch.nn.Identity()
        stock.linear1 = ours.linear1 = torch.nn.Sequential(torch.nn.Linear(WIDTH, HIDDEN))
        stock.activation = ours.activation = torch.nn.GELU("tanh")
        ours.linear1.in_features = WIDTH
        assert_module_matches(stock, ours, source(ours))


def test_nested_tensors_are_torchs():
    stock, ours = pair(batch_first=True)
    stock.eval(), ours.eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([draw(n, WIDTH, seed=n) for n in (3, 5)])
        for a, e in zip(ours(nested).unbind(), stock(nested).unbind(), strict=True):
            assert torch.equal(a, e)


# ---- the stack ----


def stacks(layer, norm=False, layers=2):
    stock, ours = pair(**LAYERS[layer])
    norms = [cls(WIDTH, eps=0.3) if norm else None for cls in (torch.nn.LayerNorm, LayerNorm)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says why its nested path will not be taken
        return torch.nn.TransformerEncoder(stock, layers, norms[0]), TransformerEncoder(ours, layers, norms[1])


@pytest.mark.parametrize("norm", (False, True))
@pytest.mark.parametrize("call", ("no mask", "boolean mask", "float mask", "both"))
@pytest.mark.parametrize("layer", ("plain", "gelu", "norm first"))
def test_stack_equals_torch(layer, call, norm):
    stock, ours = stacks(layer, norm)
    kwargs = {name.replace("src_mask", "mask"): value for name, value in CALLS[call].items()}
    assert_module_matches(stock, ours, source(ours), **kwargs)


@pytest.mark.parametrize("norm", (False, True))
def test_stack_in_eval_equals_torchs_nested_path_where_tokens_are(norm):
    stock, ours = stacks("gelu", norm)
    stock.eval(), ours.eval()
    src = source(ours).detach()
    with torch.no_grad():
        expected, actual = (module(src, src_key_padding_mask=PADDING) for module in (stock, ours))
        assert_close(actual[~PADDING], expected[~PADDING], 1024, slack=4.0)
        nothing = stock.norm.bias if norm else torch.zeros(WIDTH)
        assert torch.equal(expected[PADDING], nothing.expand_as(expected[PADDING])), "torch took its nested path"
        assert torch.equal(actual, ours.train()(src, src_key_padding_mask=PADDING)), "the same values in every mode"


def test_stack_takes_over_torchs_layers_and_leaves_the_caller_his():
    stock, _ = pair(activation="gelu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to say about a nested path that is not taken
        ours = TransformerEncoder(stock, 2)
    assert type(stock) is torch.nn.TransformerEncoderLayer and type(stock.norm1) is torch.nn.LayerNorm
    assert all(type(layer) is TransformerEncoderLayer for layer in ours.layers)
    assert type(ours.layers[1].self_attn) is MultiheadAttention
    assert ours.enable_nested_tensor is True and ours.mask_check is True
    theirs = torch.nn.TransformerEncoder(stock, 2, enable_nested_tensor=False)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_module_matches(theirs, ours, source(ours))


def test_stack_of_other_layers_runs_as_torchs():
    class Own(torch.nn.TransformerEncoderLayer):
        def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
            assert src_mask.is_floating_point() and is_causal, "torch hands down its own form of masks"
            return 2 * src

    ours = TransformerEncoder(Own(**SIZES), 2)
    src = source(ours)
    assert torch.equal(ours(src, CAUSAL.float().masked_fill(CAUSAL, -torch.inf)), 4 * src)


def test_stack_compiles_whole():
    _, ours = stacks("gelu", norm=True)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    src = source(ours)
    assert_close(compiled(src, CAUSAL, PADDING), ours(src, CAUSAL, PADDING).double(), 1024)


# ---- refusals ----

S = torch.zeros(LENGTH, BATCH, WIDTH)
REFUSALS = (
    (TypeError, "src is a list, expected a Tensor", ([1],), {}),
    (ValueError, "src has shape (7, 3, 5), expected (length, batch, 24) or (length, 24)", (S[..., :5],), {}),
    (ValueError, "src has shape (24,), expected (length, batch, 24) or (length, 24)", (S[0, 0],), {}),
    (ValueError, "src_mask has shape (7, 5), expected (7, 7) or (12, 7, 7)", (S, torch.zeros(7, 5)), {}),
    (ValueError, "src_mask has shape (3, 7, 7), expected (7, 7) or (4, 7, 7)", (S[:, 0], torch.zeros(3, 7, 7)), {}),
    (TypeError, "src_mask has dtype int64, expected bool or a float dtype", (S, torch.zeros(7, 7).long()), {}),
    (TypeError, "src_mask is a list, expected a Tensor or None", (S, [[0]]), {}),
    (ValueError, "src_key_padding_mask has shape (7, 3), expected (3, 7)", (S,), {"src_key_padding_mask": PADDING.T}),
    (ValueError, "src_key_padding_mask has shape (3, 7), expected (7,)", (S[:, 0],), {"src_key_padding_mask": PADDING}),
    (RuntimeError, "src_mask is None, expected one with is_causal=True (a hint about it)", (S,), {"is_causal": True}),
)


@pytest.mark.parametrize("stack", (False, True))
@pytest.mark.parametrize("error, message, args, kwargs", REFUSALS, ids=[row[1] for row in REFUSALS])
def test_refusals_say_what_was_expected(error, message, args, kwargs, stack):
    layer = TransformerEncoderLayer(**SIZES)
    with pytest.raises(error) as raised:
        (TransformerEncoder(layer, 1) if stack else layer)(*args, **kwargs)
    assert str(raised.value) == f"TransformerEncoderLayer: {message}"


def test_gelu_by_name_is_the_fused_one(monkeypatch):
    """activation="gelu" never reaches torch's gelu."""
    page = __import__("transfuse.nn.transformer", fromlist=["gelu"])
    calls = []
    monkeypatch.setattr(page, "gelu", lambda *args, **kwargs: calls.append(kwargs) or transfuse.gelu(*args, **kwargs))
    _, ours = pair(activation=torch_gelu)
    ours(source(ours))
    assert calls and calls[0]["bias"] is ours.linear1.bias
