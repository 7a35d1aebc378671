"""Attention of a few new queries against a long cache, contiguous or in pages, and the writing of new keys to it.

A row is one query of one query head. The rows that share a key head form tiles; a program takes one tile and one chunk
of CHUNK_KEYS keys, counted from the sequence's own first key, and leaves a partial result: maximum, sum of weights,
weighted sum of values. A second kernel folds the partial results of a row in the order of its chunks. How many chunks
there are follows from the row's own length, so neither batch nor capacity nor pages enter a row's arithmetic.
Policy: attention_scores.py. A chunk without a key changes no bit. Lengths and page numbers stay within the cache
whatever the tables hold.
Source: split keys as in Flash-Decoding (Dao et al., 2023), pages as in vLLM (Kwon et al., 2023).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_problem import allocate, decode_problem, heads_together, tile_options, view
from .attention_scores import Sequence, all_finite, clamp, finish_rows, finish_scores, multiply, multiply_kept, weigh
from .launch import Launch, launch
from .memory import check_append
from .versions import narrowed

CHUNK_KEYS = 256  # of one partial result; fixed, so the order of every sum is too
LARGEST_TILE = 64  # rows of a program
COPY_ROWS, COPY_COLUMNS = 16, 128


class Cache(NamedTuple):
    """Where keys and values lie. A batch entry of a contiguous cache is one block of `capacity` rows."""

    seqlens: Any  # [B], valid keys before the new ones
    num_new: Any
    capacity: Any  # keys of one batch entry
    table: Any  # [B, max_blocks], or None
    max_blocks: Any
    block_size: Any
    num_blocks: Any


@triton.jit
def length_of(cache, batch):
    """Valid keys of one entry, the new ones included."""
    before = tl.maximum(tl.load(cache.seqlens + batch).to(tl.int64), 0)
    return tl.minimum(before + cache.num_new, cache.capacity).to(tl.int32)


@triton.jit
def place_of(cache, t, batch, keys, valid):
    """Offsets of keys (int32 [N]) in a cache's memory, and which of the valid ones have a page."""
    keys = keys.to(tl.int64)
    if cache.table is None:
        return batch.to(tl.int64) * t.batch + keys * t.row, valid
    else:
        page = keys // cache.block_size
        block = tl.load(cache.table + batch * cache.max_blocks + page, mask=valid, other=0).to(tl.int64)
        exists = valid & (block >= 0) & (block < cache.num_blocks)
        return tl.where(exists, block, 0) * t.batch + (keys - page * cache.block_size) * t.row, exists


@triton.jit
def load_at(base, offsets, exists, columns, stride, num_columns):
    """Rows that lie anywhere: a tile [rows, columns], 0 where there is none."""
    addresses = base + offsets[:, None] + columns.to(tl.int64)[None, :] * stride
    return tl.load(addresses, mask=exists[:, None] & (columns < num_columns)[None, :], other=0.0)


@triton.jit
def first_chunk_of(p, length, CHUNK: tl.constexpr):
    """The first chunk that some query may see."""
    first = tl.full((), 0, tl.int32)
    if p.window_left is not None:
        first = clamp(length - p.max_q - p.window_left, 0, length) // CHUNK
    return first


