"""rotary: the bound, every dtype and layout, gradients of every order, invariance, transforms, wording; the module."""

import copy
import pickle

import mpmath
import numpy
import pytest
import torch

import transfuse
from transfuse import _C, nn, testing
from transfuse.dispatch import use_backend
from transfuse.ops.rotary import rotary
from transfuse.reference.rotary import rotary_reference
from transfuse.testing import (
    MAX_ULP,
    MAX_ULP_FLOAT64,
    assert_close,
    assert_matches_reference,
    draw,
    nan_filled_empty,
    ulp_distance,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPE = (2, 3, 7, 40)  # [B, H, L, D]
HALF = 17  # pairs, so that a full vector and a ragged one are rotated, and 6 columns copied

in_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
in_both_forms = pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))


def _table_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _tables(dtype, *shape, seed=1, requires_grad=False):
    return tuple(draw(*shape, dtype=dtype, seed=seed + i, requires_grad=requires_grad) for i in range(2))


# ---- against the oracle ----


@in_every_dtype
@in_both_forms
@pytest.mark.parametrize(
    "tables", ("[L, R/2]", "[B, L, R/2]", "[1, L, R/2]", "all columns", "one pair", "input's dtype")
)
def test_matches_reference(tables, interleaved, dtype):
    lead = {"[B, L, R/2]": (SHAPE[0],), "[1, L, R/2]": (1,)}.get(tables, ())
    half = {"all columns": SHAPE[3] // 2, "one pair": 1}.get(tables, HALF)
    table_dtype = dtype if tables == "input's dtype" else _table_dtype(dtype)
    x = draw(*SHAPE, dtype=dtype, requires_grad=True)
    cos, sin = _tables(table_dtype, *lead, SHAPE[2], half, requires_grad=True)
    with nan_filled_empty():
        assert_matches_reference(rotary, x, cos, sin, interleaved=interleaved, num_terms=SHAPE[0] * SHAPE[1])


@in_both_forms
@pytest.mark.parametrize("shape", [(7, 40), (2, 7, 40), (2, 3, 4, 7, 40), (0, 3, 7, 40), (2, 0, 7, 40), (2, 3, 0, 40)])
def test_any_number_of_dimensions(shape, interleaved):
    x = draw(*shape, requires_grad=True)
    assert_matches_reference(
        rotary, x, *_tables(torch.float32, shape[-2], HALF, requires_grad=True), interleaved=interleaved
    )
    if len(shape) > 2:
        tables = _tables(torch.float32, shape[0], shape[-2], HALF, requires_grad=True)
        assert_matches_reference(rotary, x, *tables, interleaved=interleaved)


@in_every_dtype
@in_both_forms
def test_the_bound(interleaved, dtype):
    """Pairs whose products cancel, and sizes over 60 decades. The oracle is exact to one rounding of a double."""
    x = draw(4, 50, 64, dtype=torch.float64, seed=3) * torch.logspace(-30, 30, 50, dtype=torch.float64)[:, None]
    x = x.to(dtype) if dtype != torch.float16 else draw(4, 50, 64, dtype=dtype, seed=3)
    angles = torch.atan2(x[0].double()[:, :32], x[0].double()[:, 32:])
    cos, sin = angles.cos().to(_table_dtype(dtype)), angles.sin().to(_table_dtype(dtype))
    ours = rotary(x, cos, sin, interleaved=interleaved)
    if dtype != torch.float64:
        exact = rotary_reference(x.double(), cos, sin, interleaved=interleaved)
        distance = ulp_distance(ours, exact)
        assert float(distance[ours.abs() >= torch.finfo(dtype).tiny].max()) <= MAX_ULP["rotary_forward"]
        return
    values, c, s = (t.numpy().astype(numpy.longdouble) for t in (x, cos, sin))
    first, second = (values[..., 0::2], values[..., 1::2]) if interleaved else (values[..., :32], values[..., 32:])
    join = numpy.stack if interleaved else numpy.concatenate
    halves = (first * c - second * s, second * c + first * s)
    sizes = tuple(
        numpy.maximum(numpy.maximum(abs(a), abs(b)), abs(h))
        for a, b, h in ((first * c, second * s, halves[0]), (second * c, first * s, halves[1]))
    )
    exact, size = (join(pair, axis=-1).reshape(values.shape) for pair in (halves, sizes))
    unit = numpy.spacing(size.astype(numpy.float64))
    assert float((abs(ours.numpy() - exact) / unit).max()) <= MAX_ULP_FLOAT64["rotary_forward"]


@in_both_forms
def test_columns_that_are_not_rotated_keep_their_bits(interleaved):
    x = draw(2, 3, 5, 24)
    x[..., 10:] = torch.tensor([float("nan"), float("inf"), -0.0, 2.0**-149]).repeat(4)[:14]
    x.view(torch.int32)[0, 0, 0, 12] = 0x7FC12345  # a NaN with a payload
    y = rotary(x, *_tables(torch.float32, 5, 5), interleaved=interleaved)
    assert torch.equal(y[..., 10:].view(torch.int32), x[..., 10:].view(torch.int32))
    assert y[..., :10].isfinite().all()


@in_both_forms
def test_the_inverse_undoes_it(interleaved):
    x, angles = draw(2, 3, 7, 8, dtype=torch.float64), draw(7, 4, dtype=torch.float64, seed=1)
    rotated = rotary(x, angles.cos(), angles.sin(), interleaved=interleaved)
    assert_close(rotary(rotated, angles.cos(), -angles.sin(), interleaved=interleaved), x)
    assert not torch.allclose(rotated, x)


def test_it_is_what_llama_and_gptj_compute():
    x, angles = draw(2, 3, 7, 8, dtype=torch.float64), draw(7, 4, dtype=torch.float64, seed=1)
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
    turned = torch.cat((-x[..., 4:], x[..., :4]), -1)  # rotate_half of LLaMA
    assert_close(rotary(x, angles.cos(), angles.sin()), x * cos + turned * sin)
    cos, sin = (t.repeat_interleave(2, -1) for t in (angles.cos(), angles.sin()))
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)  # rotate_every_two of GPT-J
    assert_close(rotary(x, angles.cos(), angles.sin(), interleaved=True), x * cos + turned * sin)


