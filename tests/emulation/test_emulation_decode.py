"""decode_attention's CUDA kernels: features meet, pages and parts change no bit, tables are not trusted, appending."""

import emulated_ops
import emulator
import pytest
import torch
from test_emulation_attention import laid_out, pairwise, widened

import transfuse
from transfuse import decode_attention, dispatch, extension
from transfuse.dispatch import dtype_name
from transfuse.ops.decode_attention import IMPLEMENTATIONS, DecodeAttentionProblem
from transfuse.testing import assert_close

in_every_dtype = pytest.mark.parametrize("dtype", emulated_ops.DTYPES, ids=dtype_name)
FACTORS = {
    "dtype": emulated_ops.DTYPES,
    "head_dims": ((64, 64), (128, 128), (256, 256), (40, 72), (17, 5), (96, 200)),
    "lengths": ((1, 130), (257, 300), (255, 3), (0, 700), (520, 16)),  # of two entries
    "heads": ((2, 2), (4, 1), (18, 1), (6, 3)),  # 18 rows of a key head are two tiles
    "queries": (1, 2, 5),
    "window": (None, (9, None), (300, 0)),
    "bias": (None, "float32", "dtype", "broadcast"),
    "softcap": (None, 3.0),
    "alibi": (None, "heads", "batch"),
    "sinks": (False, True),
    "scale": (None, -0.3),
    "pages": (None, 16, 7, 1),
    "layout": ("heads", "tokens", "odd"),
}
CASES = pairwise(FACTORS)