@triton.jit
def _take_chunk(p, s, cache, tile_rows, key_base, value_base, batch, chunk, value_columns, KEPT: tl.constexpr,
                CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD: tl.constexpr,
                HEAD_CHUNKS: tl.constexpr, VALUE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """The partial result (output, maximum, sum) of a tile over one chunk of keys."""
    query_base, query_offsets, exists, heads, queries = tile_rows
    TYPE: tl.constexpr = p.value.data.dtype.element_ty
    output = tl.zeros((BLOCK_M, VALUE), tl.float32)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for key in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, s.len_k), BLOCK_N):
        columns = key + tl.arange(0, BLOCK_N)
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        key_offsets, present = place_of(cache, p.key, batch, columns, columns < s.len_k)
        for head_chunk in tl.static_range(HEAD_CHUNKS):
            at = head_chunk * HEAD + tl.arange(0, HEAD)
            query = load_at(query_base, query_offsets, exists, at, p.query.col, p.head_dim)
            keys = load_at(key_base, key_offsets, present, at, p.key.col, p.head_dim)
            product = multiply(query, tl.trans(keys), product, PRECISION)
        scores, keep, _ = finish_scores(p, s, product, batch, heads[:, None], queries[:, None], columns[None, :], True)
        scores = tl.where(keep, scores, float("-inf"))
        before = maximum
        maximum = tl.maximum(before, tl.max(scores, 1))
        reference = tl.where(maximum == float("-inf"), 0.0, maximum)
        weights = tl.where(keep, weigh(p, scores - reference[:, None], EXACT), 0.0)
        factor = weigh(p, before - reference, EXACT)
        total = total * factor + tl.sum(weights, 1)
        value_offsets, present = place_of(cache, p.value, batch, columns, columns < s.len_k)
        values = load_at(value_base, value_offsets, present, value_columns, p.value.col, p.value_head_dim)
        output = output * factor[:, None]
        if KEPT:
            output = multiply_kept(weights, keep, values, output, TYPE, PRECISION)
        else:
            output = multiply(narrowed(weights, TYPE), values, output, PRECISION)
    return output, maximum, total