def test_special_values_pass_through():
    x = torch.tensor([[float("nan"), 1.0, float("inf"), 1.0, 3e38, 3e38]])
    y = rotary(x, torch.tensor([[1.0, 1.0, 2.0]]), torch.tensor([[0.0, 1.0, 2.0]]), interleaved=True)
    assert y[0, :2].isnan().all() and y[0, 2] == torch.inf and y[0, 3] == torch.inf
    assert y[0, 4] == 0 and y[0, 5] == torch.inf  # 6e38 - 6e38 is no NaN


# ---- layouts and invariance ----


@in_every_dtype
@in_both_forms
def test_any_strides(interleaved, dtype):
    base = draw(3, 6, 4, 40, dtype=dtype)
    table = draw(3, 6, 40, dtype=_table_dtype(dtype), seed=1)
    views = {
        "heads of [B, L, H, D]": base.transpose(1, 2),
        "one of fused [B, L, 3, H, D]": draw(3, 6, 3, 4, 40, dtype=dtype, seed=2)[:, :, 1].transpose(1, 2),
        "sliced heads": draw(3, 9, 6, 40, dtype=dtype, seed=3)[:, 2:9:2],
        "expanded heads": draw(3, 1, 6, 40, dtype=dtype, seed=4).expand(3, 4, 6, 40),
        "columns apart": draw(3, 4, 40, 6, dtype=dtype, seed=5).mT,
        "odd start": draw(3, 4, 6, 43, dtype=dtype, seed=6)[..., 3:],
    }
    for name, x in views.items():
        for cos, sin in ((table[..., :16], table[..., 20:36]), (table[0, :, ::2], table[1, :, 1::2])):
            expected = rotary(x.contiguous(), cos.contiguous(), sin.contiguous(), interleaved=interleaved)
            ours = rotary(x, cos, sin, interleaved=interleaved)
            assert torch.equal(ours, expected), name
            together = x.stride(1) < x.stride(2)
            assert (ours.transpose(1, 2) if together else ours).is_contiguous(), name
            leaf, dense = x.detach().requires_grad_(), x.detach().contiguous().requires_grad_()
            incoming = draw(3, 40, 6, x.shape[1], dtype=dtype, seed=7).permute(0, 3, 2, 1)
            grads = [
                torch.autograd.grad(rotary(t, cos, sin, interleaved=interleaved), t, incoming)[0] for t in (leaf, dense)
            ]
            assert torch.equal(*grads), name


