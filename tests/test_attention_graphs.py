"""Attention inside torch's machinery: raw op contract, compile, export, autocast, checkpointing, torch.func, double backward."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from transfuse import dispatch, extension, scaled_dot_product_attention, use_backend, varlen_attention
from transfuse.testing import assert_close, draw

BACKENDS = ("cpu", "reference")
needs_kernels = pytest.mark.skipif(bool(extension.cpu_unavailable), reason=extension.cpu_unavailable)
CU_SEQLENS = torch.tensor([0, 3, 3, 9], dtype=torch.int32)


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors: waking a second thread costs more than the work. Tests about threads set their own count."""
    torch.set_num_threads(1)


def dense_inputs(requires_grad=True, dtype=torch.float32):
    return [draw(2, 4, length, 16, dtype=dtype, seed=i, requires_grad=requires_grad) for i, length in enumerate((5, 9, 9))]


def packed_inputs(requires_grad=True, dtype=torch.float32):
    return [draw(9, 2, 16, dtype=dtype, seed=i, requires_grad=requires_grad) for i in range(3)]


def dense(query, key, value, attn_bias):
    """Every kind of exclusion at once, and both results."""
    return scaled_dot_product_attention(
        query, key, value, torch.arange(9) != 4, is_causal=True, attn_bias=attn_bias, seqlens_k=torch.tensor([9, 7]),
        causal_alignment="bottom_right", return_lse=True,
    )


def packed(query, key, value):
    return varlen_attention(query, key, value, CU_SEQLENS, max_seqlen_q=6, is_causal=True, return_lse=True)


def dense_features(query, key, value, alibi_slopes, sinks):
    return scaled_dot_product_attention(
        query, key, value, alibi_slopes=alibi_slopes, sinks=sinks, window=(3, 1), softcap=2.0, return_lse=True
    )


def packed_features(query, key, value, alibi_slopes, sinks, attn_bias):
    return varlen_attention(
        query, key, value, CU_SEQLENS, max_seqlen_q=6, alibi_slopes=alibi_slopes, sinks=sinks, window=(3, 1), softcap=2.0,
        attn_bias=attn_bias, return_lse=True,
    )


CALLS = {
    "attention, features": (
        dense_features, lambda **kw: [*dense_inputs(**kw), *(draw(4, seed=9 + i, requires_grad=True) for i in range(2))]
    ),
    "varlen_attention, features": (
        packed_features,
        lambda **kw: [*packed_inputs(**kw), *(draw(*shape, seed=9, requires_grad=True) for shape in ((3, 2), (2,), (1, 2, 6, 6)))],
    ),
    "attention": (dense, lambda **kw: [*dense_inputs(**kw), draw(4, 1, 9, seed=9, requires_grad=True)]),
    "varlen_attention": (packed, packed_inputs),
}
on_every_call = pytest.mark.parametrize("call", CALLS)
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


def results(function, leaves):
    """Outputs and the gradients of all leaves."""
    outputs = function(*leaves)
    grads = [draw(*output.shape, seed=40 + i).to(output.dtype) for i, output in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]


NONE = (None, None, None)
PLAIN, OPTIONS = (-1, -1, 0.0, 0.0), (3, 1, 2.0, 0.25)  # window, softcap, dropout_p


def extras(batch, heads):
    """alibi_slopes, sinks, dropout_seed."""
    return draw(batch, heads).abs(), draw(heads, seed=1), torch.tensor([5, 6])


@needs_kernels
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16))
def test_opcheck_of_the_raw_ops(dtype):
    query, key, value = dense_inputs(requires_grad=False, dtype=dtype)
    masks = draw(4, 1, 9).expand(2, 4, 5, 9), (torch.arange(9) != 4).expand(2, 4, 5, 9), torch.tensor([9, 7])
    for tensors, options in (((*NONE, *NONE), PLAIN), ((*masks, *extras(2, 4)), OPTIONS)):
        forward = (query, key, value, *tensors, 0.25, True, False, *options)
        torch.library.opcheck(torch.ops.transfuse.attention_forward.default, forward)
        output, lse = torch.ops.transfuse.attention_forward(*forward)
        full = tensors[0] is not None
        backward = (output, lse if full else None, query, key, value, output, lse, *forward[3:],
                    [1, 4, 1, 9] if full else [1, 1, 1, 1], full, full, full)
        torch.library.opcheck(torch.ops.transfuse.attention_backward.default, backward)


