"""decode_attention: against the float64 oracle and torch, paged against contiguous, appending, invariance, refusals."""

import itertools

import numpy
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as torch_attention

import transfuse
from transfuse import _C, testing
from transfuse.dispatch import use_backend
from transfuse.ops.decode_attention import decode_attention
from transfuse.testing import assert_close, assert_matches_reference, draw, nan_filled_empty

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
in_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

# Odd sizes; lengths below, at and above one chunk of 256 keys, and an entry whose queries outnumber its keys.
BATCH, HEADS, KV_HEADS, LEN_Q, CAPACITY, HEAD_DIM, VALUE_DIM = 5, 6, 2, 3, 600, 24, 40
LENGTHS = (597, 256, 0, 1, 300)


def inputs(
    dtype=torch.float32,
    len_q=LEN_Q,
    heads=HEADS,
    kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    value_dim=VALUE_DIM,
    batch=BATCH,
    capacity=CAPACITY,
    scale=1.0,
    seed=0,
):
    """query, key_cache, value_cache."""
    return (
        draw(batch, heads, len_q, head_dim, dtype=dtype, seed=4 * seed, scale=scale),
        draw(batch, kv_heads, capacity, head_dim, dtype=dtype, seed=4 * seed + 1, scale=scale),
        draw(batch, kv_heads, capacity, value_dim, dtype=dtype, seed=4 * seed + 2),
    )


def lengths(*values, dtype=torch.int64):
    return torch.tensor(values or LENGTHS, dtype=dtype)