@in_every_dtype
@in_both_forms
def test_bits_do_not_depend_on_batch_position_or_threads(interleaved, dtype):
    x = draw(9, 4, 130, 64, dtype=dtype)
    cos, sin = _tables(_table_dtype(dtype), 130, 32, requires_grad=True)

    def run(x, cos, sin):
        leaf = x.detach().requires_grad_()
        y = rotary(leaf, cos, sin, interleaved=interleaved)
        return (y.detach(), *torch.autograd.grad(y, (leaf, cos, sin), x))

    torch.set_num_threads(1)
    whole = run(x, cos, sin)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(whole, run(x, cos, sin), strict=True))
    alone = run(x[4:5, 2:3, 17:19], cos[17:19], sin[17:19])
    assert all(torch.equal(a[4:5, 2:3, 17:19], b) for a, b in zip(whole[:2], alone[:2], strict=True))


@in_both_forms
def test_every_level_gives_the_same_bits(interleaved):
    before, results = _C.cpu_isa(), {}
    for level in _C.cpu_isa_levels():
        _C.set_cpu_isa(level)
        try:
            results[level] = [
                rotary(draw(*SHAPE, dtype=dtype), *_tables(torch.float32, SHAPE[2], HALF), interleaved=interleaved)
                for dtype in (torch.float32, torch.bfloat16, torch.float16)
            ]
        finally:
            _C.set_cpu_isa(before)
    first, *others = results.values()
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_inputs_are_not_written_and_backward_repeats():
    x, (cos, sin), dy = draw(*SHAPE), _tables(torch.float32, SHAPE[2], HALF), draw(*SHAPE, seed=9)
    copies = [t.clone() for t in (x, cos, sin, dy)]
    leaves = [t.requires_grad_() for t in (x, cos, sin)]
    with nan_filled_empty():
        output = rotary(*leaves)
        first = torch.autograd.grad(output, leaves, dy, retain_graph=True)
        second = torch.autograd.grad(output, leaves, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((x, cos, sin, dy), copies, strict=True))


# ---- autograd and transforms ----


@in_both_forms
@pytest.mark.parametrize("lead", ((), (2,)), ids=("shared", "per batch"))
def test_gradcheck(lead, interleaved):
    x = draw(2, 3, 4, 9, dtype=torch.float64).requires_grad_()
    tables = _tables(torch.float64, *lead, 4, 4, requires_grad=True)

    def call(*tensors):
        return rotary(*tensors, interleaved=interleaved)

    assert torch.autograd.gradcheck(call, (x, *tables))
    assert torch.autograd.gradgradcheck(lambda x: call(x, *(t.detach() for t in tables)), (x,))
    with use_backend("reference"):
        assert torch.autograd.gradgradcheck(call, (x, *tables))


