"""Triton's attention keeps the contract, interpreted: promises, a pairwise cover of features, invariance, dropout.

Bounds and families are transfuse.promises', the same that `transfuse verify --backend triton` runs on a GPU. What takes
long here runs with FULL=1; where a kernel's code is the same for two dtypes, one of them is enough otherwise.
"""

import re

import pytest
import torch
from feature_cases import CASES, compare

import transfuse
from transfuse import promises
from transfuse.dispatch import TRITON_DTYPES, dtype_name
from transfuse.kernels.triton.attention_problem import Tile, takes_descriptor
from transfuse.reference.attention import dropout_keep_mask
from transfuse.testing import assert_close, draw

OPS = ("attention", "varlen_attention", "decode_attention")
SECTIONS = {
    1: ("rule-", "bad-offsets", "compiled"),
    2: ("agrees-", "rms.", "row.", "huge-equal-scores", "infinite-score", "poisoned-keys", "head-dims"),
    4: ("strides", "far-apart", "written", "backward-twice"),
    5: ("bad-calls",),
}
# What runs without FULL=1, as regular expressions of ids.
QUICK = (
    r"1\.attention\.float32\.rule-\d",
    r"1\.attention\.bfloat16\.rule-[57]",
    r"1\.varlen_attention\.(float32|bfloat16)\.rule-\d",
    r"1\.varlen_attention\.(any\.bad-offsets|float32\.compiled)",
    r"2\.\w+\.\w+\.agrees-forward",
    r"2\.\w+\.(float32|bfloat16)\.agrees-backward",
    r"2\.attention\.\w+\.huge-equal-scores",
    r"2\.attention\.float32\.infinite-score",
    r"2\.attention\.bfloat16\.poisoned-keys",
    r"2\.attention\.float32\.(rms|row)\.logits-1e4",
    r"2\.attention\.bfloat16\.(rms|row)\.very-negative",
    r"2\.decode_attention\.bfloat16\.(rms|row)\.logits-1e3",
    r"4\.varlen_attention\.bfloat16\.written",
    r"4\.decode_attention\.float16\.written",
    r"5\..*",
)


