"""CONTRACT section 2, op by op: gelu over all floats, the others on the families that random numbers never show.

Each measure takes the function under test, so that torch's own is measured beside it in the same way. The oracle is the
float64 reference. Attention has a page of its own.
"""

from functools import partial

import torch
import torch.nn.functional as F

import transfuse
from transfuse import sweeps, testing
from transfuse.dispatch import dtype_name
from transfuse.promises.promise import DTYPES, Figure, NoKernel, Promise, remembered
from transfuse.reference.gelu import gelu_reference
from transfuse.reference.layer_norm import layer_norm_reference
from transfuse.reference.masked_softmax import masked_softmax_reference
from transfuse.reference.rms_norm import rms_norm_reference
from transfuse.reference.rotary import rotary_reference
from transfuse.testing import MAX_ULP, draw, error_budget, ulp_distance

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
TORCH = "torch, CPU kernel"


def _promise(op, dtype, what, statement, bound, unit, measure, peer=None, slow=False):
    return Promise(f"2.{op}.{dtype_name(dtype)}.{what}", 2, op, dtype, statement, bound, unit, measure, peer, slow)


def _beside(worst_of, ours, theirs):
    """Our worst (figure, where) with the peer's figure beside it. The peer runs outside of our dispatch."""
    (worst, where), (peer_worst, _) = worst_of(ours), worst_of(theirs)
    return Figure(worst, where, peer_worst)


# ---- gelu ----

FORMS = {"none": "erf", "tanh": "tanh"}
TAILS = {"none": -14.0, "tanh": -10.3}  # where the result is subnormal
SWEEP_STEP = 2039  # prime: every exponent, and every residue of the mantissa's low bits; 2.1 million floats
# Every float near these is taken: roots, the edges of approximations, the end of the negative tail.
ZONES = (*testing.GELU_ROOT.values(), 3.5, -3.5, -14.1, -14.3, -10.6, 5.6, -1.0, 16.0, -16.0, 1e-38, -1e-38)


def _float32_from(bits):
    x = bits.to(torch.int32).view(torch.float32)
    return x[~x.isnan()]


def swept_floats():
    """A strided sweep over all float32, and every float of the zones where something changes."""
    yield _float32_from(torch.arange(-(2**31), 2**31, SWEEP_STEP))
    for value in ZONES:
        bits = int(torch.tensor(value).view(torch.int32))
        yield _float32_from(torch.arange(bits - 4000, bits + 4000))
    for sign in (0, -(2**31)):
        yield _float32_from(torch.arange(sign, sign + 3000))


def all_16_bit(dtype):
    x = torch.arange(2**16).to(torch.int16).view(dtype)
    return x[x.isfinite()]


def _slope(function, x):
    leaf = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(function(leaf).sum(), leaf)
    return slope


def _result(function, x, direction):
    if direction == "backward":
        return _slope(function, x)
    with torch.no_grad():
        return function(x)


def _gelu_error(form, floats, direction, device, ours):
    """(largest error, where): in ULP, but for the gradient's zone around its root, which the next function measures."""
    worst, where = 0.0, ""
    for x in floats():
        exact = _result(partial(gelu_reference, approximate=form), x.double(), direction)
        distance = ulp_distance(_result(ours, x.to(device), direction).cpu(), exact)
        if direction == "backward":
            distance[(x.double() - testing.GELU_ROOT[form]).abs() <= testing.GELU_ROOT_ZONE] = 0
        at = int(distance.argmax())
        if not distance[at] <= worst:
            worst, where = float(distance[at]), f"at x = {x[at].item()!r}"
    return worst, where


def _exhaustive(sweep, backend, device):
    """Every float, by transfuse.sweeps, which runs the CPU kernels and counts what breaks any part of the contract."""
    if backend != "cpu":
        raise NoKernel("the sweeps are of the CPU kernels")
    found = sweep()
    where = f"at x = {found.worst_input!r}, {found.inputs} inputs, {found.errors} break the contract"
    return Figure(torch.inf if found.errors else found.worst_ulp, where)