def paged(cache, block_size, seed=0, spare=3):
    """The same cache as pages in random order, with pages of NaN between, and the block table."""
    batch, heads, capacity, dim = cache.shape
    per_entry = -(-capacity // block_size)
    order = torch.randperm(batch * per_entry + spare, generator=torch.Generator().manual_seed(seed))[
        : batch * per_entry
    ]
    table = order.view(batch, per_entry).int()
    pages = cache.new_full((batch * per_entry + spare, block_size, heads, dim), float("nan"))
    padded = cache.new_full((batch, heads, per_entry * block_size, dim), float("nan"))
    padded[:, :, :capacity] = cache
    pages[table.long()] = padded.view(batch, heads, per_entry, block_size, dim).permute(0, 2, 3, 1, 4)
    return pages, table


def bias_with_holes(dtype=torch.float32, *shape):
    shape = shape or (BATCH, HEADS, LEN_Q, CAPACITY)
    bias = draw(*shape, dtype=dtype, seed=8)
    return torch.where(draw(*shape, seed=9) > 0.5, -torch.inf, bias)


OPTIONS = {
    "bias": lambda dtype: {"attn_bias": bias_with_holes(dtype)},
    "scale": lambda dtype: {"scale": -0.37},
    "window": lambda dtype: {"window": (70, 0)},
    "softcap": lambda dtype: {"softcap": 2.5},
    "alibi": lambda dtype: {"alibi_slopes": draw(BATCH, HEADS, seed=11).abs()},
    "sinks": lambda dtype: {"sinks": draw(HEADS, dtype=dtype, seed=12)},
}
MORE_OPTIONS = {
    "none": lambda dtype: {},
    "window of one key": lambda dtype: {"window": (0, None)},
    "unbounded window": lambda dtype: {"window": (None, 5)},
    "window beyond all keys": lambda dtype: {"window": (2**62, 0)},
    "alibi [Hq]": lambda dtype: {"alibi_slopes": draw(HEADS, dtype=dtype, seed=11).abs()},
    "bias [Lmax]": lambda dtype: {"attn_bias": bias_with_holes(torch.float32, CAPACITY)},
    "bias [1, Hq, 1, Lmax]": lambda dtype: {"attn_bias": bias_with_holes(dtype, 1, HEADS, 1, CAPACITY)},
    "bias [B, 1, Lq, 1]": lambda dtype: {"attn_bias": draw(BATCH, 1, LEN_Q, 1, dtype=dtype, seed=8)},
    "a bias that leaves nothing": lambda dtype: {
        "attn_bias": torch.full((CAPACITY,), -torch.inf),
        "sinks": draw(HEADS, seed=12),
    },
    "finfo.min": lambda dtype: {"attn_bias": torch.full((CAPACITY,), torch.finfo(dtype).min, dtype=dtype)},
}


# ---- against the oracle ----


@in_every_dtype
@pytest.mark.parametrize("name", (*MORE_OPTIONS, *("+".join(pair) for pair in itertools.combinations(OPTIONS, 2))))
def test_options_match_reference(name, dtype):
    options = {}
    for part in name.split("+"):
        options.update({**OPTIONS, **MORE_OPTIONS}[part](dtype))
    with nan_filled_empty():
        assert_matches_reference(
            decode_attention, *inputs(dtype), lengths(), return_lse=True, backward=False, **options
        )


@in_every_dtype
@pytest.mark.parametrize("heads", ((1, 1), (4, 4), (8, 1), (12, 3)), ids=str)
@pytest.mark.parametrize("len_q", (1, 2, 30))
def test_groups_and_several_queries(len_q, heads, dtype):
    """30 queries of 8 heads are several tiles of rows."""
    tensors = inputs(dtype, len_q=len_q, heads=heads[0], kv_heads=heads[1])
    assert_matches_reference(decode_attention, *tensors, lengths(dtype=torch.int32), return_lse=True, backward=False)


@pytest.mark.parametrize("length", (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513))
def test_every_tail(length):
    for dim in (1, 16, 33, 80):
        tensors = inputs(head_dim=dim, value_dim=dim, batch=2, capacity=length)
        assert_matches_reference(
            decode_attention, *tensors, lengths(length, length // 2), return_lse=True, backward=False
        )


@in_every_dtype
@pytest.mark.parametrize("dims", ((512, 64), (64, 512), (1, 1), (80, 100)), ids=str)
def test_head_dims(dims, dtype):
    tensors = inputs(dtype, head_dim=dims[0], value_dim=dims[1], capacity=40)
    assert_matches_reference(decode_attention, *tensors, lengths(40, 39, 3, 2, 0), return_lse=True, backward=False)


def test_a_wider_head_takes_the_reference_visibly():
    tensors = inputs(head_dim=513, capacity=4, batch=1)
    with pytest.warns(transfuse.TransfuseWarning, match="head_dim is 513, the kernel takes up to 512"):
        assert decode_attention(*tensors, lengths(4)).shape == (1, HEADS, LEN_Q, VALUE_DIM)


@pytest.mark.parametrize("shape", ({"batch": 0}, {"heads": 0, "kv_heads": 0}, {"len_q": 0}, {"capacity": 0}), ids=str)
def test_empty_dimensions(shape):
    query, key, value = inputs(**shape)
    seqlens = torch.zeros(query.shape[0], dtype=torch.int64)
    for options in ({}, {"sinks": draw(query.shape[1])} if query.shape[1] else {}):
        output, lse = decode_attention(query, key, value, seqlens, return_lse=True, **options)
        assert output.shape == (*query.shape[:3], VALUE_DIM) and lse.shape == query.shape[:3]
        assert not output.any()
        expected = options["sinks"][:, None].expand_as(lse) if options else torch.full_like(lse, -torch.inf)
        assert torch.equal(lse, expected)


@in_every_dtype
@pytest.mark.parametrize("scale", (1.0, 3.5, 11.0, 35.0), ids=("plain", "logits 1e2", "logits 1e3", "logits 1e4"))
def test_error_against_torch(scale, dtype):
    """CONTRACT 2: pooled error, against torch's sdpa on the same keys, or against the rounding of the exact result.

    In saturated float64 rows all of the error is that of a few pairs of leading keys: eight seeds would compare luck.
    """
    squares, worst = {"ours": 0.0, "peer": 0.0, "rounded": 0.0}, {"ours": 0.0, "peer": 0.0, "rounded": 0.0}
    for seed in range(32 if dtype == torch.float64 else 8):
        query, key, value = inputs(
            dtype, heads=4, head_dim=64, value_dim=64, batch=2, capacity=515, scale=scale, seed=seed
        )
        keep = torch.ones(LEN_Q, 515, dtype=torch.bool).tril(515 - LEN_Q)
        repeated = (t.repeat_interleave(2, dim=1) for t in (key, value))
        peer = torch_attention(query, *repeated, attn_mask=keep)
        exact = _in_80_bits(query, key, value, keep)
        results = {"ours": decode_attention(query, key, value, lengths(515, 515)), "peer": peer}
        for name, result in (*results.items(), ("rounded", torch.from_numpy(exact.astype(numpy.float64)).to(dtype))):
            error = result.double().numpy() - exact
            squares[name] += float((error**2).sum())
            worst[name] = max(worst[name], float((error**2).sum(-1).max()))
    allowed = max(
        testing.ATTENTION_RMS_RATIO**2 * squares["peer"], testing.ATTENTION_ROUNDING_RATIO**2 * squares["rounded"]
    )
    assert squares["ours"] <= allowed
    assert worst["ours"] <= testing.ATTENTION_ROW_RATIO**2 * max(worst["peer"], worst["rounded"])


def _in_80_bits(query, key, value, keep):
    q, k, v = (t.double().numpy().astype(numpy.longdouble) for t in (query, key, value))
    k, v = (numpy.repeat(t, q.shape[1] // t.shape[1], axis=1) for t in (k, v))
    scores = numpy.einsum("bhqd,bhkd->bhqk", q, k) / numpy.sqrt(numpy.longdouble(q.shape[-1]))
    scores = numpy.where(keep.numpy(), scores, -numpy.inf)
    weights = numpy.exp(scores - scores.max(-1, keepdims=True))
    return numpy.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdims=True), v)


# ---- exclusion, NaN and infinity ----


@in_every_dtype
@pytest.mark.parametrize("poison", (float("nan"), float("inf")))
def test_what_is_excluded_never_matters(poison, dtype):
    query, key, value = inputs(dtype)
    options = {"window": (300, 0), "attn_bias": bias_with_holes(dtype, BATCH, 1, 1, CAPACITY)}
    expected = decode_attention(query, key, value, lengths(), return_lse=True, **options)
    position = torch.arange(CAPACITY)
    seqlens = lengths()[:, None]
    beyond = position >= seqlens
    before = position < seqlens - LEN_Q - 300
    excluded = beyond | before | (options["attn_bias"][:, 0, 0] == -torch.inf)
    for tensor in (key, value):
        tensor.masked_fill_(excluded[:, None, :, None], poison)
    found = decode_attention(query, key, value, lengths(), return_lse=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert found[0].isfinite().all()


def test_later_keys_do_not_matter_to_earlier_queries():
    query, key, value = inputs(batch=1)
    expected = decode_attention(query, key, value, lengths(500))
    key[:, :, 498:] = float("nan")
    value[:, :, 498:] = float("nan")  # 498 is seen by the last two queries alone
    found = decode_attention(query, key, value, lengths(500))
    assert torch.equal(found[:, :, 0], expected[:, :, 0]) and found[:, :, 1:].isnan().all()


@pytest.mark.parametrize("length", (5, 400))
def test_nan_and_infinity_in_valid_keys_show(length):
    query, key, value = inputs(batch=4, kv_heads=1, heads=2, len_q=1)
    query = query.abs()
    key[0, :, 3], key[1, :, 3], value[2, :, 3] = float("nan"), float("inf"), float("nan")
    key[3] = -torch.inf
    args = (query, key, value, lengths(*[length] * 4))
    output, lse = decode_attention(*args, return_lse=True)
    assert output[:3].isnan().all() and lse[:2].isnan().all() and lse[2].isfinite().all()
    with use_backend("reference"):
        expected = decode_attention(*args, return_lse=True)
    assert torch.equal(output.isnan(), expected[0].isnan()) and not output[3].any()
    assert torch.equal(lse[3], expected[1][3]) and (lse[3] == -torch.inf).all()


def test_sinks_without_keys_and_infinite_sinks():
    query, key, value = inputs(batch=2)
    sinks = torch.tensor([1.5, -torch.inf, 300.0, -300.0, float("nan"), torch.inf])
    args = (query, key, value, lengths(0, 300))
    output, lse = decode_attention(*args, sinks=sinks, return_lse=True)
    with use_backend("reference"):
        expected = decode_attention(*args, sinks=sinks, return_lse=True)
    assert torch.equal(output.isnan(), expected[0].isnan()) and torch.equal(lse.isnan(), expected[1].isnan())
    assert not output[0, :4].any() and torch.equal(lse[0, :4], sinks[:4, None].expand(4, LEN_Q))
    assert_close(output[1, :4], expected[0][1, :4], num_terms=300)


# ---- pages ----


@in_every_dtype
@pytest.mark.parametrize("block_size", (1, 16, 100, 256, 1000))
def test_pages_give_the_bits_of_a_contiguous_cache(block_size, dtype):
    query, key, value = inputs(dtype)
    options = {"window": (280, 0), "alibi_slopes": draw(HEADS).abs(), "softcap": 9.0, "sinks": draw(HEADS, seed=1)}
    expected = decode_attention(query, key, value, lengths(), return_lse=True, **options)
    (key_pages, table), (value_pages, _) = (paged(cache, block_size) for cache in (key, value))
    unused = torch.arange(table.shape[1]) * block_size >= lengths()[:, None]
    for wrong in (
        table,
        table.long(),
        table.masked_fill(unused, -1),
        table.masked_fill(unused, 10**6),
        table.t().contiguous().t(),
    ):
        found = decode_attention(
            query, key_pages, value_pages, lengths(), block_table=wrong, return_lse=True, **options
        )
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_pages_match_reference_with_a_bias():
    query, key, value = inputs()
    (key, table), (value, _) = (paged(cache, 50) for cache in (key, value))
    options = {"attn_bias": bias_with_holes(), "block_table": table, "return_lse": True}
    assert_matches_reference(decode_attention, query, key, value, lengths(), backward=False, **options)


def test_entries_may_share_pages():
    query, key, value = inputs(batch=2)
    (key_pages, table), (value_pages, _) = (paged(cache, 100) for cache in (key, value))
    table[1, :3] = table[0, :3]  # a common prefix of 300 keys
    key[1, :, :300], value[1, :, :300] = key[0, :, :300], value[0, :, :300]
    shared = decode_attention(query, key_pages, value_pages, lengths(597, 450), block_table=table)
    assert torch.equal(shared, decode_attention(query, key, value, lengths(597, 450)))


# ---- appending ----


@in_every_dtype
@pytest.mark.parametrize("new", (1, 3, 5))
@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_appended_equals_concatenated(backend, new, dtype):
    query, key, value = inputs(dtype, len_q=min(new, LEN_Q))
    seqlens = lengths(595, 256, 0, 1, 254)
    new_key = draw(BATCH, new, KV_HEADS, HEAD_DIM, dtype=dtype, seed=20).transpose(1, 2)
    new_value = draw(BATCH, KV_HEADS, new, VALUE_DIM, dtype=dtype, seed=21)
    whole = [t.clone() for t in (key, value)]
    for b, start in enumerate(seqlens.tolist()):
        whole[0][b, :, start : start + new], whole[1][b, :, start : start + new] = new_key[b], new_value[b]
    (key_pages, table), (value_pages, _) = (paged(cache, 32) for cache in (key, value))
    with use_backend(backend):
        expected = decode_attention(query, *whole, seqlens + new, return_lse=True)
        for cache in ({}, {"block_table": table}):
            caches = (key_pages, value_pages) if cache else (key, value)
            versions = [t._version for t in caches]
            found = decode_attention(
                query, *caches, seqlens, new_key=new_key, new_value=new_value, return_lse=True, **cache
            )
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b) if backend == "cpu" else assert_close(a, b, num_terms=CAPACITY) is None
            assert all(t._version > before for t, before in zip(caches, versions, strict=True))
    assert torch.equal(key, whole[0]) and torch.equal(value, whole[1])  # and nothing else was written
    for pages, cache in ((key_pages, whole[0]), (value_pages, whole[1])):
        gathered = pages[table.long()].flatten(1, 2).transpose(1, 2)[:, :, :CAPACITY]
        assert torch.equal(gathered, cache)
        assert int(pages.isnan().flatten(1).all(1).sum()) == 3  # the spare pages
    assert seqlens.tolist() == [595, 256, 0, 1, 254]


def test_a_generation_loop():
    """Token by token against the whole at once, with pages that are handed out as the sequence grows."""
    steps, block_size = 40, 8
    query, key, value = inputs(len_q=steps, capacity=steps, batch=2)
    keep = torch.ones(steps, steps, dtype=torch.bool).tril()
    expected = transfuse.scaled_dot_product_attention(query, key, value, keep, enable_gqa=True)
    key_pages, value_pages = (
        torch.full((20, block_size, KV_HEADS, HEAD_DIM), torch.nan),
        torch.full((20, block_size, KV_HEADS, VALUE_DIM), torch.nan),
    )
    table, free, seqlens = (
        torch.full((2, steps // block_size), -1),
        iter(range(19, -1, -1)),
        torch.zeros(2, dtype=torch.int32),
    )
    for step in range(steps):
        if step % block_size == 0:
            table[:, step // block_size] = torch.tensor([next(free), next(free)])
        now = slice(step, step + 1)
        output = decode_attention(
            query[:, :, now],
            key_pages,
            value_pages,
            seqlens,
            new_key=key[:, :, now],
            new_value=value[:, :, now],
            block_table=table,
        )
        assert_close(output, expected[:, :, now], num_terms=64)
        seqlens += 1


def test_strided_caches():
    query, key, value = inputs(batch=4)
    seqlens, new = (
        lengths(597, 256, 0, 300),
        (draw(4, KV_HEADS, 3, HEAD_DIM, seed=5), draw(4, KV_HEADS, 3, VALUE_DIM, seed=6)),
    )
    expected_caches = [key.clone(), value.clone()]
    expected = decode_attention(query, *expected_caches, seqlens, new_key=new[0], new_value=new[1])
    stored = {
        "tokens first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "columns apart": lambda t: t.mT.contiguous().mT,
        "every other": lambda t: torch.stack((t, torch.full_like(t, torch.nan)), 3).flatten(2, 3)[:, :, ::2],
        "a slice": lambda t: torch.nn.functional.pad(t, (1, 2, 3, 4), value=torch.nan)[:, :, 3:-4, 1:-2],
    }
    for name, make in stored.items():
        caches = [make(key), make(value)]
        arguments = [make(t) for t in new]
        found = decode_attention(make(query), *caches, seqlens, new_key=arguments[0], new_value=arguments[1])
        assert torch.equal(found, expected), name
        assert all(torch.equal(a, b) for a, b in zip(caches, expected_caches, strict=True)), name
    one = (key[:1].expand(4, -1, -1, -1), value[:1].expand(4, -1, -1, -1))  # a shared prompt, read only
    repeated = decode_attention(query, *(t.contiguous() for t in one), seqlens)
    assert torch.equal(decode_attention(query, *one, seqlens), repeated)
    assert repeated.transpose(1, 2).is_contiguous()
    inverse = torch.arange(8).view(4, 2).flip(0)[:, 0] * 100
    assert torch.equal(
        decode_attention(query, key, value, inverse), decode_attention(query, key, value, inverse.contiguous())
    )


def test_nothing_but_the_new_keys_is_written():
    query, key, value = inputs()
    arguments = [query, key, value, lengths(), bias_with_holes(), draw(HEADS)]
    copies = [t.clone() for t in arguments]
    with nan_filled_empty():
        output = decode_attention(*arguments[:4], attn_bias=arguments[4], sinks=arguments[5])
    assert output.isfinite().all() and all(torch.equal(a, b) for a, b in zip(arguments, copies, strict=True))


# ---- invariance ----


@in_every_dtype
def test_bits_do_not_depend_on_batch_threads_or_neighbours(dtype):
    options = {"sinks": draw(HEADS), "softcap": 20.0}
    query, key, value = inputs(dtype, batch=8, capacity=1500)
    seqlens = lengths(1500, 3, 700, 0, 256, 1024, 1400, 77)

    def run(rows, threads):
        torch.set_num_threads(threads)
        return decode_attention(query[rows], key[rows], value[rows], seqlens[rows], return_lse=True, **options)

    whole = run(slice(None), 1)
    for threads in (2, 3, 8):  # with few tiles per thread they are split into chunks, with many they are not
        assert all(torch.equal(a, b) for a, b in zip(whole, run(slice(None), threads), strict=True))
    for rows in (slice(0, 1), slice(6, 7), slice(2, 5), [5, 0, 5]):
        for threads in (1, 8):
            assert all(torch.equal(a[rows], b) for a, b in zip(whole, run(rows, threads), strict=True))
    torch.set_num_threads(2)
    longer = (
        torch.nn.functional.pad(key, (0, 0, 0, 300), value=torch.nan),
        torch.nn.functional.pad(value, (0, 0, 0, 300), value=torch.nan),
    )
    assert torch.equal(decode_attention(query, *longer, seqlens, **options), whole[0])
    one_query = decode_attention(query[:, :, 2:], key, value, seqlens, **options)
    assert torch.equal(one_query, whole[0][:, :, 2:])
    one_group = decode_attention(
        query[:, 3:], key[:, 1:], value[:, 1:], seqlens, sinks=options["sinks"][3:], softcap=20.0
    )
    assert torch.equal(one_group, whole[0][:, 3:])


def test_repeats_are_bitwise_equal():
    query, key, value = inputs()
    first = decode_attention(query, key, value, lengths())
    assert all(torch.equal(first, decode_attention(query, key, value, lengths())) for _ in range(100))


def test_every_level_agrees():
    """The levels with FMA bit for bit; the portable one rounds its products of doubles, which float32 hardly shows."""
    before, results = _C.cpu_isa(), {}
    for level in _C.cpu_isa_levels():
        _C.set_cpu_isa(level)
        try:
            results[level] = [
                decode_attention(*inputs(dtype), lengths(), softcap=5.0, alibi_slopes=draw(HEADS)) for dtype in DTYPES
            ]
        finally:
            _C.set_cpu_isa(before)
    fused = [r for level, r in results.items() if level != "baseline"]
    assert all(torch.equal(a, b) for other in fused[1:] for a, b in zip(fused[0], other, strict=True))
    for a, b in zip(results.get("baseline", []), fused[0] if fused else [], strict=bool(fused)):
        assert_close(a, b, num_terms=CAPACITY)


# ---- torch's transforms ----


def test_opcheck():
    query, key, value = inputs(capacity=20)
    seqlens, table = lengths(20, 3, 0, 1, 17), torch.arange(5, dtype=torch.int32).view(5, 1)
    pages = [t.transpose(1, 2).contiguous() for t in (key, value)]
    none = (None, None, None)
    forward = torch.ops.transfuse.decode_attention_forward.default
    torch.library.opcheck(forward, (query, key, value, seqlens, None, *none, 0, 0.2, -1, 0.0))
    bias, heads = draw(5, HEADS, LEN_Q, 20), draw(HEADS, dtype=torch.float64)
    torch.library.opcheck(forward, (query, *pages, seqlens, table, bias, heads, heads, 0, 0.2, 3, 5.0))
    append = torch.ops.transfuse.decode_attention_append.default
    new = (draw(5, KV_HEADS, 2, HEAD_DIM), draw(5, KV_HEADS, 2, VALUE_DIM))
    torch.library.opcheck(append, (key, value, lengths(18, 3, 0, 1, 17), None, *new))
    torch.library.opcheck(append, (*pages, lengths(18, 3, 0, 1, 17), table, *new))


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile_appends_in_place(backend):
    query, key, value = inputs(len_q=1)
    new_key, new_value = draw(BATCH, KV_HEADS, 1, HEAD_DIM, seed=20), draw(BATCH, KV_HEADS, 1, VALUE_DIM, seed=21)
    copies = [key.clone(), value.clone()]
    seqlens = lengths()

    def step(query, key, value, seqlens, new_key, new_value):
        output = decode_attention(
            query.cos(), key, value, seqlens, new_key=new_key, new_value=new_value, window=(300, 0)
        )
        return output.sin(), seqlens + 1

    expected = step(query, *copies, seqlens, new_key, new_value)
    found = torch.compile(step, fullgraph=True, backend=backend)(query, key, value, seqlens, new_key, new_value)
    assert_close(found[0], expected[0]) if backend == "inductor" else torch.testing.assert_close(
        found[0], expected[0], rtol=0, atol=0
    )
    assert torch.equal(found[1], expected[1]) and torch.equal(key, copies[0]) and torch.equal(value, copies[1])


def test_compile_dynamic_and_paged():
    compiled = torch.compile(decode_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, capacity in ((2, 64), (3, 96)):
        query, key, value = inputs(batch=batch, capacity=capacity)
        seqlens = lengths(*range(40, 40 + batch))
        (key, table), (value, _) = (paged(cache, 32) for cache in (key, value))
        arguments, options = (
            (query, key, value, seqlens),
            {"block_table": table, "sinks": draw(HEADS), "return_lse": True},
        )
        with torch.no_grad():
            found, expected = compiled(*arguments, **options), decode_attention(*arguments, **options)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_reads_and_refuses_to_append():
    query, key, value = inputs()
    queries = torch.stack((query, query.flip(0)))
    found = torch.func.vmap(lambda q: decode_attention(q, key, value, lengths()))(queries)
    assert torch.equal(found, torch.stack([decode_attention(q, key, value, lengths()) for q in queries]))
    new = {"new_key": key[:, :, :1].clone(), "new_value": value[:, :, :1].clone()}
    with pytest.raises(
        RuntimeError, match="^decode_attention: new_key is given inside a torch.func transform, expected None"
    ):
        torch.func.vmap(lambda q: decode_attention(q, key, value, lengths(), **new))(queries)


def test_autocast_follows_the_cache():
    query, key, value = inputs(torch.bfloat16)
    new = draw(BATCH, KV_HEADS, 1, HEAD_DIM, seed=3), draw(BATCH, KV_HEADS, 1, VALUE_DIM, seed=4)
    caches = [t.clone() for t in (key, value)]
    with torch.autocast("cpu", torch.bfloat16):
        found = decode_attention(query.float(), key, value, lengths(), new_key=new[0], new_value=new[1])
    expected = decode_attention(query, *caches, lengths(), new_key=new[0].bfloat16(), new_value=new[1].bfloat16())
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected) and torch.equal(key, caches[0])


def test_inference_mode_and_explain():
    with torch.inference_mode():
        query, key, value = inputs()
        new = draw(BATCH, KV_HEADS, 1, HEAD_DIM, seed=3), draw(BATCH, KV_HEADS, 1, VALUE_DIM, seed=4)
        assert decode_attention(query, key, value, lengths(), new_key=new[0], new_value=new[1]).isfinite().all()
    copies = [t.clone() for t in (key, value)]
    explanation = transfuse.explain(
        decode_attention, query, key, value, lengths(), new_key=new[0], new_value=new[1], window=(3, 0)
    )
    assert (
        explanation.chosen == "cpu" and "new_keys=1, paged=False" in str(explanation) and "window" in str(explanation)
    )
    assert torch.equal(key, copies[0]) and torch.equal(value, copies[1])  # it ran nothing


@pytest.mark.parametrize("softcap", [1e-3, 1.0, 1e14, 1e20, 3e38])
def test_a_softcap_of_any_size(softcap):
    """A large cap is no cap: the difference of two numbers near 1 would be nothing."""
    q, k, v = draw(2, 2, 1, 24, seed=1), draw(2, 2, 33, 24, seed=2), draw(2, 2, 33, 24, seed=3)
    assert_matches_reference(transfuse.decode_attention, q, k, v, torch.tensor([33, 7]), softcap=softcap, backward=False)