def _parameters():
    for promise in promises.every():
        what = promise.id.split(".", 3)[3]
        if promise.op not in OPS or promise.dtype not in (*TRITON_DTYPES, None) or promise.slow:
            continue
        if any(what.startswith(start) for start in SECTIONS.get(promise.section, ())):
            quick = any(re.fullmatch(pattern, promise.id) for pattern in QUICK)
            yield pytest.param(promise, id=promise.id, marks=() if quick else pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def measured_anew():
    """What one promise has measured the next may use; what the CPU's kernels measured it may not."""
    promises.forget()
    yield
    promises.forget()


@pytest.mark.parametrize("promise", list(_parameters()))
def test_promise_is_kept(promise):
    torch.set_num_threads(1)
    outcome = promises.check(promise, "triton", "cpu")
    assert outcome.status == "ok", f"{outcome.reason} {outcome.figure}"


@pytest.mark.parametrize("index", range(len(CASES)))
def test_features_together(index):
    dtype = TRITON_DTYPES[0] if index % 4 else TRITON_DTYPES[1 + index // 4 % 2]
    compare(CASES[index], dtype)


# ---- invariance: a row's bits come from its own keys ----


def _same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _with_gradients(call, tensors, grads):
    leaves = [t.clone().requires_grad_() for t in tensors]
    outputs = call(*leaves)
    return [t.detach() for t in (*outputs, *torch.autograd.grad(outputs, leaves, grads))]


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=dtype_name)
def test_an_entry_has_its_bits_in_every_batch_padding_and_packing(dtype):
    """Alone, in a batch, padded to more keys, packed with others: output, lse and gradients are the same."""
    lengths, heads, dim, longest = (37, 70, 5), 2, 24, 75
    packed = [draw(sum(lengths), heads, dim, dtype=dtype, seed=i) for i in range(4)]
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()

    def attend(query, key, value, **options):
        options |= {"causal_alignment": "bottom_right", "window": (20, 0), "return_lse": True}
        return transfuse.scaled_dot_product_attention(query, key, value, is_causal=True, **options)

    def packed_attend(*tensors):
        return transfuse.varlen_attention(*tensors, offsets, is_causal=True, window=(20, 0), return_lse=True)

    def alone(n):
        rows = slice(int(offsets[n]), int(offsets[n + 1]))
        query, key, value, grad = (t[None, rows].transpose(1, 2) for t in packed)
        results = _with_gradients(attend, (query, key, value), (grad, torch.ones(1, heads, lengths[n])))
        return [t.squeeze(0) for t in results]

    with transfuse.use_backend("triton"):
        entries = [alone(n) for n in range(len(lengths))]
        together = _with_gradients(packed_attend, packed[:3], (packed[3], torch.ones(heads, sum(lengths))))
        padded = [torch.full((len(lengths), heads, longest, dim), torch.nan, dtype=dtype) for _ in range(2)]
        for n, length in enumerate(lengths):
            for t, source in zip(padded, packed[1:3]):
                t[n, :, :length] = source[offsets[n] : offsets[n + 1]].transpose(0, 1)
        query = packed[0][None, : lengths[2]].transpose(1, 2).expand(3, -1, -1, -1)
        of_padded = attend(query, *padded, seqlens_k=torch.tensor(lengths))
        for n, length in enumerate(lengths):
            keys = [t[n : n + 1, :, :length] for t in padded]
            assert _same([t[n] for t in of_padded], [t[0] for t in attend(query[n : n + 1], *keys)]), f"padded {n}"
    for n, entry in enumerate(entries):
        rows = slice(int(offsets[n]), int(offsets[n + 1]))
        output, lse, *grads = together
        found = [output[rows].transpose(0, 1), lse[:, rows], *(t[rows].transpose(0, 1) for t in grads)]
        assert _same(found, entry), f"packed {n}"


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=dtype_name)
def test_decoding_has_the_same_bits_in_pages_and_alone(dtype):
    batch, heads, kv_heads, capacity, dim, block_size = 3, 4, 2, 288, 24, 16
    query = draw(batch, heads, 2, dim, dtype=dtype, seed=0)
    caches = [draw(batch, kv_heads, capacity, dim, dtype=dtype, seed=1 + i) for i in range(2)]
    lengths = torch.tensor([280, 3, 257])
    for entry, length in enumerate(lengths):
        for cache in caches:
            cache[entry, :, length:] = torch.nan
    table = torch.randperm(batch * capacity // block_size, generator=torch.Generator().manual_seed(4)).view(batch, -1)
    pages = []
    for cache in caches:
        page = torch.empty(table.numel(), block_size, kv_heads, dim, dtype=dtype)
        page[table] = cache.transpose(1, 2).unflatten(1, (-1, block_size))
        pages.append(page)
    with transfuse.use_backend("triton"):
        together = transfuse.decode_attention(query, *caches, lengths, return_lse=True)
        paged = transfuse.decode_attention(query, *pages, lengths, block_table=table.int(), return_lse=True)
        assert _same(together, paged)
        for n in range(batch):
            entry = slice(n, n + 1)
            tensors = (query[entry], *(cache[entry] for cache in caches), lengths[entry])
            alone = transfuse.decode_attention(*tensors, return_lse=True)
            assert _same([t[entry] for t in together], alone), n


def test_decoding_appends_and_agrees_with_the_reference():
    batch, heads, kv_heads, dim, block_size = 2, 4, 2, 40, 8
    query, new_key, new_value = (draw(batch, h, 3, dim, seed=i) for i, h in enumerate((heads, kv_heads, kv_heads)))
    table = torch.tensor([[3, 0, 5, 1], [2, 4, 6, -1]], dtype=torch.int32)
    lengths = torch.tensor([27, 14])
    options = {
        "window": (9, None), "softcap": 2.0, "alibi_slopes": torch.rand(batch, heads), "sinks": torch.randn(heads),
        "attn_bias": draw(1, heads, 3, 32, seed=9), "new_key": new_key, "new_value": new_value, "block_table": table,
    }  # fmt: skip
    results = []
    for backend in ("triton", "reference"):
        pages = [draw(7, block_size, kv_heads, dim, seed=5 + i) for i in range(2)]
        with transfuse.use_backend(backend):
            output, lse = transfuse.decode_attention(query, *pages, lengths, return_lse=True, **options)
        results.append((output, lse, *pages))
    (output, lse, *pages), (exact, exact_lse, *exact_pages) = results
    assert _same(pages, exact_pages)
    assert_close(output, exact, 64, "output")
    assert_close(lse, exact_lse, 64, "lse")


# ---- TMA descriptors ----


@pytest.mark.parametrize(
    "dtype",
    (torch.bfloat16, *(pytest.param(d, marks=pytest.mark.slow) for d in TRITON_DTYPES if d != torch.bfloat16)),
    ids=dtype_name,
)
def test_descriptors_and_addresses_give_the_same_bits(dtype, monkeypatch):
    """Batches that end anywhere, packed sequences, columns that do not fill a tile, values of another width."""
    lengths = (130, 70)
    batch = [draw(2, heads, 130, d, dtype=dtype, seed=heads + d) for heads, d in ((2, 40), (1, 40), (1, 24))]
    batch[1][1, :, 70:] = batch[2][1, :, 70:] = torch.nan
    packed = [t.transpose(1, 2).flatten(0, 1)[: sum(lengths)].nan_to_num() for t in batch]
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    grad = draw(2, 2, 130, 24, dtype=dtype, seed=5)
    taken = []
    describe = Tile.descriptor_of

    def results(described):
        def descriptor_of(tile, *arguments):
            taken.append(describe(tile, *arguments) if described else None)
            return taken[-1]

        def attend(*tensors):
            options = {"is_causal": True, "causal_alignment": "bottom_right", "seqlens_k": torch.tensor(lengths)}
            options["enable_gqa"] = True
            return (transfuse.scaled_dot_product_attention(*tensors, **options),)

        def attend_packed(*tensors):
            return (transfuse.varlen_attention(*tensors, offsets, is_causal=True),)

        monkeypatch.setattr(Tile, "descriptor_of", descriptor_of)
        with transfuse.use_backend("triton"):
            dense = _with_gradients(attend, batch, (grad,))
            of_packed = grad.transpose(1, 2).flatten(0, 1)[: sum(lengths)]
            return dense + _with_gradients(attend_packed, packed, (of_packed,))

    described = results(True)
    assert len(taken) == 12 and None not in taken  # keys and values, twice; queries and gradients; dense and packed
    for with_descriptors, with_addresses in zip(described, results(False), strict=True):
        assert torch.equal(with_descriptors.nan_to_num(7), with_addresses.nan_to_num(7))


def test_what_a_descriptor_takes():
    tensor = draw(2, 3, 8, 24, dtype=torch.bfloat16, seed=0)
    assert takes_descriptor(tensor) and takes_descriptor(tensor.transpose(1, 2)) and takes_descriptor(tensor[:, :, ::2])
    assert takes_descriptor(tensor[:, :, :, 8:20])  # from a 16-byte boundary
    assert takes_descriptor(tensor[:, :1, :1, :13].as_strided((2, 1, 1, 13), (576, 1, 1, 1)))  # strides of nothing
    for refused in (
        tensor[:, :, :, 4:], tensor.transpose(2, 3), tensor[:, :, :, ::2], tensor[:, :, :0],
        tensor[:, :1].expand(2, 3, 8, 24), draw(2, 3, 8, 20, dtype=torch.bfloat16, seed=0),
    ):  # fmt: skip
        assert not takes_descriptor(refused)


# ---- dropout ----


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_dropout_draws_the_mask_of_every_backend(layout):
    """With values of the identity the output shows which weights were kept."""
    batch, heads, length, dropout_p = 2, 3, 37, 0.4
    query, key = (draw(batch, heads, length, 16, seed=i) for i in range(2))
    value = torch.eye(length).expand(batch, heads, length, length)
    torch.manual_seed(17)
    seed = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64)
    keep = dropout_keep_mask(seed, dropout_p, (batch, heads, length, length))
    torch.manual_seed(17)
    with transfuse.use_backend("triton"):
        if layout == "dense":
            output = transfuse.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p)
        else:
            offsets = torch.arange(batch + 1, dtype=torch.int32) * length
            tensors = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
            output = transfuse.varlen_attention(*tensors, offsets, dropout_p=dropout_p)
            output = output.unflatten(0, (batch, length)).transpose(1, 2)
    assert torch.equal(output != 0, keep)


