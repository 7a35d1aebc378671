"""What torch tests its own functions and modules with (OpInfo, ModuleInfo) goes through ours, forward and backward.

torch.testing._internal holds, for every function, the inputs torch's own test suite runs it on. Each of them is run
here in every dtype, as it comes and with strides, and the result is compared with torch's in float64 on the same
numbers. Where torch takes or gives something else than we do stands in DEPARTURES, with what holds instead: that is
asserted too, so no sample is passed over. Floors on the counts keep a renaming upstream from emptying the test.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from test_transformer import assert_module_matches

import transfuse
from transfuse.dispatch import use_backend
from transfuse.testing import assert_close, draw

# torch deprecates masks of two kinds in one call; both sides take them.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
in_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors: waking a second thread costs more than the work."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def torchs():
    """torch's two databases: five seconds and 1,600 modules, so only when a test asks. Needs the package expecttest."""
    frozen = torch.backends.__allow_nonbracketed_mutation_flag
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
        from torch.testing._internal.common_modules import module_db
    torch.backends.__allow_nonbracketed_mutation_flag = frozen  # the import forbids every later test to set a flag
    return op_db, module_db


# ---- functions ----


class Op(NamedTuple):
    """One function of torch: ours in its signature, and how many samples there are at least in torch 2.10 and later."""

    ours: Callable
    floor: int


def softmax(input, dim, dtype=None):
    return transfuse.masked_softmax(input if dtype is None else input.to(dtype), dim=dim)


OPS = {
    "nn.functional.scaled_dot_product_attention": Op(transfuse.scaled_dot_product_attention, 25),
    "softmax": Op(softmax, 14),
    "masked.softmax": Op(lambda input, dim, mask: transfuse.masked_softmax(input, mask, dim=dim), 24),
    "nn.functional.layer_norm": Op(transfuse.layer_norm, 6),
    "nn.functional.rms_norm": Op(transfuse.rms_norm, 6),
    "nn.functional.gelu": Op(transfuse.gelu, 8),
}


class Call(NamedTuple):
    """One call of one sample: the function of torch's, ours, and the arguments of both."""

    torchs: Callable
    ours: Callable
    args: tuple
    kwargs: dict


def run(function, call, widen):
    """[output, gradients...]; widened to float64, or in the sample's dtype."""
    leaves = []

    def prepare(value):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        leaf = value.detach().to(torch.float64) if widen else value.detach()
        if value.requires_grad:
            leaves.append(leaf.requires_grad_())
        return leaf

    output = function(*map(prepare, call.args), **{name: prepare(value) for name, value in call.kwargs.items()})
    # bfloat16 values are exact in every dtype, so that both sides get the same incoming gradient.
    grad = draw(*output.shape, dtype=torch.bfloat16, seed=5).to(output.dtype)
    return [output, *torch.autograd.grad(output, leaves, grad)]


def compare(actual, expected, call):
    """Asserts that two results of run() agree within the budget.

    Gradients cancel (a norm of two elements, a saturated softmax): what enters their sums is of the size of the
    output's gradient or of the largest one there is.
    """
    num_terms = max(1, *(value.numel() for value in call.args if isinstance(value, torch.Tensor)))
    sides = 2.0 if actual[0].dtype == torch.float64 else 1.0  # there torch's result has an error of its own
    assert_close(actual[0], expected[0], num_terms, "output", slack=sides)
    entering = max([1.0, *(float(grad.abs().max()) for grad in expected[1:] if grad.numel())])
    for i, (a, e) in enumerate(zip(actual[1:], expected[1:], strict=True)):
        assert_close(a, e, num_terms, f"gradient {i}", slack=4.0 * sides, entering=entering)


def equals_torch(call):
    compare(run(call.ours, call, widen=False), run(call.torchs, call, widen=True), call)


def is_refused(message):
    def check(call):
        with pytest.raises(ValueError) as raised:
            call.ours(*call.args, **call.kwargs)
        assert str(raised.value).startswith(message)

    return check


def same_mask_on_every_backend(call):
    """torch's random numbers are its own; ours are one definition for all backends."""
    results = []
    for backend in ("auto", "reference"):
        torch.manual_seed(11)
        with use_backend(backend):
            results.append(run(call.ours, call, widen=backend == "reference"))
    compare(*results, call)


def is_the_residue_of_a_constant(call):
    """A row of one element: x - mean is 0, so the norm is the bias and only the bias has a gradient."""
    bias = call.args[3]
    output, grad_input, grad_weight, grad_bias = run(call.ours, call, widen=False)
    assert torch.equal(output, bias.expand_as(output))
    assert not grad_input.any() and not grad_weight.any()
    compare([output, grad_bias], [t for i, t in enumerate(run(call.torchs, call, widen=True)) if i in (0, 3)], call)


