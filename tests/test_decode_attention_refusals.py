"""decode_attention: what it refuses, in which words, and that nothing has been written by then."""

import pytest
import torch

from transfuse.dispatch import use_backend
from transfuse.ops.decode_attention import decode_attention
from transfuse.testing import draw

BATCH, HEADS, KV_HEADS, CAPACITY, HEAD_DIM, VALUE_DIM = 2, 6, 2, 10, 24, 40
Q = draw(BATCH, HEADS, 1, HEAD_DIM)
K, V = draw(BATCH, KV_HEADS, CAPACITY, HEAD_DIM, seed=1), draw(BATCH, KV_HEADS, CAPACITY, VALUE_DIM, seed=2)
PAGES = torch.zeros(4, 5, KV_HEADS, HEAD_DIM), torch.zeros(4, 5, KV_HEADS, VALUE_DIM)
TABLE = torch.tensor([[0, 1], [2, 3]])
NEW = {"new_key": draw(2, KV_HEADS, 2, HEAD_DIM), "new_value": draw(2, KV_HEADS, 2, VALUE_DIM)}


def lengths(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


def call(*args, **kwargs):
    defaults = [Q, K, V, lengths(3, 4)]
    return decode_attention(
        *[d if a is None else a for a, d in zip((*args, None, None, None, None)[:4], defaults, strict=True)], **kwargs
    )


@pytest.mark.parametrize(
    ("seqlens", "options", "text"),
    [
        ((3, 11), {}, "cache_seqlens[1] is 11, expected 0 to 10 (the cache holds 10 keys)"),
        ((-1, 11), {}, "cache_seqlens[0] is -1, expected 0 to 10 (the cache holds 10 keys)"),
        ((3, 9), NEW, "cache_seqlens[1] is 9, expected 0 to 8 (the cache holds 10 keys, new_key brings 2)"),
        (
            (3, 9),
            {"block_table": TABLE, **NEW},
            "cache_seqlens[1] is 9, expected 0 to 8 (the cache holds 10 keys, new_key brings 2)",
        ),
        (
            (3, 4),
            {"block_table": torch.tensor([[0, -1], [4, 3]]), **NEW},
            "block_table[1][0] is 4, expected 0 to 3 (key_cache has 4 blocks)",
        ),
        (
            (4, 3),
            {"block_table": torch.tensor([[0, -1], [1, 2]]), **NEW},
            "block_table[0][1] is -1, expected 0 to 3 (key_cache has 4 blocks)",
        ),
    ],
)
@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_values_out_of_range_are_named_and_nothing_is_written(backend, seqlens, options, text):
    caches = PAGES if "block_table" in options else (K, V)
    copies = [t.clone() for t in caches]
    with use_backend(backend), pytest.raises(ValueError) as error:
        decode_attention(Q, *caches, lengths(*seqlens), **options)
    assert str(error.value) == f"decode_attention: {text}"
    assert all(torch.equal(a, b) for a, b in zip(caches, copies, strict=True))


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: call([1.0]), TypeError, "query is a list, expected a Tensor"),
        (lambda: call(Q.long()), TypeError, "query has dtype int64, expected a floating dtype"),
        (lambda: call(Q[..., :0], K[..., :0]), ValueError, "query has head_dim 0, expected at least 1"),
        (lambda: call(None, K.to("meta")), RuntimeError, "key_cache is on meta, expected cpu (query's)"),
        (lambda: call(Q[0]), ValueError, "query has shape (6, 1, 24), expected (B, Hq, Lq, D)"),
        (lambda: call(None, K[0]), ValueError, "key_cache has shape (2, 10, 24), expected (B, Hkv, Lmax, D)"),
        (
            lambda: call(None, K[0], block_table=TABLE),
            ValueError,
            "key_cache has shape (2, 10, 24), expected (blocks, block_size, Hkv, D)",
        ),
        (lambda: call(None, K.bfloat16()), TypeError, "key_cache has dtype bfloat16, expected float32 (query's)"),
        (
            lambda: call(None, None, V[:, :, :9]),
            ValueError,
            "value_cache has shape (2, 2, 9, 40), expected (2, 2, 10) and a head_dim (key_cache's)",
        ),
        (lambda: call(None, K[:1], V[:1]), ValueError, "key_cache has batch 1, expected 2 (query's)"),
        (lambda: call(Q[:, :5]), ValueError, "key_cache has 2 heads, expected a divisor of 5 (query's)"),
        (lambda: call(None, K[..., :5]), ValueError, "key_cache has head_dim 5, expected 24 (query's)"),
        (
            lambda: call(None, None, None, lengths(3.0, 4.0, dtype=torch.float32)),
            TypeError,
            "cache_seqlens has dtype float32, expected int32 or int64",
        ),
        (
            lambda: call(None, None, None, lengths(3)),
            ValueError,
            "cache_seqlens has shape (1,), expected (2,) (the batch)",
        ),
        (lambda: call(block_table=TABLE.float()), TypeError, "block_table has dtype float32, expected int32 or int64"),
        (
            lambda: call(None, *PAGES, block_table=TABLE[:1]),
            ValueError,
            "block_table has shape (1, 2), expected (2, max_blocks)",
        ),
        (
            lambda: call(new_key=NEW["new_key"]),
            TypeError,
            "new_value is a NoneType, expected a Tensor, since the other one is given",
        ),
        (
            lambda: call(new_value=NEW["new_value"]),
            TypeError,
            "new_key is a NoneType, expected a Tensor, since the other one is given",
        ),
        (
            lambda: call(**{**NEW, "new_value": NEW["new_value"].double()}),
            TypeError,
            "new_value has dtype float64, expected float32 (value_cache's)",
        ),
        (
            lambda: call(**{**NEW, "new_key": NEW["new_key"][:, :1]}),
            ValueError,
            "new_key has shape (2, 1, 2, 24), expected (2, 2, 2, 24)",
        ),
        (
            lambda: call(**{**NEW, "new_value": NEW["new_value"][:, :, :1]}),
            ValueError,
            "new_value has shape (2, 2, 1, 40), expected (2, 2, 2, 40)",
        ),
        (
            lambda: call(None, K[:1].expand(2, -1, -1, -1), **NEW),
            ValueError,
            "key_cache has stride 0 in dimension 0, expected memory of its own to write new keys to",
        ),
        (
            lambda: call(attn_bias=torch.zeros(9)),
            ValueError,
            "attn_bias has shape (9,), expected one that broadcasts to (2, 6, 1, 10)",
        ),
        (
            lambda: call(attn_bias=torch.ones(10, dtype=torch.bool)),
            TypeError,
            "attn_bias has dtype bool, expected float32",
        ),
        (lambda: call(scale="1"), TypeError, "scale is a str, expected float"),
        (lambda: call(window=(-1, 0)), ValueError, "window is (-1, 0), expected (left, right) of at least 0"),
        (lambda: call(softcap=0.0), ValueError, "softcap is 0.0, expected a positive finite number"),
        (lambda: call(sinks=torch.zeros(5)), ValueError, "sinks has shape (5,), expected (6,)"),
        (
            lambda: call(Q.detach().requires_grad_()),
            RuntimeError,
            "query requires grad, expected inference: call it under torch.no_grad(), or train with "
            "scaled_dot_product_attention",
        ),
        (
            lambda: call(sinks=torch.zeros(6, requires_grad=True)),
            RuntimeError,
            "sinks requires grad, expected inference: call it under torch.no_grad(), or train with "
            "scaled_dot_product_attention",
        ),
    ],
)
def test_refuses_in_words(make, kind, text):
    with pytest.raises(kind) as error:
        make()
    assert str(error.value) == f"decode_attention: {text}"