@needs_kernels
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16))
def test_opcheck_of_the_raw_varlen_ops(dtype):
    query, key, value = packed_inputs(requires_grad=False, dtype=dtype)
    bias = draw(1, 2, 6, 6).expand(3, 2, 6, 6)
    for tensors, options in (((None, *NONE), PLAIN), ((bias, *extras(3, 2)), OPTIONS)):
        forward = (query, key, value, CU_SEQLENS, CU_SEQLENS, *tensors, 6, 6, 0.25, True, True, *options)
        torch.library.opcheck(torch.ops.transfuse.varlen_attention_forward.default, forward)
        output, lse = torch.ops.transfuse.varlen_attention_forward(*forward)
        full = tensors[0] is not None
        backward = (output, lse if full else None, query, key, value, output, lse, *forward[3:], [1, 2, 6, 6], full, full, full)
        torch.library.opcheck(torch.ops.transfuse.varlen_attention_backward.default, backward)


@pytest.mark.parametrize(
    "call, backend",
    (("attention", "cpu"), ("varlen_attention", "cpu"), ("attention, features", "cpu"), ("varlen_attention, features", "cpu"),
     ("attention", "reference"),
     pytest.param("varlen_attention", "reference", marks=pytest.mark.slow)),
)
def test_compile_fullgraph(call, backend):
    function, make = CALLS[call]
    leaves = make()
    with use_backend(backend):
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for actual, expected in zip(results(compiled, leaves), results(function, leaves)):
            assert_close(actual, expected.double(), 16)
        with torch.no_grad():
            assert all(torch.equal(a, e) for a, e in zip(compiled(*leaves), function(*leaves)))


@needs_kernels
@pytest.mark.slow
@on_every_call
def test_compile_with_inductor(call):
    function, make = CALLS[call]
    leaves = make()
    torch.compiler.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = results(torch.compile(function, fullgraph=True), leaves)
    for actual, expected in zip(compiled, results(function, leaves)):
        assert_close(actual, expected.double(), 16)


@needs_kernels
def test_compile_with_changing_lengths():
    torch.compiler.reset()
    compiled = torch.compile(lambda q: scaled_dot_product_attention(q, q, q, is_causal=True), fullgraph=True, dynamic=True,
                             backend="aot_eager")
    for length in (4, 7, 33):
        query = draw(2, 3, length, 16, requires_grad=True)
        output = compiled(query)
        assert torch.equal(output, scaled_dot_product_attention(query, query, query, is_causal=True))
        output.sum().backward()


@needs_kernels
def test_compile_with_changing_options():
    """A window and a softcap become symbols when they change."""
    torch.compiler.reset()

    def function(query, left, softcap):
        return scaled_dot_product_attention(query, query, query, window=(left, 2), softcap=softcap, is_causal=True)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for length, left, softcap in ((4, 1, 2.0), (7, 3, 3.0), (33, 8, 2.5)):
        query = draw(2, 3, length, 16, requires_grad=True)
        output = compiled(query, left, softcap)
        assert torch.equal(output, function(query, left, softcap))
        output.sum().backward()


def test_compile_warns_of_a_fallback_and_is_right():
    torch.compiler.reset()
    query = draw(1, 1, 2, 513)
    dispatch._warned.clear()
    with pytest.warns(dispatch.TransfuseWarning):
        compiled = torch.compile(lambda q: scaled_dot_product_attention(q, q, q), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(query), scaled_dot_product_attention(query, query, query))


@on_every_backend
@on_every_call
def test_export(call, backend):
    function, make = CALLS[call]

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return function(*tensors)

    leaves = tuple(t.detach() for t in make())
    with use_backend(backend):
        exported = torch.export.export(Module(), leaves)
        for actual, expected in zip(exported.module()(*leaves), function(*leaves)):
            assert_close(actual, expected.double(), 16)


@on_every_backend
@on_every_call
def test_autocast_casts_as_torch_does(call, backend):
    function, make = CALLS[call]
    leaves = make()
    with use_backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        actual = function(*leaves)
    with use_backend(backend):
        lowered = [t.bfloat16() if i < 3 else t for i, t in enumerate(leaves)]
        expected = function(*lowered)
    assert actual[0].dtype == torch.bfloat16 and actual[1].dtype == torch.float32
    assert all(torch.equal(a, e) for a, e in zip(actual, expected))
    grads = torch.autograd.grad(actual, leaves, [torch.ones_like(t) for t in actual])
    assert all(grad.dtype == leaf.dtype for grad, leaf in zip(grads, leaves))


def test_autocast_takes_mixed_dtypes():
    query, key, value = dense_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert scaled_dot_product_attention(query, key.bfloat16(), value).dtype == torch.bfloat16


@on_every_backend
@on_every_call
@pytest.mark.parametrize("use_reentrant", (False, True))
def test_checkpoint(use_reentrant, call, backend):
    function, make = CALLS[call]
    leaves = make()
    with use_backend(backend):
        again = results(lambda *t: checkpoint(function, *t, use_reentrant=use_reentrant), leaves) if not use_reentrant else None
        if use_reentrant:  # takes .backward() only
            outputs = checkpoint(function, *leaves, use_reentrant=True)
            grads = [draw(*o.shape, seed=40 + i).to(o.dtype) for i, o in enumerate(outputs)]
            torch.autograd.backward(outputs, grads)
            again = [*outputs, *(leaf.grad for leaf in leaves)]
        for actual, expected in zip(again, results(function, leaves)):
            assert torch.equal(actual, expected)