def _gelu_root(form, device, ours):
    """Largest absolute error of the gradient around its root; a wrong sign counts as infinite."""
    bits = int(torch.tensor(testing.GELU_ROOT[form]).view(torch.int32))
    x = _float32_from(torch.arange(bits - 1700, bits + 1700))  # 1700 steps of 2^-24 are the zone of 1e-4
    exact, slope = (
        _slope(partial(gelu_reference, approximate=form), x.double()),
        _slope(ours, x.to(device)).cpu().double(),
    )
    error = torch.where(slope.sign() == exact.sign(), (slope - exact).abs(), torch.inf)
    at = int(error.argmax())
    return float(error[at]), f"at x = {x[at].item()!r}"


def _gelu_misrounded(form, dtype, direction, device, ours):
    x = all_16_bit(dtype)
    exact = _result(partial(gelu_reference, approximate=form), x.double(), direction)
    wrong = ulp_distance(_result(ours, x.to(device), direction).cpu(), exact) > 0.5
    return int(wrong.sum()), f"first at x = {x[wrong][0].item()!r}" if wrong.any() else f"of {len(x)} finite inputs"


def _gelu_special(form, device, ours):
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([inf, -inf, nan, 0.0, -0.0, 3.4e38, -3.4e38, TAILS[form]])
    output, slope = _result(ours, x.to(device), "forward").cpu(), _slope(ours, x.to(device)).cpu()
    expected = {
        "gelu(inf) = inf": output[0] == inf,
        "gelu(-inf) = -0": output[1] == 0 and output[1].signbit(),
        "NaN stays": output[2].isnan() and slope[2].isnan(),
        "zeros keep their sign": output[3:5].tolist() == [0, 0] and output[3:5].signbit().tolist() == [False, True],
        "3.4e38 is itself": output[5] == x[5],
        "-3.4e38 gives -0": output[6] == 0 and output[6].signbit(),
        "the tail is subnormal, not flushed": -torch.finfo(torch.float32).tiny < output[7] < 0,
        "gradients are finite": slope[[0, 1, 3, 4, 5, 6]].tolist() == [1, 0, 0.5, 0.5, 1, 0],
    }
    wrong = [words for words, holds in expected.items() if not holds]
    return len(wrong), ", ".join(wrong)


def _gelu(form):
    ours, theirs = partial(transfuse.gelu, approximate=form), partial(F.gelu, approximate=form)

    def promise(dtype, what, statement, bound, unit, worst_of):
        def measure(backend, device):
            return _beside(partial(worst_of, device), ours, theirs)

        return _promise("gelu", dtype, f"{what}.{form}", f"{FORMS[form]} {statement}", bound, unit, measure, TORCH)

    for direction in ("forward", "backward"):
        bound = MAX_ULP[f"gelu_{direction}"]
        away = ", but for 1e-4 around the gradient's root" if direction == "backward" else ""
        error = partial(_gelu_error, form, swept_floats, direction)
        yield promise(torch.float32, f"{direction}-ulp", f"{direction}, a sweep of float32{away}", bound, "ULP", error)
        sweep = partial(_exhaustive, partial(sweeps.sweep_gelu, form, direction))
        statement = f"{FORMS[form]} {direction}, all 2^32 float32{away}"
        yield _promise("gelu", torch.float32, f"{direction}-ulp-all.{form}", statement, bound, "ULP", sweep, slow=True)
        for dtype in SIXTEEN_BIT:
            count, statement = (
                partial(_gelu_misrounded, form, dtype, direction),
                f"{direction}, every finite 16-bit input",
            )
            yield promise(dtype, f"{direction}-misrounded", statement, 0, "inputs misrounded", count)
    statement = "backward within 1e-4 of its root: right sign and absolute error"
    root, special = partial(_gelu_root, form), partial(_gelu_special, form)
    yield promise(torch.float32, "backward-root", statement, testing.GELU_ROOT_ERROR, "absolute", root)
    statement = "at infinities, NaN, zeros and the last subnormal"
    yield promise(torch.float32, "special", statement, 0, "cases wrong", special)


# ---- masked_softmax ----

SOFTMAX_STDS = (1.0, 30.0, 100.0, 1e3, 1e4, 1e7)
SOFTMAX_SCALES = (1.0, 64**-0.5, 80**-0.5)