# ---- rows computed in parts ----


def test_a_row_in_two_parts_has_the_gradients_of_the_whole():
    """Ring attention: each part of the keys is given lse and output of the whole row."""
    query, key, value, grad = (draw(1, 2, length, 24, seed=i) for i, length in enumerate((9, 40, 40, 9)))
    forward, backward = (torch.ops.transfuse_triton.attention_forward, torch.ops.transfuse_triton.attention_backward)
    numbers = (24**-0.5, False, False, -1, -1, 0.0, 0.0)
    none = (None,) * 6
    output, lse = forward(query, key, value, *none, *numbers)

    def gradients(keys):
        part = (key[:, :, keys], value[:, :, keys])
        return backward(grad, None, query, *part, output, lse, *none, *numbers, [1] * 4, False, False, False)

    whole, first, second = (gradients(keys) for keys in (slice(None), slice(0, 16), slice(16, None)))
    assert_close(first[0] + second[0], whole[0], 64, "query", slack=4.0)
    for index, what in ((1, "key"), (2, "value")):
        assert_close(torch.cat((first[index], second[index]), 2), whole[index], 64, what, slack=4.0)


def test_logits_beyond_the_precision_of_lse_have_gradients():
    """Scores of 1e12: exp(score - lse) would overflow; the weights are those of the scores' differences."""
    query = torch.full((1, 1, 5, 16), 133120.0, dtype=torch.bfloat16).requires_grad_()
    key = torch.full((1, 1, 33, 16), 133120.0, dtype=torch.bfloat16).requires_grad_()
    value = draw(1, 1, 33, 16, dtype=torch.bfloat16, seed=2).requires_grad_()
    with transfuse.use_backend("triton"):
        output = transfuse.scaled_dot_product_attention(query, key, value)
        grads = torch.autograd.grad(output, (query, key, value), torch.ones_like(output))
    assert all(grad.isfinite().all() for grad in grads)
    assert_close(grads[2], torch.full_like(grads[2], 5 / 33), 33, "value", slack=4.0)