def in_pages(cache, block_size, seed=0):
    """The same cache as pages in random order with a page of NaN between them, and its block table."""
    batch, heads, capacity, dim = cache.shape
    each = -(-capacity // block_size)
    table = torch.randperm(batch * each + 1, generator=torch.Generator().manual_seed(seed))[: batch * each]
    padded = cache.new_full((batch, heads, each * block_size, dim), torch.nan)
    padded[:, :, :capacity] = cache
    pages = cache.new_full((batch * each + 1, block_size, heads, dim), torch.nan)
    pages[table] = padded.view(batch, heads, each, block_size, dim).permute(0, 2, 3, 1, 4).flatten(0, 1)
    return pages, table.view(batch, each).int()


def arguments(case, seed=0):
    """query, caches with NaN beyond the lengths, lengths, and the options of the call."""
    generator = torch.Generator().manual_seed(seed)
    dtype, lengths, (heads, kv_heads), queries = case["dtype"], case["lengths"], case["heads"], case["queries"]
    batch, capacity, head_dim = len(lengths), max(lengths) + 3, case["head_dims"][0]

    def draw(*shape, of=dtype):
        return torch.randn(*shape, generator=generator).to(of)

    query = draw(batch, heads, queries, head_dim)
    caches = [draw(batch, kv_heads, capacity, dim) for dim in case["head_dims"]]
    for cache in caches:
        for entry, length in enumerate(lengths):
            cache[entry, :, length:] = torch.nan
    options = {"window": case["window"], "softcap": case["softcap"], "scale": case["scale"]}
    if case["bias"]:
        shape = (heads, 1, capacity) if case["bias"] == "broadcast" else (batch, heads, queries, capacity)
        bias = draw(*shape, of=torch.float32 if case["bias"] == "float32" else dtype)
        options["attn_bias"] = bias.masked_fill(torch.rand(shape, generator=generator) < 0.3, -torch.inf)
    if case["alibi"]:
        shape = (batch, heads) if case["alibi"] == "batch" else (heads,)
        options["alibi_slopes"] = draw(*shape, of=torch.float32).abs() / 8
    if case["sinks"]:
        options["sinks"] = draw(heads, of=torch.float32)
    return query, *caches, torch.tensor(lengths), options


@pytest.mark.parametrize("number", range(len(CASES)))
def test_features_meet(number):
    case = CASES[number]
    query, key, value, lengths, options = arguments(case, number)
    with transfuse.use_backend("reference"):
        exact = decode_attention(*(t.double() for t in (query, key, value)), lengths, return_lse=True,
                                 **widened(options))  # fmt: skip
    if case["pages"]:
        capacity = -(-key.shape[2] // case["pages"]) * case["pages"]
        if "attn_bias" in options:
            options["attn_bias"] = torch.nn.functional.pad(options["attn_bias"], (0, capacity - key.shape[2]))
        (key, table), (value, _) = (in_pages(cache, case["pages"]) for cache in (key, value))
        options["block_table"] = table
    tensors = (laid_out(t, case["layout"]) for t in (query, key, value))
    with emulated_ops.EmulatedKernels(seed=number + 1) as mode:
        output, lse = decode_attention(*tensors, lengths, return_lse=True, **options)
    assert mode.calls == 1
    assert_close(output, exact[0], max(case["lengths"]), "output")
    assert_close(lse, exact[1], max(case["lengths"]), "lse")


def plain(**levels):
    return {name: of[0] for name, of in FACTORS.items()} | levels


@in_every_dtype
def test_neither_batch_nor_cache_changes_a_bit(dtype):
    """Entries alone, in pages of any size, in a longer cache, beside other queries: the same rows, the same bits."""
    lengths = (700, 3, 0, 513)
    case = plain(dtype=dtype, heads=(6, 2), queries=2, lengths=lengths, head_dims=(64, 40))
    query, key, value, seqlens, _ = arguments(case)
    with emulated_ops.EmulatedKernels(seed=1):
        whole = decode_attention(query, key, value, seqlens, return_lse=True)
        for entry in range(4):
            rows = slice(entry, entry + 1)
            alone = decode_attention(query[rows], key[rows], value[rows], seqlens[rows], return_lse=True)
            assert all(torch.equal(a[rows], b) for a, b in zip(whole, alone, strict=True)), entry
        short = slice(1, 3)  # a cache of one part: no second kernel
        cut = (t[short, :, :200] for t in (key, value))
        assert torch.equal(decode_attention(query[short], *cut, seqlens[short]), whole[0][short])
        for block_size in (1, 24, 256):
            (keys, table), (values, _) = (in_pages(cache, block_size) for cache in (key, value))
            found = decode_attention(query, keys, values, seqlens, block_table=table.long(), return_lse=True)
            assert all(torch.equal(a, b) for a, b in zip(whole, found, strict=True)), block_size
        last = decode_attention(query[:, :, 1:], key, value, seqlens, return_lse=True)
        assert all(torch.equal(a[:, :, 1:], b) for a, b in zip(whole, last, strict=True))
        group = decode_attention(query[:, 3:5], key[:, 1:], value[:, 1:], seqlens)
        assert torch.equal(group, whole[0][:, 3:5])


@in_every_dtype
def test_the_parts_of_a_long_entry_are_longer(dtype):
    """Above 64 * 256 keys an entry has 64 parts at most; a short one beside it keeps its own."""
    case = plain(dtype=dtype, head_dims=(17, 5), lengths=(64 * 256 + 100, 600), heads=(1, 1))
    query, key, value, seqlens, _ = arguments(case)
    with emulated_ops.EmulatedKernels(seed=2):
        output, lse = decode_attention(query, key, value, seqlens, return_lse=True)
        short = decode_attention(query[1:], key[1:, :, :601], value[1:, :, :601], seqlens[1:], return_lse=True)
    assert torch.equal(short[0], output[1:]) and torch.equal(short[1], lse[1:])
    with transfuse.use_backend("reference"):
        exact = decode_attention(query.double(), key.double(), value.double(), seqlens, return_lse=True)
    assert_close(output, exact[0], len(key[0, 0]), "output")
    assert_close(lse, exact[1], len(key[0, 0]), "lse")


@in_every_dtype
def test_an_entry_may_have_more_parts_than_a_longer_one(dtype):
    """64 * 256 keys are 64 parts; a cache with room for one more key would have 33 of an entry that fills it."""
    case = plain(dtype=dtype, head_dims=(17, 5), lengths=(64 * 256, 64 * 256 - 5), heads=(1, 1))
    query, key, value, seqlens, _ = arguments(case)
    with emulated_ops.EmulatedKernels(seed=3):
        output, lse = decode_attention(query, key, value, seqlens, return_lse=True)
    with transfuse.use_backend("reference"):
        exact = decode_attention(query.double(), key.double(), value.double(), seqlens, return_lse=True)
    assert_close(output, exact[0], 64 * 256, "output")
    assert_close(lse, exact[1], 64 * 256, "lse")


@in_every_dtype
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_excluded_never_matters_and_what_is_kept_shows(poison, dtype):
    case = plain(dtype=dtype, lengths=(300, 40), queries=2, heads=(4, 2))
    query, key, value, seqlens, _ = arguments(case)
    bias = torch.zeros(4, 2, key.shape[2])
    bias[:, 0, 7] = bias[1, 1, 290] = -torch.inf  # key 7 for the first query, 290 for the second one of head 1
    with emulated_ops.EmulatedKernels(seed=3):
        clean = decode_attention(query, key, value, seqlens, attn_bias=bias)
        value[:, :, 7] = value[0, :, 290] = poison
        found = decode_attention(query, key, value, seqlens, attn_bias=bias)
    assert torch.equal(found[1, :, 0], clean[1, :, 0])
    assert not found[:, :, 1].isfinite().any()  # key 7
    assert not found[0, :, 0].isfinite().any()  # key 290


@in_every_dtype
def test_padding_by_a_finite_value_refines_no_row(dtype):
    """Keys that a huge negative bias takes out, before, between and behind the others, change no bit of a row's."""
    case = plain(dtype=dtype, lengths=(600, 300), heads=(4, 2))
    query, key, value, seqlens, _ = arguments(case)
    bias = torch.zeros(2, 1, 1, key.shape[2], dtype=dtype)
    bias[..., :270] = bias[..., 290:400] = bias[..., 500:] = -torch.inf
    with emulated_ops.EmulatedKernels(seed=7):
        expected = decode_attention(query, key, value, seqlens, attn_bias=bias, return_lse=True)
        padding = bias.clamp(min=torch.finfo(dtype).min)
        found = decode_attention(query, key, value, seqlens, attn_bias=padding, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def raw_forward(query, key, value, seqlens, table, num_new=0):
    options = (None, None, None, num_new, 0.2, -1, 0.0)
    return torch.ops.transfuse.decode_attention_forward(query, key, value, seqlens, table, *options)


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
@in_every_dtype
def test_tables_are_clamped(dtype, integers):
    """Lengths and blocks that do not exist, far beyond too: no access out of bounds, other entries keep their bits."""
    query, keys, values, seqlens, _ = arguments(plain(dtype=dtype, lengths=(60, 60), heads=(4, 2)))
    (pages, table), (value_pages, _) = (in_pages(cache, 16) for cache in (keys, values))
    far = torch.iinfo(integers).max
    with emulated_ops.EmulatedKernels(seed=4):
        expected = raw_forward(query, pages, value_pages, seqlens.to(integers), table.to(integers))
        for length in (-5, 64, 65, far, torch.iinfo(integers).min):
            wrong = torch.tensor([60, length], dtype=integers)
            found = raw_forward(query, pages, value_pages, wrong, table.to(integers), 0)
            assert torch.equal(found[0][0], expected[0][0])
            raw_forward(query, pages, value_pages, wrong, table.to(integers), 3)
            raw_forward(query, keys, values, wrong, None, 3)
        for block in (-1, len(pages), far):
            wrong = table.to(integers)
            wrong[1, 1] = block
            found = raw_forward(query, pages, value_pages, seqlens.to(integers), wrong)
            assert torch.equal(found[0][0], expected[0][0])


@in_every_dtype
def test_rows_further_apart_than_an_int32_counts(dtype):
    query, key, value, seqlens, _ = arguments(plain(dtype=dtype, lengths=(3,), heads=(2, 1)))
    with emulated_ops.EmulatedKernels():
        expected = decode_attention(query, key, value, seqlens)
    for dim in (2, 3):  # rows, columns
        strides = [0, 0, 64, 1]
        strides[dim] = (1 << 31) + 8
        with emulator.Memory() as memory, emulated_ops.EmulatedKernels():
            sizes = (1, 1, 3, 3) if dim == 3 else (1, 1, 3, 64)
            far = memory.strided("far", sizes, strides, dtype, "read-only")
            far.copy_(key[:, :, :3, : sizes[3]])
            narrow = slice(0, sizes[3])
            found = decode_attention(query[..., narrow], far, value[:, :, :3], seqlens, scale=64**-0.5)
            near = decode_attention(query[..., narrow], key[:, :, :3, narrow], value[:, :, :3], seqlens, scale=64**-0.5)
            assert torch.equal(found, near)
            assert dim == 3 or torch.equal(found, expected)


def test_what_the_kernels_do_not_take_has_its_reason(monkeypatch):
    """On a machine whose GPU the module serves; where it serves none, its own reason is the one."""
    monkeypatch.setattr(extension, "cuda_unavailable", "")
    monkeypatch.setattr(dispatch, "unserved_gpu", lambda device: "")
    cuda = next(i for i in IMPLEMENTATIONS if i.name == "cuda")
    assert IMPLEMENTATIONS[0] is cuda and cuda.is_automatic_on("cuda")

    def reasons(head_dim=256, value_head_dim=256, dtype=torch.bfloat16, device="cuda:0"):
        shapes = ((2, 4, 1, head_dim), (2, 4, 9, head_dim), (2, 4, 9, value_head_dim))
        return cuda.unsupported(
            DecodeAttentionProblem("decode_attention", device, dtype, False, *shapes, 0, False, None, ())
        )

    assert reasons() == reasons(dtype=torch.float32) == ()
    assert reasons(257) == ("head_dim is 257, the kernel takes up to 256",)
    assert reasons(value_head_dim=300) == ("value's head_dim is 300, the kernel takes up to 256",)
    assert reasons(device="cpu") == ("device is cpu, the kernel takes cuda",)
    assert reasons(dtype=torch.float64)[0].startswith("dtype is float64, the kernel takes")


# ---- appending ----


@in_every_dtype
@pytest.mark.parametrize("dims", [(64, 128), (24, 5)])
@pytest.mark.parametrize("block_size", [None, 16, 7])
def test_new_keys_are_written_where_the_lengths_point(block_size, dims, dtype):
    query, key, value, _, _ = arguments(plain(dtype=dtype, head_dims=dims, lengths=(64, 64, 64), heads=(4, 2)))
    seqlens, new = torch.tensor([60, 0, 30]), 3
    added = [torch.randn(3, new, 2, dim).to(dtype).transpose(1, 2) for dim in dims]
    expected = [cache.clone() for cache in (key, value)]
    for cache, rows in zip(expected, added, strict=True):
        for entry, start in enumerate(seqlens.tolist()):
            cache[entry, :, start : start + new] = rows[entry]
    table = None
    if block_size:
        ((key, table), (value, _)), ((keys, _), (values, _)) = (
            [in_pages(cache, block_size) for cache in caches] for caches in ((key, value), expected)
        )
        expected = [keys, values]
    with emulated_ops.EmulatedKernels(seed=5) as mode:
        decode_attention(query, key, value, seqlens, new_key=added[0], new_value=added[1], block_table=table)
    assert mode.calls == 2
    for cache, whole in zip((key, value), expected, strict=True):
        assert torch.equal(cache.nan_to_num(123.0), whole.nan_to_num(123.0))


def test_new_keys_without_a_place_are_left_out():
    keys, values = torch.zeros(2, 4, 1, 8), torch.zeros(2, 4, 1, 8)  # two pages of four keys
    new = torch.ones(2, 1, 2, 8)
    append = torch.ops.transfuse.decode_attention_append
    with emulated_ops.EmulatedKernels(seed=6):
        append(keys, values, torch.tensor([2**62, 3]), torch.tensor([[0], [1]]), new, new)
        assert keys.sum() == values.sum() == 8 and keys[1, 3].all()
        append(keys, values, torch.tensor([0, -7]), torch.tensor([[2], [-1]]), new, new)
        assert keys.sum() == values.sum() == 8
        append(keys, values, torch.tensor([0, -7]), torch.tensor([[2], [0]]), new, new)
    assert keys[0, :2].all() and keys.sum() == values.sum() == 24


def test_what_is_written_is_not_what_is_read():
    cache, other, new = torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 16), torch.ones(1, 2, 1, 16)
    for caches, added, text in (
        ((cache, cache), (new, new), "value_cache is key_cache, expected memory of its own"),
        ((cache, other), (cache[:, :, 4:5], new), "new_key lies in the memory of key_cache"),
        ((cache, other), (new, cache[:, :, 4:5]), "new_value lies in the memory of key_cache"),
        ((cache, other), (new, other[:, :, 4:5]), "new_value lies in the memory of value_cache"),
        ((cache[:, :1].expand(1, 2, 8, 16), other), (new, new), "key_cache has stride 0 in dimension 1"),
    ):
        with emulated_ops.EmulatedKernels(), pytest.raises(ValueError, match=text):
            torch.ops.transfuse.decode_attention_append(*caches, torch.tensor([3]), None, *added)
    assert not cache.any() and not other.any()