@in_both_forms
def test_the_gradient_of_input_depends_on_the_tables(interleaved):
    """It is a rotation by the negative angle, with tables that have gradients of their own."""
    x, tables = (
        draw(2, 3, 4, 9, dtype=torch.float64, requires_grad=True),
        _tables(torch.float64, 4, 4, requires_grad=True),
    )

    def gradient(dy, cos, sin):
        return torch.autograd.grad(rotary(x, cos, sin, interleaved=interleaved), x, dy, create_graph=True)[0]

    assert torch.autograd.gradcheck(
        gradient, (draw(2, 3, 4, 9, dtype=torch.float64, seed=9, requires_grad=True), *tables)
    )


def test_gradient_only_where_wanted():
    x, (cos, sin) = draw(*SHAPE), _tables(torch.float32, SHAPE[2], HALF)
    assert not rotary(x, cos, sin).requires_grad
    assert torch.autograd.grad(rotary(x, cos.requires_grad_(), sin).sum(), cos)[0].shape == cos.shape
    with torch.no_grad():
        assert not rotary(x, cos, sin).requires_grad
    y = rotary(x.requires_grad_(), cos.detach(), sin)
    assert not any(
        t is not None and t.shape == x.shape for t in y.grad_fn.saved_tensors
    )  # nothing of input's size is kept


def test_orders_that_it_lacks_are_refused_in_words():
    x, (cos, sin) = draw(*SHAPE), _tables(torch.float32, SHAPE[2], HALF, requires_grad=True)
    (grad,) = torch.autograd.grad(rotary(x, cos, sin).square().sum(), cos, create_graph=True)
    with pytest.raises(RuntimeError, match="^rotary: the cpu backend has no second derivative"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="^rotary: the cpu backend has no forward-mode derivative"):
        torch.func.jvp(lambda t: rotary(t, cos.detach(), sin.detach()), (x,), (x,))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_torch_func():
    x, (cos, sin) = draw(3, 2, 5, 8), _tables(torch.float32, 5, 4)
    assert torch.equal(torch.func.vmap(lambda t: rotary(t, cos, sin))(x), rotary(x, cos, sin))

    def loss(x, cos, sin, op=rotary):
        return op(x, cos, sin).sin().sum()

    for argnums in (0, (0, 1, 2)):
        ours, exact = (
            torch.func.grad(lambda *t, f=f: loss(*t, f), argnums)(x, cos, sin) for f in (rotary, rotary_reference)
        )
        for a, e in zip(ours if argnums else (ours,), exact if argnums else (exact,), strict=True):
            assert_close(a, e, num_terms=8, slack=4)
    per_row = torch.func.vmap(torch.func.grad(loss), (0, None, None))(x, cos, sin)
    assert torch.equal(per_row, torch.func.grad(loss)(x, cos, sin))


def test_opcheck():
    x, (cos, sin) = draw(*SHAPE), _tables(torch.float32, SHAPE[2], HALF)
    for args in (
        (x, cos, sin, False, False),
        (x.transpose(1, 2), *_tables(torch.float32, 3, 4), True, True),
        (x.bfloat16(), cos[None], sin[None], True, False),
    ):
        torch.library.opcheck(torch.ops.transfuse.rotary_forward.default, args)
    torch.library.opcheck(torch.ops.transfuse.rotary_backward.default, (x, x, cos, True, False))