def test_what_requires_grad_runs_without_grad():
    with torch.no_grad():
        assert not call(Q.detach().requires_grad_()).requires_grad
    with pytest.raises(RuntimeError, match="decode_attention: the cpu backend has no forward-mode derivative"):
        torch.func.jvp(call, (Q,), (Q,))


@pytest.mark.parametrize(
    ("op", "args", "text"),
    [
        (
            "forward",
            (Q, K, V, lengths(3, 4, 5), None, None, None, None, 0, 1.0, -1, 0.0),
            "key_cache has batch 2, expected 3 (cache_seqlens's)",
        ),
        (
            "forward",
            (Q.double(), K, V, lengths(3, 4), None, None, None, None, 0, 1.0, -1, 0.0),
            "query has dtype float64, expected float32",
        ),
        (
            "forward",
            (Q, K, V, lengths(3, 4), None, torch.zeros(2, 6, 1, 9), None, None, 0, 1.0, -1, 0.0),
            "attn_bias has shape (2, 6, 1, 9), expected (2, 6, 1, 10)",
        ),
        (
            "forward",
            (Q, K, V, lengths(3, 4), None, None, None, torch.zeros(6), 0, 1.0, -1, 0.0),
            "sinks has dtype float32, expected float64",
        ),
        (
            "append",
            (K, V, lengths(3, 4), None, NEW["new_key"][:, :1], NEW["new_value"]),
            "new_key has shape (2, 1, 2, 24), expected (2, 2, Lnew, 24)",
        ),
        (
            "append",
            (K, V, lengths(3, 4), None, NEW["new_key"], NEW["new_value"][:, :, :1]),
            "new_value has length 1, expected 2 (new_key's)",
        ),
    ],
)
def test_raw_ops_check_again(op, args, text):
    with pytest.raises(ValueError) as error:
        getattr(torch.ops.transfuse, f"decode_attention_{op}")(*args)
    assert str(error.value) == f"decode_attention: {text}"


def test_a_block_table_that_does_not_fit_names_op_and_bytes():
    table = torch.zeros(1, 1, dtype=torch.int64).expand(1, 2**45)  # one number in memory; its copy would be 2^48 bytes
    page = torch.zeros(1, 1, 1, 8)
    with use_backend("cpu"), pytest.raises(RuntimeError) as error:
        decode_attention(torch.zeros(1, 1, 1, 8), page, page, lengths(1), block_table=table)
    assert str(error.value) == "decode_attention: could not allocate 281474976710656 bytes"


def test_what_is_written_is_not_what_is_read():
    cache, other = torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 16)
    new, query, lengths = torch.ones(1, 2, 1, 16), torch.ones(1, 2, 1, 16), torch.tensor([3])
    for arguments, text in (
        ((cache, cache, new, new), "value_cache is key_cache, expected memory of its own"),
        ((cache, other, cache[:, :, 4:5], new), "new_key lies in the memory of key_cache"),
        ((cache, other, new, cache[:, :, 4:5]), "new_value lies in the memory of key_cache"),
    ):
        keys, values, new_key, new_value = arguments
        with use_backend("cpu"), pytest.raises(ValueError, match=text):
            decode_attention(query, keys, values, lengths, new_key=new_key, new_value=new_value)
    assert not cache.any() and not other.any()
    both = torch.zeros(1, 2, 2, 8, 16)  # two caches in turns in one memory are apart
    decode_attention(query, both[:, 0], both[:, 1], lengths, new_key=new, new_value=new)
    assert both[:, :, :, 3].all() and not both[:, :, :, 4:].any()