@triton.jit
def attention_decode_kernel(p, cache, maxima, sums, outputs, num_chunks, num_tiles, value_chunks, num_kv_heads,
                            CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD: tl.constexpr,
                            HEAD_CHUNKS: tl.constexpr, VALUE: tl.constexpr, EXACT: tl.constexpr,
                            PRECISION: tl.constexpr):
    """Program: (batch, key head, tile of rows, chunk of the values' columns, chunk of keys): one partial result."""
    part = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    task = tl.program_id(0) // num_chunks
    value_chunk = task % value_chunks
    task = task // value_chunks
    tile = task % num_tiles
    task = task // num_tiles
    kv_head = task % num_kv_heads
    batch = task // num_kv_heads
    length = length_of(cache, batch)
    if (chunk * CHUNK < length) & (chunk >= first_chunk_of(p, length, CHUNK)):
        in_tile = tl.arange(0, BLOCK_M)
        in_group = tile * BLOCK_M + in_tile
        exists = in_group < p.group * p.max_q
        heads = kv_head * p.group + tl.where(exists, in_group // p.max_q, 0)
        queries = tl.where(exists, in_group % p.max_q, p.max_q)  # a row that does not exist takes no key
        s = Sequence(0, 0, tl.cast(p.max_q, tl.int32), length, length - p.max_q)
        query_offsets = heads.to(tl.int64) * p.query.head + queries.to(tl.int64) * p.query.row
        query_base = p.query.data + batch.to(tl.int64) * p.query.batch
        key_base = p.key.data + kv_head.to(tl.int64) * p.key.head
        value_base = p.value.data + kv_head.to(tl.int64) * p.value.head
        value_columns = value_chunk * VALUE + tl.arange(0, VALUE)
        tile_rows = (query_base, query_offsets, exists, heads, queries)
        state = _take_chunk(p, s, cache, tile_rows, key_base, value_base, batch, chunk, value_columns, False, CHUNK,
                            BLOCK_M, BLOCK_N, HEAD, HEAD_CHUNKS, VALUE, EXACT, PRECISION)
        output, maximum, total = state
        if not all_finite(output):
            state = _take_chunk(p, s, cache, tile_rows, key_base, value_base, batch, chunk, value_columns, True, CHUNK,
                                BLOCK_M, BLOCK_N, HEAD, HEAD_CHUNKS, VALUE, EXACT, PRECISION)
            output, maximum, total = state
        tl.store(maxima + part * BLOCK_M + in_tile, maximum)
        tl.store(sums + part * BLOCK_M + in_tile, total)
        tl.store(outputs + (part * BLOCK_M + in_tile)[:, None] * VALUE + tl.arange(0, VALUE)[None, :], output)


@triton.jit
def attention_decode_fold_kernel(p, cache, maxima, sums, outputs, output, lse, num_chunks, num_tiles, value_chunks,
                                 num_kv_heads, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, VALUE: tl.constexpr,
                                 EXACT: tl.constexpr):
    """Program: (batch, key head, tile of rows, chunk of the values' columns)."""
    task = tl.program_id(0)
    first_part = task.to(tl.int64) * num_chunks
    value_chunk = task % value_chunks
    task = task // value_chunks
    tile = task % num_tiles
    task = task // num_tiles
    kv_head = task % num_kv_heads
    batch = task // num_kv_heads
    length = length_of(cache, batch)
    in_tile = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, VALUE)
    result = tl.zeros((BLOCK_M, VALUE), tl.float32)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for chunk in range(first_chunk_of(p, length, CHUNK), (length + CHUNK - 1) // CHUNK):
        at = (first_part + chunk) * BLOCK_M + in_tile
        part_maximum = tl.load(maxima + at)
        before = maximum
        maximum = tl.maximum(before, part_maximum)
        reference = tl.where(maximum == float("-inf"), 0.0, maximum)
        factor, gained = weigh(p, before - reference, EXACT), weigh(p, part_maximum - reference, EXACT)
        total = total * factor + tl.load(sums + at) * gained
        part_output = tl.load(outputs + at[:, None] * VALUE + columns[None, :])
        result = result * factor[:, None] + part_output * gained[:, None]

    in_group = tile * BLOCK_M + in_tile
    exists = in_group < p.group * p.max_q
    heads, queries = kv_head * p.group + tl.where(exists, in_group // p.max_q, 0), in_group % p.max_q
    result, log_sum = finish_rows(p, result, maximum, total, heads)
    row_offsets = batch.to(tl.int64) * output.batch + heads.to(tl.int64) * output.head
    row_offsets += queries.to(tl.int64) * output.row
    value_columns = value_chunk * VALUE + columns
    addresses = output.data + row_offsets[:, None] + value_columns.to(tl.int64)[None, :] * output.col
    inside = exists[:, None] & (value_columns < p.value_head_dim)[None, :]
    tl.store(addresses, narrowed(result, output.data.dtype.element_ty), mask=inside)
    if value_chunk == 0:
        lse_offsets = batch.to(tl.int64) * lse.batch + heads.to(tl.int64) * lse.head + queries.to(tl.int64) * lse.row
        tl.store(lse.data + lse_offsets, log_sum, mask=exists)


@triton.jit
def attention_append_kernel(cache, t, new, length, num_columns, num_kv_heads, row_blocks, column_blocks,
                            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Program: (batch, key head, block of new tokens, block of columns): copied to where the entry's length points."""
    task = tl.program_id(0)
    columns = task % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    task = task // column_blocks
    tokens = task % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    task = task // row_blocks
    kv_head = task % num_kv_heads
    batch = task // num_kv_heads
    keys = tl.maximum(tl.load(cache.seqlens + batch).to(tl.int64), 0) + tokens
    offsets, exists = place_of(cache, t, batch, keys, (tokens < length) & (keys < cache.capacity))
    source = new.data + batch.to(tl.int64) * new.batch + kv_head.to(tl.int64) * new.head
    values = load_at(source, tokens.to(tl.int64) * new.row, exists, columns, new.col, num_columns)
    target = t.data + kv_head.to(tl.int64) * t.head + offsets[:, None] + columns.to(tl.int64)[None, :] * t.col
    tl.store(target, values, mask=exists[:, None] & (columns < num_columns)[None, :])


# ---- host ----


def _cache_of(key_cache: Tensor, seqlens: Tensor, block_table: Tensor | None, num_new: int) -> Cache:
    if block_table is None:
        capacity = key_cache.shape[2]
        return Cache(seqlens.contiguous(), num_new, capacity, None, 1, max(capacity, 1), key_cache.shape[0])
    blocks, block_size = key_cache.shape[:2]
    max_blocks = block_table.shape[1]
    return Cache(seqlens.contiguous(), num_new, max_blocks * block_size, block_table.contiguous(), max_blocks,
                 block_size, blocks)


def _by_head(cache: Tensor, block_table: Tensor | None) -> Tensor:
    """A cache with its heads in front of its rows: [B | blocks, Hkv, rows, D]."""
    return cache if block_table is None else cache.transpose(1, 2)


def decode_attention_append(key_cache: Tensor, value_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None,
                            new_key: Tensor, new_value: Tensor) -> None:
    """Writes new keys and values [B, Hkv, Lnew, D | Dv] into the caches, from each entry's own length on."""
    batch, kv_heads, length, _ = new_key.shape
    check_append(key_cache, value_cache, new_key, new_value)
    cache = _cache_of(key_cache, cache_seqlens, block_table, length)
    for target, new in ((key_cache, new_key), (value_cache, new_value)):
        row_blocks, column_blocks = triton.cdiv(length, COPY_ROWS), triton.cdiv(new.shape[3], COPY_COLUMNS)
        launch(attention_append_kernel, (batch * kv_heads * row_blocks * column_blocks,), Launch(4),
               target.device, cache=cache, t=view(_by_head(target, block_table)), new=view(new), length=length,
               num_columns=new.shape[3], num_kv_heads=kv_heads, row_blocks=row_blocks, column_blocks=column_blocks,
               BLOCK_M=COPY_ROWS, BLOCK_N=COPY_COLUMNS)


def decode_attention_forward(query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_seqlens: Tensor,
                             block_table: Tensor | None, bias: Tensor | None, alibi_slopes: Tensor | None,
                             sinks: Tensor | None, num_new: int, scale: float, window_left: int,
                             softcap: float) -> tuple[Tensor, Tensor]:
    """output [B, Hq, Lq, Dv], lse [B, Hq, Lq]; the schema is csrc/attention_decode.cpp's."""
    batch, heads, length, _ = query.shape
    keys, values = _by_head(key_cache, block_table), _by_head(value_cache, block_table)
    kv_heads = keys.shape[1]
    cache = _cache_of(key_cache, cache_seqlens, block_table, num_new)
    problem = decode_problem(
        query, keys, values, bias, alibi_slopes, sinks, cache.capacity, scale, window_left, softcap
    )
    output = heads_together("decode_attention", query, heads, length, value_cache.shape[3])
    lse = allocate("decode_attention", query, batch, heads, length, dtype=torch.float32)
    if lse.numel() == 0:
        return output, lse

    options, tile = tile_options("decode", query, value_cache, problem)
    rows = problem.group * length
    options["BLOCK_M"] = min(LARGEST_TILE, max(options["BLOCK_M"], triton.next_power_of_2(rows)))
    value_chunks = options.pop("VALUE_CHUNKS")
    tiles, chunks = triton.cdiv(rows, options["BLOCK_M"]), triton.cdiv(cache.capacity, CHUNK_KEYS)
    tasks = batch * kv_heads * tiles * value_chunks
    parts = (tasks * chunks, options["BLOCK_M"])
    maxima, sums = (allocate("decode_attention", query, *parts, dtype=torch.float32) for _ in range(2))
    outputs = allocate("decode_attention", query, *parts, options["VALUE"], dtype=torch.float32)
    shared = {
        "p": problem, "cache": cache, "maxima": maxima, "sums": sums, "outputs": outputs, "num_chunks": chunks,
        "num_tiles": tiles, "value_chunks": value_chunks, "num_kv_heads": kv_heads, "CHUNK": CHUNK_KEYS,
    }
    launch(attention_decode_kernel, (tasks * chunks,), tile.row, query.device, **shared, **options)
    names = ("BLOCK_M", "VALUE", "EXACT")
    launch(attention_decode_fold_kernel, (tasks,), Launch(4), query.device, **shared,
           output=view(output), lse=view(lse), **{name: options[name] for name in names})
    return output, lse