@on_every_call
def test_func_grad(call):
    function, make = CALLS[call]
    leaves = make()
    expected = torch.autograd.grad(function(*leaves)[0].square().sum(), leaves)
    leaves = tuple(t.detach() for t in leaves)
    grads = torch.func.grad(lambda *t: function(*t)[0].square().sum(), argnums=tuple(range(len(leaves))))(*leaves)
    assert all(torch.equal(a, e) for a, e in zip(grads, expected))


@needs_kernels
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_a_gradient():
    query, bias = draw(3, 2, 4, 5, 8), draw(4, 5, 5, seed=1)

    def slopes(q, b):
        return torch.func.grad(lambda q, b: scaled_dot_product_attention(q, q, q, attn_bias=b).square().sum(), (0, 1))(q, b)

    mapped = torch.func.vmap(slopes, (0, None))(query, bias)
    for index in range(3):
        assert all(torch.equal(m[index], e) for m, e in zip(mapped, slopes(query[index], bias)))


@needs_kernels
def test_forward_mode_is_refused_in_words():
    query = draw(2, 4, 5, 8)
    with pytest.raises(RuntimeError, match="attention: the cpu backend has no forward-mode derivative; run under"):
        torch.func.jvp(lambda q: scaled_dot_product_attention(q, q, q), (query,), (query,))
    tokens, offsets = draw(7, 4, 8), torch.tensor([0, 3, 7])
    with pytest.raises(RuntimeError, match="varlen_attention: the cpu backend has no forward-mode derivative; run under"):
        torch.func.jvp(lambda q: varlen_attention(q, q, q, offsets, max_seqlen_q=4), (tokens,), (tokens,))


@needs_kernels
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("options", ({}, {"window": (1, 1), "softcap": 2.0, "alibi_slopes": draw(4), "sinks": draw(4)}), ids=("", "features"))
def test_vmap_without_gradients_is_right(options):
    query = draw(3, 2, 4, 5, 8)
    mapped = torch.func.vmap(lambda q: scaled_dot_product_attention(q, q, q, **options))(query)
    assert torch.equal(mapped, scaled_dot_product_attention(query, query, query, **options))


@needs_kernels
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_the_gradient_of_sinks_and_slopes():
    query, sinks, slopes = draw(3, 2, 4, 5, 8), draw(3, 4, seed=1), draw(4, seed=2)

    def gradients(q, sinks, slopes):
        def loss(q, sinks, slopes):
            return scaled_dot_product_attention(q, q, q, sinks=sinks, alibi_slopes=slopes, softcap=2.0, window=(2, 2)).square().sum()

        return torch.func.grad(loss, (0, 1, 2))(q, sinks, slopes)

    mapped = torch.func.vmap(gradients, (0, 0, None))(query, sinks, slopes)
    for index in range(3):
        assert all(torch.equal(m[index], e) for m, e in zip(mapped, gradients(query[index], sinks[index], slopes)))


@needs_kernels
def test_vmap_of_dropout_is_refused_by_torch_in_words():
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda q: scaled_dot_product_attention(q, q, q, dropout_p=0.5))(draw(3, 2, 4, 5, 8))


@needs_kernels
@on_every_call
def test_double_backward_is_refused_in_words(call):
    function, make = CALLS[call]
    leaves = make()
    output = function(*leaves)[0]
    grads = torch.autograd.grad(output.sum(), leaves[:3], create_graph=True)
    plain = torch.autograd.grad(function(*leaves)[0].sum(), leaves[:3])
    assert all(torch.equal(a, e) for a, e in zip(grads, plain))
    with pytest.raises(RuntimeError, match=f"{call.split(',')[0]}: the cpu backend has no second derivative; run under transfuse.use_backend"):
        grads[0].sum().backward()


@on_every_call
def test_double_backward_on_the_reference(call):
    function, make = CALLS[call]
    leaves = make()
    with use_backend("reference"):
        grads = torch.autograd.grad(function(*leaves)[0].square().sum(), leaves[:3], create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves[:3])
    assert all(bool(grad.isfinite().all()) and float(grad.abs().max()) > 0 for grad in second)


@needs_kernels
def test_meta_and_fake_tensors_have_the_real_layout():
    leaves = dense_inputs(requires_grad=False)
    real = scaled_dot_product_attention(*leaves, return_lse=True)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = scaled_dot_product_attention(*(mode.from_tensor(t) for t in leaves), return_lse=True)
    for f, r in zip(fake, real):
        assert f.shape == r.shape and f.stride() == r.stride() and f.dtype == r.dtype
    with use_backend("reference"):
        assert scaled_dot_product_attention(*(t.to("meta") for t in leaves)).shape == real[0].shape
