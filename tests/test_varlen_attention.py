"""varlen_attention against the oracle and, bit for bit, against attention on each sequence; pack and unpack."""

import pytest
import test_attention as suite
import torch

from transfuse import Packing, explain, pack, scaled_dot_product_attention, unpack, use_backend, varlen_attention
from transfuse.dispatch import TransfuseWarning
from transfuse.ops import varlen_attention as page
from transfuse.testing import assert_close, assert_matches_reference, draw, nan_filled_empty

in_every_dtype = suite.in_every_dtype
LENGTHS = (5, 0, 33, 1, 64, 17, 0)
LENGTHS_K = (9, 4, 33, 0, 70, 1, 3)
HEADS, HEAD_DIM, VALUE_DIM = 4, 24, 40


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors: waking a second thread costs more than the work. Tests about threads set their own count."""
    torch.set_num_threads(1)


def offsets(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def packed_inputs(dtype=torch.float32, lengths=LENGTHS, lengths_k=None, kv_heads=HEADS):
    tokens, tokens_k = sum(lengths), sum(lengths_k or lengths)
    return (
        draw(tokens, HEADS, HEAD_DIM, dtype=dtype, seed=0, requires_grad=True),
        draw(tokens_k, kv_heads, HEAD_DIM, dtype=dtype, seed=1, requires_grad=True),
        draw(tokens_k, kv_heads, VALUE_DIM, dtype=dtype, seed=2, requires_grad=True),
    )


OPTIONS = {
    "full": {}, "causal": {"is_causal": True}, "causal top_left": {"is_causal": True, "causal_alignment": "top_left"}, "scale": {"scale": 0.3},
}


@in_every_dtype
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths_k", (None, LENGTHS_K), ids=("self", "cross"))
@pytest.mark.parametrize("kv_heads", (HEADS, 2))
def test_matches_reference(kv_heads, lengths_k, options, dtype):
    cu_k = None if lengths_k is None else offsets(lengths_k, torch.int64)
    with nan_filled_empty():
        assert_matches_reference(
            varlen_attention, *packed_inputs(dtype, LENGTHS, lengths_k, kv_heads), offsets(LENGTHS), cu_k, return_lse=True,
            **OPTIONS[options],
        )


@in_every_dtype
@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
def test_every_sequence_is_bitwise_what_attention_gives_it_alone(is_causal, dtype):
    query, key, value = packed_inputs(dtype, LENGTHS, LENGTHS_K, kv_heads=2)
    cu_q, cu_k = offsets(LENGTHS), offsets(LENGTHS_K)
    output, lse = varlen_attention(query, key, value, cu_q, cu_k, is_causal=is_causal, return_lse=True)
    grad = draw(*output.shape, dtype=dtype, seed=7)
    grads = torch.autograd.grad(output, (query, key, value), grad)
    for start, stop, start_k, stop_k in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        rows, rows_k = slice(start, stop), slice(start_k, stop_k)
        alone = [t[r].detach().transpose(0, 1).requires_grad_() for t, r in ((query, rows), (key, rows_k), (value, rows_k))]
        out, out_lse = scaled_dot_product_attention(
            *alone, is_causal=is_causal, causal_alignment="bottom_right", enable_gqa=True, return_lse=True
        )
        assert torch.equal(out.transpose(0, 1), output[rows]) and torch.equal(out_lse, lse[:, rows])
        expected = torch.autograd.grad(out, alone, grad[rows].transpose(0, 1))
        for e, actual, r in zip(expected, grads, (rows, rows_k, rows_k)):
            assert torch.equal(e.transpose(0, 1), actual[r])


@in_every_dtype
def test_packed_is_bitwise_padded(dtype):
    """A padded batch with key lengths and the same batch packed: equal at every kept place."""
    mask = torch.arange(40) < torch.tensor([40, 7, 0, 23]).view(-1, 1)
    qkv = draw(4, 40, 3, HEADS, HEAD_DIM, dtype=dtype)
    packed, packing = pack(qkv, mask)
    output = varlen_attention(*packed.unbind(1), packing.cu_seqlens, max_seqlen_q=packing.max_seqlen)
    padded = scaled_dot_product_attention(*(t.transpose(1, 2) for t in qkv.unbind(2)), seqlens_k=mask.sum(1))
    assert torch.equal(unpack(output, packing), padded.transpose(1, 2) * mask[:, :, None, None])


@in_every_dtype
def test_threads_order_and_repeats_change_no_bit(dtype):
    query, key, value = packed_inputs(dtype)
    cu_seqlens = offsets(LENGTHS)

    def run(tensors, cu):
        output, lse = varlen_attention(*tensors, cu, is_causal=True, return_lse=True)
        return [output, lse.mT, *torch.autograd.grad(output.square().sum(), tensors)]

    expected = run((query, key, value), cu_seqlens)
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, e) for a, e in zip(run((query, key, value), cu_seqlens), expected))
    order = [4, 2, 0, 6, 5, 3, 1]
    rows = torch.cat([torch.arange(int(cu_seqlens[i]), int(cu_seqlens[i + 1])) for i in order])
    shuffled = [t.detach()[rows].requires_grad_() for t in (query, key, value)]
    for actual, e in zip(run(shuffled, offsets([LENGTHS[i] for i in order])), expected):
        assert torch.equal(actual, e[rows])


def test_slices_of_a_packed_projection_are_taken_as_they_are():
    qkv = draw(sum(LENGTHS), 3, HEADS, HEAD_DIM)
    views = qkv.unbind(1)
    assert not views[0].is_contiguous()
    cu_seqlens = offsets(LENGTHS)
    assert torch.equal(varlen_attention(*views, cu_seqlens), varlen_attention(*(t.contiguous() for t in views), cu_seqlens))


def test_offsets_of_either_type_any_stride_and_loose_bounds():
    query, key, value = (t.detach() for t in packed_inputs())
    expected = varlen_attention(query, key, value, offsets(LENGTHS))
    spread = torch.stack((offsets(LENGTHS), offsets(LENGTHS)), dim=1)[:, 0]
    for cu_seqlens in (offsets(LENGTHS, torch.int64), spread):
        assert torch.equal(varlen_attention(query, key, value, cu_seqlens, max_seqlen_q=500, max_seqlen_k=70), expected)


LONGEST, LONGEST_K = max(LENGTHS), max(LENGTHS_K)


def leaf(*shape, dtype=torch.float32, seed=5):
    return draw(*shape, dtype=dtype, seed=seed, requires_grad=True)


COUNT = len(LENGTHS)
FEATURES = {
    "window": lambda dtype: {"window": (6, 2)},
    "window, top_left": lambda dtype: {"window": (None, 3), "causal_alignment": "top_left"},
    "softcap": lambda dtype: {"softcap": 1.5, "is_causal": True},
    "slopes": lambda dtype: {"alibi_slopes": leaf(HEADS)},
    "slopes of every sequence": lambda dtype: {"alibi_slopes": leaf(COUNT, HEADS), "is_causal": True},
    "sinks": lambda dtype: {"sinks": leaf(HEADS), "is_causal": True},
    "bias": lambda dtype: {"attn_bias": leaf(COUNT, HEADS, LONGEST, LONGEST_K, dtype=dtype)},
    "bias of every sequence": lambda dtype: {"attn_bias": leaf(COUNT, 1, LONGEST, LONGEST_K)},
    "bias of every head": lambda dtype: {"attn_bias": leaf(1, HEADS, LONGEST, LONGEST_K, dtype=dtype), "is_causal": True},
    "one bias": lambda dtype: {"attn_bias": leaf(1, 1, LONGEST, LONGEST_K)},
    "bias with -inf": lambda dtype: {
        "attn_bias": torch.where(suite.keep_mask(1, HEADS, LONGEST, LONGEST_K), draw(1, HEADS, LONGEST, LONGEST_K), -torch.inf)
    },
    "all": lambda dtype: {
        "window": (20, 3), "softcap": 3.0, "alibi_slopes": leaf(COUNT, HEADS), "sinks": leaf(HEADS, seed=6),
        "attn_bias": leaf(1, HEADS, LONGEST, LONGEST_K, dtype=dtype, seed=7),
    },
}


@in_every_dtype
@pytest.mark.parametrize("name", FEATURES)
def test_features_match_reference(name, dtype):
    with nan_filled_empty():
        assert_matches_reference(
            varlen_attention, *packed_inputs(dtype, LENGTHS, LENGTHS_K, kv_heads=2), offsets(LENGTHS), offsets(LENGTHS_K),
            return_lse=True, **FEATURES[name](dtype),
        )


def test_gradcheck_of_every_argument():
    lengths, lengths_k = (2, 0, 3), (4, 1, 3)
    shapes = ((5, 2, 2), (8, 1, 2), (8, 1, 3), (3, 1, 3, 4), (3, 2), (2,))
    tensors = [leaf(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate(shapes)]

    def run(query, key, value, attn_bias, alibi_slopes, sinks):
        return varlen_attention(
            query, key, value, offsets(lengths), offsets(lengths_k), attn_bias=attn_bias, alibi_slopes=alibi_slopes, sinks=sinks,
            window=(2, 1), softcap=1.5, return_lse=True,
        )

    with use_backend("cpu"):
        assert torch.autograd.gradcheck(run, tensors)


@in_every_dtype
def test_options_act_per_sequence(dtype):
    """Bias, window, softcap, slopes and sinks: each sequence gets, bit for bit, what attention gives it alone."""
    query, key, value = packed_inputs(dtype, LENGTHS, LENGTHS_K)
    cu_q, cu_k = offsets(LENGTHS), offsets(LENGTHS_K)
    attn_bias, slopes = leaf(COUNT, HEADS, LONGEST, LONGEST_K), leaf(COUNT, HEADS, seed=6)
    options = {"window": (30, 1), "softcap": 3.0, "sinks": draw(HEADS, seed=7), "causal_alignment": "bottom_right", "return_lse": True}
    output, lse = varlen_attention(query, key, value, cu_q, cu_k, attn_bias=attn_bias, alibi_slopes=slopes, **options)
    grad = draw(*output.shape, dtype=dtype, seed=8)
    grads = torch.autograd.grad(output, (query, key, value, attn_bias, slopes), grad)
    for n, (length, length_k) in enumerate(zip(LENGTHS, LENGTHS_K)):
        rows, rows_k = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        alone = [t[r].detach().transpose(0, 1).requires_grad_() for t, r in ((query, rows), (key, rows_k), (value, rows_k))]
        alone += [attn_bias[n, :, :length, :length_k].detach().requires_grad_(), slopes[n].detach().requires_grad_()]
        out, out_lse = scaled_dot_product_attention(*alone[:3], attn_bias=alone[3], alibi_slopes=alone[4], **options)
        assert torch.equal(out.transpose(0, 1), output[rows]) and torch.equal(out_lse, lse[:, rows])
        expected = torch.autograd.grad(out, alone, grad[rows].transpose(0, 1))
        for e, actual, r in zip(expected, grads, (rows, rows_k, rows_k)):
            assert torch.equal(e.transpose(0, 1), actual[r])
        assert torch.equal(expected[3], grads[3][n, :, :length, :length_k]) and torch.equal(expected[4], grads[4][n])
    beyond = torch.arange(LONGEST_K) >= torch.tensor(LENGTHS_K).view(-1, 1, 1, 1)
    assert not grads[3][beyond.expand_as(attn_bias)].any()


@in_every_dtype
@pytest.mark.parametrize("name", ("one bias", "bias of every head", "all"))
def test_shared_gradients_do_not_depend_on_threads(name, dtype):
    options = FEATURES[name](dtype)
    leaves = [*packed_inputs(dtype, LENGTHS, LENGTHS_K), *(t for t in options.values() if isinstance(t, torch.Tensor))]
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        output = varlen_attention(*leaves[:3], offsets(LENGTHS), offsets(LENGTHS_K), **options)
        results.append(torch.autograd.grad(output, leaves, torch.ones_like(output)))
    assert all(torch.equal(a, e) for result in results for a, e in zip(result, results[0]))


OPTIONS_OF_THE_KERNEL = {
    "attn_bias": torch.zeros(1, 1, 64, 64), "dropout_p": 0.1, "window": (1, 1), "softcap": 3.0, "alibi_slopes": torch.ones(HEADS),
    "sinks": torch.ones(HEADS),
}


@pytest.mark.parametrize("option", OPTIONS_OF_THE_KERNEL)
def test_every_option_takes_the_kernel(option):
    tensors, cu_seqlens, options = packed_inputs(), offsets(LENGTHS), {option: OPTIONS_OF_THE_KERNEL[option]}
    explanation = explain(varlen_attention, *tensors, cu_seqlens, **options)
    assert explanation.chosen == "cpu" and explanation.problem.features == (option,)
    with use_backend("cpu"):
        varlen_attention(*tensors, cu_seqlens, **options)


def test_what_the_kernel_lacks_falls_back_in_sight(monkeypatch):
    from transfuse import dispatch

    monkeypatch.setattr(dispatch, "_warned", set())
    wide, cu_seqlens = draw(5, 1, 513), offsets((2, 3))
    with pytest.warns(TransfuseWarning, match="head_dim is 513, the kernel takes up to 512"):
        varlen_attention(wide, wide, wide, cu_seqlens)
    assert explain(varlen_attention, wide, wide, wide, cu_seqlens).chosen == "reference"


T = torch.zeros(5, 4, 8)
CU = torch.tensor([0, 2, 5])
REFUSALS = (
    (TypeError, "varlen_attention: key is a NoneType, expected a Tensor", (T, None, T, CU), {}),
    (ValueError, "varlen_attention: query has shape (1, 5, 4, 8), expected (tokens, heads, head_dim)", (T[None], T, T, CU), {}),
    (ValueError, "varlen_attention: key has head_dim 7, expected 8 (query's)", (T, T[..., :7], T, CU), {}),
    (ValueError, "varlen_attention: value has 4 tokens, expected 5 (key's)", (T, T, T[:4], CU), {}),
    (ValueError, "varlen_attention: value has 2 heads, expected 4 (key's)", (T, T, T[:, :2], CU), {}),
    (ValueError, "varlen_attention: key has 3 heads, expected a divisor of 4 (query's)", (T, T[:, :3], T[:, :3], CU), {}),
    (TypeError, "varlen_attention: value has dtype bfloat16, expected float32 (query's)", (T, T, T.bfloat16(), CU), {}),
    (TypeError, "varlen_attention: cu_seqlens_q is a list, expected a Tensor", (T, T, T, [0, 5]), {}),
    (TypeError, "varlen_attention: cu_seqlens_q has dtype float32, expected int32 or int64", (T, T, T, CU.float()), {}),
    (ValueError, "varlen_attention: cu_seqlens_q has shape (0,), expected (num_sequences + 1,)", (T, T, T, CU[:0]), {}),
    (ValueError, "varlen_attention: cu_seqlens_q has shape (1, 3), expected (num_sequences + 1,)", (T, T, T, CU[None]), {}),
    (ValueError, "varlen_attention: cu_seqlens_k has 2 entries, expected 3 (cu_seqlens_q's)", (T, T, T, CU, CU[[0, 2]]), {}),
    (ValueError, "varlen_attention: cu_seqlens_k[2] is 4, expected 5 (key's tokens)", (T, T, T, CU, torch.tensor([0, 2, 4])), {}),
    (ValueError, "varlen_attention: cu_seqlens_q[2] is 5, a sequence of length 3, expected at most 2 (max_seqlen_q)",
     (T, T, T, CU), {"max_seqlen_q": 2}),
    (TypeError, "varlen_attention: max_seqlen_q is a float, expected int or None", (T, T, T, CU), {"max_seqlen_q": 2.0}),
    (ValueError, "varlen_attention: max_seqlen_k is -1, expected at least 0", (T, T, T, CU), {"max_seqlen_k": -1}),
    (ValueError, "varlen_attention: attn_bias has shape (3, 1, 3, 3), expected one that broadcasts to (2, 4, 3, 3)", (T, T, T, CU),
     {"attn_bias": torch.zeros(3, 1, 3, 3)}),
    (ValueError, "varlen_attention: alibi_slopes has shape (3, 4), expected (4,) or (2, 4)", (T, T, T, CU), {"alibi_slopes": torch.ones(3, 4)}),
)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("error, message, args, kwargs", REFUSALS, ids=[row[1] for row in REFUSALS])
def test_refusals_say_what_was_expected(error, message, args, kwargs, backend):
    with use_backend(backend), pytest.raises(error) as raised:
        varlen_attention(*args, **kwargs)
    assert str(raised.value) == message


def replaced(index, value):
    return lambda arguments: (*arguments[:index], value(arguments[index]), *arguments[index + 1 :])


MUTANTS = {  # of the raw forward's arguments
    "value * 1.001": replaced(2, lambda value: value * 1.001),
    "scale * 1.01": replaced(11, lambda scale: scale * 1.01),
    "causal ignored": replaced(12, lambda is_causal: False),
    "alignment ignored": replaced(13, lambda bottom_right: not bottom_right),
    "sequences merged": lambda a: (*a[:3], a[3][[0, -1]], a[4][[0, -1]], *a[5:9], 1000, 1000, *a[11:]),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_assert_matches_reference_kills(mutant, monkeypatch):
    original = page._forward
    monkeypatch.setattr(page, "_forward", lambda *arguments: original(*MUTANTS[mutant](arguments)))
    with pytest.raises(AssertionError):
        assert_matches_reference(
            varlen_attention, *packed_inputs(lengths_k=LENGTHS_K), offsets(LENGTHS), offsets(LENGTHS_K), is_causal=True, return_lse=True
        )


# ---- pack and unpack ----

MASKS = {
    "right padding": [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]],
    "left padding": [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]],
    "holes": [[1, 0, 1, 0, 1], [0, 1, 1, 0, 1]],
    "an all-padding row": [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
    "nothing kept": [[0, 0], [0, 0]],
    "everything kept": [[1, 1], [1, 1]],
    "one token": [[1]],
}


@pytest.mark.parametrize("dtype", (torch.bool, torch.int64, torch.int32, torch.uint8), ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_pack_keeps_exactly_the_kept(name, dtype):
    mask = torch.tensor(MASKS[name]).to(dtype)
    batch, length = mask.shape
    values = draw(batch, length, 3, 2, requires_grad=True)
    packed, packing = pack(values, mask)
    lengths = [sum(row) for row in MASKS[name]]
    assert packing.cu_seqlens.dtype == torch.int32 and packing.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(batch + 1)]
    assert packing.max_seqlen == max(lengths) and type(packing.max_seqlen) is int
    assert packing.shape == (batch, length)
    assert packing.indices.tolist() == [i for i, keep in enumerate(sum(MASKS[name], [])) if keep]
    assert torch.equal(packed, values[mask.bool()])
    padded = unpack(packed, packing)
    assert torch.equal(padded, torch.where(mask.bool()[:, :, None, None], values, 0.0))
    (grad,) = torch.autograd.grad(padded.sum(), values)
    assert torch.equal(grad, mask.bool()[:, :, None, None].expand_as(values).float())


def test_packed_attention_equals_padded_attention_for_every_mask():
    for rows in MASKS.values():
        mask = torch.tensor(rows).bool()
        qkv = draw(*mask.shape, 3, 2, 8)
        packed, packing = pack(qkv, mask)
        output = unpack(varlen_attention(*packed.unbind(1), packing.cu_seqlens, max_seqlen_q=packing.max_seqlen), packing)
        with use_backend("reference"):
            padded = scaled_dot_product_attention(*(t.double().transpose(1, 2) for t in qkv.unbind(2)), mask[:, None, None])
        assert_close(output, padded.transpose(1, 2) * mask[:, :, None, None], mask.shape[1])


def test_pack_takes_any_dtype_shape_and_a_packing():
    mask = torch.tensor(MASKS["holes"]).bool()
    _, packing = pack(mask, mask)
    ids = torch.arange(10).view(2, 5)
    packed, same = pack(ids, packing)
    assert same is packing and torch.equal(packed, ids[mask])
    packed, packing = pack(draw(2, 3, 5), mask[:, None].expand(2, 3, 5))
    assert packing.shape == (2, 3, 5) and packing.cu_seqlens.shape == (7,) and unpack(packed, packing).shape == (2, 3, 5)
    packed, packing = pack(draw(5, 4), mask[0])
    assert packed.shape == (3, 4) and packing.cu_seqlens.tolist() == [0, 3]
    packed, packing = pack(torch.zeros(0, 5, 4), mask[:0])
    assert packed.shape == (0, 4) and packing.cu_seqlens.tolist() == [0] and packing.max_seqlen == 0
    assert unpack(packed, packing).shape == (0, 5, 4)


def test_pack_never_reads_padding():
    mask = torch.tensor(MASKS["left padding"]).bool()
    values = torch.where(mask[..., None], draw(2, 5, 4), torch.nan).requires_grad_()
    padded = unpack(*pack(values, mask))
    assert bool(padded.isfinite().all())
    (grad,) = torch.autograd.grad(padded.square().sum(), values)
    assert bool(grad.isfinite().all())


def test_pack_gradcheck():
    mask = torch.tensor(MASKS["holes"]).bool()
    values = draw(2, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pack(x, mask)[0], values) and torch.autograd.gradgradcheck(lambda x: pack(x, mask)[0], values)
    packed, packing = pack(values.detach(), mask)
    assert torch.autograd.gradcheck(lambda x: unpack(x, packing), packed.requires_grad_())


def test_unpack_compiles():
    packed, packing = pack(draw(2, 5, 2), torch.tensor(MASKS["holes"]))
    torch.compiler.reset()
    compiled = torch.compile(lambda x, y: (pack(y, packing)[0] + x, unpack(x, packing)), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(packed, draw(2, 5, 2))[1], unpack(packed, packing))


X = torch.zeros(2, 5, 4)
GOOD = Packing(torch.arange(3), torch.tensor([0, 1, 3], dtype=torch.int32), 2, (2, 5))
PACK_REFUSALS = (
    (TypeError, "pack: input is a list, expected a Tensor", lambda: pack([1], X[..., 0].bool())),
    (TypeError, "pack: attention_mask is a NoneType, expected a Tensor or a Packing", lambda: pack(X, None)),
    (TypeError, "pack: attention_mask has dtype float32, expected bool or integer (nonzero = keep)", lambda: pack(X, X[..., 0])),
    (ValueError, "pack: attention_mask has shape (), expected (B, L)", lambda: pack(X, torch.tensor(True))),
    (ValueError, "pack: input has shape (2, 5, 4), expected (2, 4) + any (attention_mask's)", lambda: pack(X, torch.ones(2, 4).bool())),
    (RuntimeError, "pack: input is on meta, expected cpu (attention_mask's)", lambda: pack(X.to("meta"), torch.ones(2, 5).bool())),
    (TypeError, "unpack: packed is a list, expected a Tensor", lambda: unpack([1], GOOD)),
    (TypeError, "unpack: packing is a Tensor, expected a Packing (as pack returns)", lambda: unpack(X, X)),
    (ValueError, "unpack: packed has shape (2, 5, 4), expected (3, ...) (packing's tokens)", lambda: unpack(X, GOOD)),
    (RuntimeError, "unpack: packed is on meta, expected cpu (packing's)", lambda: unpack(torch.zeros(3, 4, device="meta"), GOOD)),
)


@pytest.mark.parametrize("error, message, call", PACK_REFUSALS, ids=[row[1] for row in PACK_REFUSALS])
def test_pack_refusals(error, message, call):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message


def test_a_packing_is_equal_to_itself_alone():
    """Comparing tensors gives no bool: == and hash go by identity, so a Packing can be a key."""
    first, second = (pack(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool))[1] for _ in range(2))
    assert first == first and first != second and len({first, second}) == 2