def is_scalar(call):
    return call.args[0].dim() == 0


def rows_without_a_key(call):
    (input, dim), mask = call.args, call.kwargs["mask"]
    return torch.tensor(False) if mask is None else ~mask.expand(input.shape).any(dim, keepdim=True)


def is_zero_where_nothing_is_left(call):
    actual, expected = run(call.ours, call, widen=False), run(call.torchs, call, widen=True)
    empty = rows_without_a_key(call).expand(expected[0].shape)
    assert expected[0][empty].isnan().all(), "torch gives NaN there"
    assert (actual[0][empty] == 0).all() and all((grad[empty] == 0).all() for grad in actual[1:])
    expected = [expected[0].masked_fill(empty, 0.0), *(grad.masked_fill(empty, 0.0) for grad in expected[1:])]
    compare(actual, expected, call)


class Departure(NamedTuple):
    """Where ours is not torch's: which samples, how many of them at most, why, and what holds instead."""

    name: str
    at_most: int
    reason: str
    applies: Callable[[Call], bool]
    instead: Callable[[Call], None]


A_NUMBER = "a number has no dimension to sum over; torch takes dim=0 for it"
NEGATIVE_EPS = "a negative eps is refused; torch takes the root of what may be negative"
DEPARTURES = (
    Departure("nn.functional.scaled_dot_product_attention", 12, "dropout draws other numbers (CONTRACT section 3)",
              lambda call: call.kwargs.get("dropout_p", 0.0) > 0, same_mask_on_every_backend),
    Departure("softmax", 2, A_NUMBER, is_scalar, is_refused("masked_softmax: input has shape (), expected")),
    Departure("softmax", 6, "there is no dtype argument: cast the input",
              lambda call: "dtype" in call.kwargs and not is_scalar(call), equals_torch),
    Departure("masked.softmax", 2, A_NUMBER, is_scalar, is_refused("masked_softmax: input has shape (), expected")),
    Departure("masked.softmax", 12, "a row with no valid key is 0 (CONTRACT section 1); torch gives NaN",
              lambda call: not is_scalar(call) and bool(rows_without_a_key(call).any()), is_zero_where_nothing_is_left),
    Departure("nn.functional.layer_norm", 1, NEGATIVE_EPS,
              lambda call: call.kwargs.get("eps", 0) < 0, is_refused("layer_norm: eps is -0.5, expected")),
    Departure("nn.functional.layer_norm", 1, "a row of one element has no gradient; torch leaves a residue of rounding",
              lambda call: tuple(call.args[1]) == (1,) and call.args[0].numel() > 0, is_the_residue_of_a_constant),
    Departure("nn.functional.rms_norm", 1, NEGATIVE_EPS,
              lambda call: call.kwargs.get("eps", 0) < 0, is_refused("rms_norm: eps is -0.5, expected")),
)  # fmt: skip


def samples(torchs, name, dtype, seed=None):
    """torch's samples of one function as Calls, each as it comes and with strides. Another seed draws other numbers."""
    infos = [info for info in torchs[0] if info.name == name]
    assert infos, f"torch's op_db has no {name}"
    for info in infos:
        generators = [info.sample_inputs] + [info.reference_inputs] * (info.reference_inputs_func is not None)
        for generate in generators:
            if seed is not None:
                torch.manual_seed(seed)
            for sample in generate("cpu", dtype, requires_grad=True, set_seed=seed is None):
                for form in (sample, sample.noncontiguous()):
                    yield Call(info.op, OPS[name].ours, (form.input, *form.args), form.kwargs)


def check_samples(name, calls):
    """Every call equals torch's or departs from it as the table says; returns how many there were."""
    departures = [departure for departure in DEPARTURES if departure.name == name]
    met, count = Counter(), 0
    for count, call in enumerate(calls, 1):
        departure = next((d for d in departures if d.applies(call)), None)
        met[departure] += 1
        (departure.instead if departure else equals_torch)(call)
    for departure in departures:
        # Twice: every sample comes as it is and with strides.
        assert 1 <= met[departure] <= 2 * departure.at_most, f"{met[departure]} samples of {name}: {departure.reason}"
    assert met[None] >= count // 4, f"only {met[None]} of {count} samples of {name} are compared with torch"
    return count