@pytest.mark.parametrize("dynamic", (False, True))
def test_compile_gives_the_same_bits(dynamic):
    def block(x, cos, sin):
        return rotary(rotary(x, cos, sin).sin(), cos, sin, interleaved=True)

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (5, 9):
        x = draw(2, length, 3, 16).transpose(1, 2).requires_grad_()
        leaves = (x, *_tables(torch.float32, length, 6, requires_grad=True))
        results = [f(*leaves) for f in (block, compiled)]
        assert torch.equal(*results) and results[0].stride() == results[1].stride()
        grads = [torch.autograd.grad(y.sum(), leaves) for y in results]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_follows_input_dtype_under_autocast():
    tables = _tables(torch.float32, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert rotary(draw(5, 8), *tables).dtype == torch.float32
        assert rotary(draw(5, 8, dtype=torch.bfloat16), *tables).dtype == torch.bfloat16


def test_explain():
    x, tables = draw(*SHAPE), _tables(torch.float32, SHAPE[2], HALF)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert transfuse.explain(rotary, x.to(dtype), *(t.to(dtype) for t in tables)).chosen == "cpu"
    with use_backend("reference"):
        assert transfuse.explain(rotary, x, *tables).chosen == "reference"
    assert "table_dtype=float32" in str(transfuse.explain(rotary, x, *tables))


# ---- the module ----


def test_angles_are_exact_at_long_positions():
    mpmath.mp.prec = 120
    positions = torch.tensor([0, 1, 4095, 131071, 1_000_003, 10_000_019])
    for dtype in (torch.float32, torch.float64):
        cos, sin = nn.RotaryEmbedding(16, base=500000.0).tables(positions, dtype)
        assert cos.dtype == sin.dtype == dtype
        for row, position in enumerate(positions.tolist()):
            for i in range(8):
                angle = position * mpmath.mpf(500000) ** (mpmath.mpf(-2 * i) / 16)
                for ours, exact in ((cos[row, i], mpmath.cos(angle)), (sin[row, i], mpmath.sin(angle))):
                    allowed = testing.UNIT_ROUNDOFF[dtype] + testing.ANGLE_ROUNDOFFS * 2.0**-53 * max(1, position)
                    assert abs(mpmath.mpf(float(ours)) - exact) <= allowed


def test_module_rotates_query_and_key():
    module = nn.RotaryEmbedding(8, interleaved=True)
    query, key = draw(2, 4, 6, 12), draw(2, 2, 6, 12, seed=1)
    cos, sin = module.tables(torch.arange(6))
    expected = tuple(rotary(t, cos, sin, interleaved=True) for t in (query, key))
    for found in (
        module(query, key),
        module(query, key, torch.arange(6)),
        module(query, key, torch.arange(6).expand(2, 6)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    one = module(query[:, :, 5:], key[:, :, 5:], torch.tensor([5]))  # the last token alone, as in decoding
    assert all(torch.equal(a, b[:, :, 5:]) for a, b in zip(one, expected, strict=True))
    assert torch.equal(query[..., 8:], expected[0][..., 8:]) and not torch.equal(
        query[:, :, 1:, :8], expected[0][:, :, 1:, :8]
    )
    halves = nn.RotaryEmbedding(8)(query, key)[0]
    assert not torch.allclose(halves, expected[0])


def test_scores_depend_on_the_distance_alone():
    module = nn.RotaryEmbedding(16)
    query, key = draw(1, 1, 1, 16, dtype=torch.float64), draw(1, 1, 1, 16, dtype=torch.float64, seed=1)
    scores = []
    for shift in (0, 1, 1000, 100_000):
        q, _ = module(query, key, torch.tensor([7 + shift]))
        _, k = module(query, key, torch.tensor([3 + shift]))
        scores.append((q * k).sum())
    assert float(torch.stack(scores).std()) < testing.ANGLE_ROUNDOFFS * 100_000 * 2.0**-53 * 16


def test_module_tables_grow_and_are_no_state():
    module = nn.RotaryEmbedding(8, base=100.0)
    short = module(draw(1, 1, 3, 8), draw(1, 1, 3, 8))
    module(draw(1, 1, 700, 8), draw(1, 1, 700, 8))
    again = module(draw(1, 1, 3, 8), draw(1, 1, 3, 8))
    assert torch.equal(short[0], again[0])
    assert not module.state_dict() and repr(module) == "RotaryEmbedding(8, base=100.0, interleaved=False)"
    query = draw(1, 1, 700, 8, dtype=torch.bfloat16)
    assert torch.equal(module.bfloat16()(query, query)[0], nn.RotaryEmbedding(8, base=100.0)(query, query)[0])
    wide = draw(1, 1, 5, 8, dtype=torch.float64)
    assert module(wide, wide)[0].dtype == torch.float64
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(query, query)[0], module(query, query)[0])


def test_module_compiles_and_trains_after_inference_mode():
    module, query = nn.RotaryEmbedding(8), draw(2, 3, 5, 8, requires_grad=True)
    with torch.inference_mode():
        module(query, query)
    eager = module(query, query)
    eager[0].sum().backward()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(query, query)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


# ---- refusals ----


X, C = draw(2, 3, 4, 8), draw(4, 4)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: rotary([1.0], C, C), TypeError, "rotary: input is a list, expected a Tensor"),
        (lambda: rotary(X.long(), C, C), TypeError, "rotary: input has dtype int64, expected a floating dtype"),
        (lambda: rotary(draw(3), C, C), ValueError, "rotary: input has shape (3,), expected (..., L, D)"),
        (lambda: rotary(X, C.bfloat16(), C), TypeError, "rotary: cos has dtype bfloat16, expected float32 (input's)"),
        (lambda: rotary(X.double(), C, C), TypeError, "rotary: cos has dtype float32, expected float64 (input's)"),
        (lambda: rotary(X.half(), C, C.half()), TypeError, "rotary: sin has dtype float16, expected float32 (cos's)"),
        (lambda: rotary(X, C.to("meta"), C), RuntimeError, "rotary: cos is on meta, expected cpu (input's)"),
        (
            lambda: rotary(X, draw(5, 4), C),
            ValueError,
            "rotary: cos has shape (5, 4), expected (4, R/2) or (2, 4, R/2)",
        ),
        (
            lambda: rotary(X, draw(3, 4, 4), C),
            ValueError,
            "rotary: cos has shape (3, 4, 4), expected (4, R/2) or (2, 4, R/2)",
        ),
        (lambda: rotary(X[0, 0], C[None], C), ValueError, "rotary: cos has shape (1, 4, 4), expected (4, R/2)"),
        (
            lambda: rotary(X, draw(4, 5), C),
            ValueError,
            "rotary: cos has 5 columns, expected at most 4 (half of input's head_dim)",
        ),
        (lambda: rotary(X, C, draw(4, 3)), ValueError, "rotary: sin has shape (4, 3), expected (4, 4) (cos's)"),
        (lambda: rotary(X, C, C, interleaved=1), TypeError, "rotary: interleaved is a int, expected bool"),
        (lambda: nn.RotaryEmbedding(7), ValueError, "RotaryEmbedding: dim is 7, expected an even number of at least 2"),
        (lambda: nn.RotaryEmbedding(8.0), TypeError, "RotaryEmbedding: dim is a float, expected int"),
        (
            lambda: nn.RotaryEmbedding(8, base=-1.0),
            ValueError,
            "RotaryEmbedding: base is -1.0, expected a positive number",
        ),
        (
            lambda: nn.RotaryEmbedding(8)(X, X, torch.ones(4)),
            TypeError,
            "RotaryEmbedding: positions has dtype float32, expected whole numbers",
        ),
    ],
)
def test_refuses_in_words(call, kind, text):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((X[0], C, C, False, False), "rotary: input has shape (3, 4, 8), expected 4 dimensions"),
        ((X, C.double(), C, False, False), "rotary: cos has dtype float64, expected float32 (input's)"),
        (
            (X, draw(4, 5), C, False, False),
            "rotary: cos has shape (4, 5), expected [L, R/2] or [B, L, R/2], R <= D, of input's (2, 3, 4, 8)",
        ),
        ((X, C, draw(4, 3), False, False), "rotary: sin has shape (4, 3), expected (4, 4) (cos's)"),
    ],
)
def test_raw_ops_check_again(args, text):
    with pytest.raises(ValueError) as error:
        torch.ops.transfuse.rotary_forward(*args)
    assert str(error.value) == text