def _softmax_inputs(dtype):
    """(family in words, scores, mask, scale), the mask None, boolean or additive."""
    keep = torch.rand(100, 257, generator=torch.Generator().manual_seed(0)) < 0.7
    for std in SOFTMAX_STDS:
        for scale in SOFTMAX_SCALES:
            if dtype == torch.float16 and std * 4 > torch.finfo(dtype).max:
                continue
            x, bias = draw(100, 257, dtype=dtype, seed=1, scale=std), draw(100, 257, dtype=dtype, seed=2)
            for kind, mask in (("no", None), ("additive", bias), ("boolean", keep)):
                yield f"std {std:g}, scale {scale:.3g}, {kind} mask", x, mask, scale


def _torch_softmax(x, mask, *, scale):
    scores = x * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


@remembered
def _softmax_outputs(dtype, device, backend, function):
    """(output, exact, family in words) of every family: several promises look at them. The key names who computes."""
    found = []
    for words, x, mask, scale in _softmax_inputs(dtype):
        wide = mask.double() if mask is not None and mask.is_floating_point() else mask
        on_device = [None if t is None else t.to(device) for t in (x, mask)]
        exact = masked_softmax_reference(x.double(), wide, scale)
        found.append((function(*on_device, scale=scale).cpu(), exact, words))
    return found


def _softmax_worst(dtype, device, backend, error, function):
    """(largest error(output, exact), where) over the families."""
    return max(
        (error(output, exact), words) for output, exact, words in _softmax_outputs(dtype, device, backend, function)
    )


def _largest_ulp(output, exact):
    return float(ulp_distance(output, exact)[exact.isfinite()].max())


def _row_sum_error(output, exact):
    rows = (exact != 0).any(-1) & exact.isfinite().all(-1)
    return float((output.double().sum(-1)[rows] - 1).abs().max())


def _excluded_not_zero(output, exact):
    excluded = output[exact == 0]
    return int((excluded.ne(0) | excluded.signbit()).sum())


def _one_key_not_one(device, ours):
    rows = [(draw(50, 1, scale=1e4), None), (draw(20, 9, scale=30), torch.arange(9) == torch.arange(20)[:, None] % 9)]
    wrong = 0
    for scores, mask in rows:
        for scale in (1.0, 0.3, 1e-3, 7.7):
            weights = ours(scores.to(device), None if mask is None else mask.to(device), scale=scale)
            wrong += int((weights.amax(-1) != 1).sum())
    return wrong, "of 280 rows"


def _softmax():
    ours, theirs = transfuse.masked_softmax, _torch_softmax
    measures = [
        (
            torch.float32,
            "row-sum",
            "a row sums to 1, logit std 1 to 1e7",
            testing.SOFTMAX_ROW_SUM_ERROR,
            "absolute",
            _row_sum_error,
        ),
    ]
    for dtype in DTYPES:
        words, bound = "weights are rounded once", testing.ROUNDED_ONCE_ULP
        if dtype == torch.float32:
            words, bound = "weights, logit std 1 to 1e7", MAX_ULP["masked_softmax_forward"]
        if dtype != torch.float64:  # where the oracle is no exacter
            measures.append((dtype, "forward-ulp", words, bound, "ULP", _largest_ulp))
        measures.append((dtype, "excluded", "excluded weights are exactly +0", 0, "weights wrong", _excluded_not_zero))
    for dtype, what, statement, bound, unit, error in measures:

        def measure(backend, device, dtype=dtype, error=error):
            return _beside(partial(_softmax_worst, dtype, device, backend, error), ours, theirs)

        yield _promise("masked_softmax", dtype, what, statement, bound, unit, measure, TORCH)
    yield _promise(
        "masked_softmax",
        torch.float32,
        "one-key",
        "a row with one key is exactly 1",
        0,
        "rows wrong",
        lambda backend, device: _beside(partial(_one_key_not_one, device), ours, theirs),
        TORCH,
    )
    yield _promise(
        "masked_softmax",
        torch.float32,
        "exp-ulp-all",
        "every float32 score below its row's maximum",
        MAX_ULP["masked_softmax_forward"],
        "ULP",
        partial(_exhaustive, sweeps.sweep_masked_softmax),
        slow=True,
    )


# ---- norms ----