@in_every_dtype
@pytest.mark.parametrize("name", OPS)
def test_functions(name, dtype, torchs):
    assert check_samples(name, samples(torchs, name, dtype)) >= 2 * OPS[name].floor


@pytest.mark.parametrize("name", OPS)
def test_functions_of_the_reference(name, torchs):
    with use_backend("reference"):
        check_samples(name, samples(torchs, name, torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_functions_on_other_numbers(name, dtype, torchs):
    """Not float64: on ill-conditioned numbers torch's error there is as large as ours."""
    for seed in range(20):
        for call in samples(torchs, name, dtype, seed):
            departure = next((d for d in DEPARTURES if d.name == name and d.applies(call)), None)
            (departure.instead if departure else equals_torch)(call)


# What torch's functions refuse, ours refuse in words that name the op and the argument.
ERRORS = {"nn.functional.gelu": ("gelu: ", 1), "nn.functional.rms_norm": ("rms_norm: ", 3)}


@pytest.mark.parametrize("name", ERRORS)
def test_what_torch_refuses(name, torchs):
    prefix, floor = ERRORS[name]
    count = 0
    for info in (info for info in torchs[0] if info.name == name):
        for count, error in enumerate(info.error_inputs("cpu"), 1):
            sample = error.sample_input
            with pytest.raises((ValueError, TypeError)) as raised:
                OPS[name].ours(sample.input, *sample.args, **sample.kwargs)
            assert str(raised.value).startswith(prefix)
    assert count >= floor


# ---- modules ----

# ModuleInfo's name -> how many samples there are at least, in training and in eval each.
MODULES = {
    "nn.GELU": 3,
    "nn.LayerNorm": 7,
    "nn.RMSNorm": 6,
    "nn.MultiheadAttention": 64,
    "nn.TransformerEncoderLayer": 35,
    "nn.TransformerEncoder": 35,
}


def pairs(torchs, name, dtype, training):
    """torch's module, ours with its state_dict, args and kwargs. Parameters are drawn: an initial 0 or 1 hides much."""
    info = next((info for info in torchs[1] if info.name == name), None)
    assert info is not None, f"torch's module_db has no {name}"
    for entry in info.module_inputs_func(info, "cpu", dtype, True, training):
        if entry.forward_input is None:
            continue
        args, kwargs = entry.constructor_input.args, entry.constructor_input.kwargs
        modules = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.nn.TransformerEncoder says why its nested path will not be taken
            for cls in (info.module_cls, getattr(transfuse.nn, name.removeprefix("nn."))):
                modules.append(cls(*copy.deepcopy(args), **kwargs).to(dtype).train(training))
        stock, ours = modules
        with torch.no_grad():
            for i, parameter in enumerate(stock.parameters()):
                parameter.copy_(draw(*parameter.shape, dtype=dtype, seed=60 + i, shift=0.1, scale=0.2))
        ours.load_state_dict(stock.state_dict())
        yield stock, ours, entry.forward_input.args, entry.forward_input.kwargs


def make_smooth(module):
    """GELU for every ReLU: its gradient jumps where 16 bits round its input across 0, torch's as much as ours."""
    for layer in module.modules():
        if isinstance(layer, torch.nn.TransformerEncoderLayer) and layer.activation is torch.nn.functional.relu:
            layer.activation, layer.activation_relu_or_gelu = torch.nn.functional.gelu, 2


@in_every_dtype
@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, training, dtype, torchs):
    """In training and in eval with gradients, and without them, where torch takes inference paths of its own."""
    count = 0
    for count, (stock, ours, args, kwargs) in enumerate(pairs(torchs, name, dtype, training), 1):
        if name == "nn.MultiheadAttention":
            kwargs = {**kwargs, "need_weights": False}
        assert_module_matches(stock, ours, *args, gradients=False, **kwargs)
        if dtype in (torch.bfloat16, torch.float16):
            make_smooth(stock), make_smooth(ours)
        assert_module_matches(stock, ours, *args, one_scale=True, **kwargs)
    assert count >= MODULES[name], f"{count} samples of {name}, expected at least {MODULES[name]}"


@in_every_dtype
def test_attention_weights_are_torchs(dtype, torchs):
    """ModuleInfo's calls ask for the weights, as is torch's default. They take another formula: torch's own forward."""
    count = 0
    for count, (stock, ours, args, kwargs) in enumerate(pairs(torchs, "nn.MultiheadAttention", dtype, True), 1):
        for expected, actual in zip(stock(*args, **kwargs), ours(*args, **kwargs), strict=True):
            assert torch.equal(actual, expected)
    assert count >= MODULES["nn.MultiheadAttention"]