EPS = 0.3  # large, so that a wrong eps shows
LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 384, 768, 1000)
# name -> (standard deviation of a row, its mean, eps)
NORM_FAMILIES = {
    "plain": (1.0, 0.0, EPS),
    "mean/std 1e4": (1.0, 1e4, EPS),
    "mean/std 1e6": (1.0, 1e6, EPS),
    "tiny std": (1e-6, 1.0, 1e-5),
    "|x| 1e30": (1e30, 0.0, EPS),
    "|x| 1e37": (1e37, 0.0, EPS),
    "mean/std 1e6 at 1e36": (1e30, 1e36, EPS),
    "subnormals": (1e-40, 0.0, EPS),
}
CONSTANTS = (0.0, 1.0, -123456.0, 1e30, 3e38, 1e-40)


class Norm:
    """One norm: ours, torch's and the oracle, as (x, weight, bias, eps) -> output. An added residual is half of x."""

    def __init__(self, op):
        self.op, self.adds, self.has_bias = op, op.startswith("add_"), "layer" in op
        # What is added in front was tested by the op without it: fewer sizes do.
        self.lengths = (1, 33, 768) if self.adds else LENGTHS
        self.gradient_lengths = (65, 768) if self.adds else (31, 65, 129, 768, 1000)

    def ours(self, x, weight, bias, eps):
        function, shape = getattr(transfuse, self.op), x.shape[-1:]
        parameters = (weight, bias) if self.has_bias else (weight,)
        return function(x / 2, x / 2, shape, *parameters, eps)[0] if self.adds else function(x, shape, *parameters, eps)

    def torchs(self, x, weight, bias, eps):
        total = x / 2 + x / 2 if self.adds else x
        if self.has_bias:
            return F.layer_norm(total, x.shape[-1:], weight, bias, eps)
        return F.rms_norm(total, x.shape[-1:], weight, eps)

    def exact(self, x, weight, bias, eps):
        total = (x / 2 + x / 2 if self.adds else x).double()
        if self.has_bias:
            return layer_norm_reference(total, x.shape[-1:], weight.double(), bias.double(), eps)
        return rms_norm_reference(total, x.shape[-1:], weight.double(), eps)

    def inputs(self, dtype, name, columns):
        std, mean, eps = NORM_FAMILIES[name]
        x = draw(40, columns, dtype=dtype, seed=columns, scale=std, shift=mean)
        weight = draw(columns, dtype=dtype, seed=11, scale=0.5, shift=1.5)
        return x, weight, draw(columns, dtype=dtype, seed=12, shift=-0.25), eps


def _norm_families(dtype):
    """The families that the dtype can hold."""
    largest = torch.finfo(dtype).max
    return [
        name
        for name, (std, mean, _) in NORM_FAMILIES.items()
        if 5 * std + mean < largest and (std > 1e-7 or largest > 1e5)
    ]


def _norm_ulp(norm, dtype, device, function):
    """In units of the last place of max(|weight * xhat|, |bias|, 1), the contract's measure."""
    found = []
    for name in _norm_families(dtype):
        for columns in norm.lengths:
            *tensors, eps = norm.inputs(dtype, name, columns)
            exact = norm.exact(*tensors, eps)
            bias = tensors[2].double() if norm.has_bias else torch.zeros(columns, dtype=torch.float64)
            floor = torch.maximum((exact - bias).abs(), bias.abs()).clamp(min=1.0)
            output = function(*(t.to(device) for t in tensors), eps).cpu()
            found.append((float(ulp_distance(output, exact, floor).max()), f"{name}, {columns} columns"))
    return max(found)


def _norm_gradients(norm, dtype, device, function):
    """Largest error of any gradient, of what testing.error_budget allows it."""
    found = []
    for name in _norm_families(dtype):
        if name == "subnormals":
            continue  # xhat is itself subnormal: the last bit of grad_weight is an absolute one
        for columns in norm.gradient_lengths:
            *tensors, eps = norm.inputs(dtype, name, columns)
            used = tensors if norm.has_bias else tensors[:2]
            # An incoming gradient of the size of x keeps the gradients of huge rows in range.
            size = min(float(tensors[0].abs().max()), 1e20) if name.startswith("|x|") or "1e36" in name else 1.0
            grad_output = draw(40, columns, dtype=dtype, seed=3, scale=size, shift=size / 2)
            results = []
            for call, wide, place in ((function, dtype, device), (norm.exact, torch.float64, "cpu")):
                leaves = [t.to(place, wide).requires_grad_() for t in tensors]
                results.append(
                    torch.autograd.grad(call(*leaves, eps), leaves[: len(used)], grad_output.to(place, wide))
                )
            for what, actual, exact in zip(("input", "weight", "bias"), *results):
                allowed = error_budget(dtype, columns) * float(exact.abs().max())
                error = float((actual.cpu().double() - exact).abs().max())
                share = 0.0 if error == 0 else error / allowed if allowed and error == error else torch.inf
                found.append((share, f"grad_{what}, {name}, {columns} columns"))
    return max(found)


def _norm_constant_rows(norm, dtype, device, function):
    wrong, where = 0, ""
    for value in CONSTANTS:
        for columns in (1, 3, 31, 768, 1000):
            if abs(value) > torch.finfo(dtype).max:
                continue
            _, weight, bias, _ = norm.inputs(dtype, "plain", columns)
            x = torch.full((5, columns), value, dtype=dtype)
            output = function(*(t.to(device) for t in (x, weight, bias)), 1e-5).cpu()
            if not torch.equal(output, bias.expand(5, columns)):
                wrong, where = wrong + 1, f"first at {value:g}, {columns} columns" if not wrong else where
    return wrong, where


def _norms(op):
    norm = Norm(op)
    for dtype in (torch.float32, *SIXTEEN_BIT):
        bound, words = (
            (MAX_ULP[f"{op.removeprefix('add_')}_forward"], "")
            if dtype == torch.float32
            else (testing.ROUNDED_ONCE_ULP, ", rounded once")
        )
        statement = f"forward on {len(_norm_families(dtype))} hard families{words}"
        rows = [
            ("forward-ulp", statement, bound, "ULP of max(|weight*xhat|, |bias|, 1)", _norm_ulp),
            ("gradients", "gradients on the same families", 1.0, "of testing.error_budget", _norm_gradients),
        ]
        if norm.has_bias:
            rows.append(("constant", "a constant row gives exactly bias", 0, "rows wrong", _norm_constant_rows))
        for what, statement, bound, unit, worst_of in rows:

            def measure(backend, device, worst_of=worst_of, dtype=dtype):
                return _beside(partial(worst_of, norm, dtype, device), norm.ours, norm.torchs)

            yield _promise(op, dtype, what, statement, bound, unit, measure, TORCH)


# ---- rotary ----


def _torch_rotary(x, cos, sin, *, interleaved):
    """What models write out, in input's dtype."""
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
        return torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _rotary_ulp(dtype, device, function):
    """Angles under which the products cancel, and sizes from the smallest up."""
    x = draw(4, 50, 64, dtype=torch.float64, seed=3)
    if dtype != torch.float16:
        x = x * torch.logspace(-30, 30, 50, dtype=torch.float64)[:, None]
    x = x.to(dtype)
    found = []
    for interleaved in (False, True):
        angles = torch.atan2(x[0].double()[:, :32], x[0].double()[:, 32:])
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        exact = rotary_reference(x.double(), cos.double(), sin.double(), interleaved=interleaved)
        distance = ulp_distance(function(*(t.to(device) for t in (x, cos, sin)), interleaved=interleaved).cpu(), exact)
        found.append((float(distance.max()), "interleaved" if interleaved else "halves"))
    return max(found)


def _rotary():
    for dtype in (torch.float32, *SIXTEEN_BIT):

        def measure(backend, device, dtype=dtype):
            return _beside(partial(_rotary_ulp, dtype, device), transfuse.rotary, _torch_rotary)

        yield _promise(
            "rotary",
            dtype,
            "forward-ulp",
            "both forms, products that cancel, sizes 1e-30 to 1e30",
            MAX_ULP["rotary_forward"],
            "ULP",
            measure,
            "torch, op by op",
        )


NORMS = ("layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm")

PROMISES = (
    *_gelu("none"),
    *_gelu("tanh"),
    *_softmax(),
    *(promise for op in NORMS for promise in _norms(op)),
    *_rotary(),
)
