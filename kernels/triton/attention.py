"""Attention forward: softmax(scores) V over blocks of keys, no matrix of Lq x Lk anywhere.

A program takes a block of queries of one head and walks the blocks of keys that some of its rows see: scores, running
maximum, weights, sum, output (Milakov and Gimelshein, 2018; Dao et al., 2022). Blocks that every row sees whole are
walked without predicates. Dropout acts on weights that are already summed, a sink joins the sum at the end.
Policy: attention_scores.py. Sums are float32, weights are rounded to the values' dtype where that has 16 bits. Above
WIDEST columns products are split into chunks of the head dimension, and programs share the columns of the output.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_problem import allocate, dense_problem, heads_together, packed_problem, packed_view, tile_options, view
from .attention_scores import (
    Matrix,
    all_finite,
    base_of,
    finish_rows,
    finish_scores,
    kept_draws,
    keys_of_rows,
    load_rows,
    multiply,
    multiply_kept,
    products,
    selects,
    sequence_of,
    some_excluded,
    store_rows,
    weigh,
)
from .launch import launch
from .versions import narrowed


@triton.jit
def _take_keys(p, s, state, query, matrices, batch, head, row, value_column, start, stop, EDGES: tl.constexpr,
               KEPT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD: tl.constexpr,
               HEAD_CHUNKS: tl.constexpr, VALUE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """The state (output, maximum, sum) of a block of rows after blocks of keys [start, stop)."""
    output, maximum, total = state
    queries, keys, values = matrices
    TYPE: tl.constexpr = p.value.data.dtype.element_ty
    rows = row + tl.arange(0, BLOCK_M)
    for key in range(start, stop, BLOCK_N):
        columns = key + tl.arange(0, BLOCK_N)
        product = products(query, queries, row, BLOCK_M, keys, key, BLOCK_N, HEAD, HEAD_CHUNKS, not EDGES, PRECISION)
        scores, keep, _ = finish_scores(p, s, product, batch, head, rows[:, None], columns[None, :], EDGES)
        if selects(p, EDGES):
            scores = tl.where(keep, scores, float("-inf"))
        before = maximum
        maximum = tl.maximum(before, tl.max(scores, 1))
        reference = tl.where(maximum == float("-inf"), 0.0, maximum)  # no key yet, or scores of -inf: weights of 0
        weights = weigh(p, scores - reference[:, None], EXACT)
        factor = weigh(p, before - reference, EXACT)
        total = total * factor + tl.sum(weights, 1)
        output = output * factor[:, None]
        if p.dropout_seed is not None:
            weights = tl.where(kept_draws(p, batch, head, rows, key, BLOCK_N), weights, 0.0)
        tile = load_rows(values, key, BLOCK_N, value_column, VALUE, not EDGES)
        if KEPT:
            output = multiply_kept(weights, keep, tile, output, TYPE, PRECISION)
        else:
            output = multiply(narrowed(weights, TYPE), tile, output, PRECISION)
    return output, maximum, total


@triton.jit
def attention_forward_kernel(p, output, lse, key_tiles, value_tiles, num_blocks, value_chunks, BLOCK_M: tl.constexpr,
                             BLOCK_N: tl.constexpr, HEAD: tl.constexpr, HEAD_CHUNKS: tl.constexpr,
                             VALUE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """Program: (sequence, head, chunk of the values' columns, block of queries), the longest causal blocks first."""
    task = tl.program_id(0)
    block = num_blocks - 1 - task % num_blocks
    task = task // num_blocks
    chunk = task % value_chunks
    task = task // value_chunks
    head = task % p.num_heads
    batch = task // p.num_heads
    s = sequence_of(p, batch)
    row = block * BLOCK_M
    if row < s.len_q:
        entry = batch if p.offsets_k is None else 0  # sequences that are packed lie in one
        queries = Matrix(p.query, entry, head, s.first_q, s.len_q, p.head_dim, None)
        matrices = (queries, Matrix(p.key, entry, head // p.group, s.first_k, s.len_k, p.head_dim, key_tiles),
                    Matrix(p.value, entry, head // p.group, s.first_k, s.len_k, p.value_head_dim, value_tiles))
        column = chunk * VALUE
        query = load_rows(queries, row, BLOCK_M, 0, HEAD, False)
        start, full_start, full_stop, stop = keys_of_rows(p, s, row, tl.minimum(row + BLOCK_M, s.len_q), BLOCK_N)
        nothing = (tl.zeros((BLOCK_M, VALUE), tl.float32), tl.full((BLOCK_M,), float("-inf"), tl.float32),
                   tl.zeros((BLOCK_M,), tl.float32))
        state = nothing
        if p.window_left is not None:
            state = _take_keys(p, s, state, query, matrices, batch, head, row, column, start,
                               tl.minimum(full_start, stop), True, False, BLOCK_M, BLOCK_N, HEAD, HEAD_CHUNKS, VALUE,
                               EXACT, PRECISION)
        state = _take_keys(p, s, state, query, matrices, batch, head, row, column, full_start, full_stop, False,
                           False, BLOCK_M, BLOCK_N, HEAD, HEAD_CHUNKS, VALUE, EXACT, PRECISION)
        state = _take_keys(p, s, state, query, matrices, batch, head, row, column, full_stop, stop, True,
                           False, BLOCK_M, BLOCK_N, HEAD, HEAD_CHUNKS, VALUE, EXACT, PRECISION)
        result, maximum, total = state
        if some_excluded(p):
            if not (all_finite(result) & all_finite(total[:, None])):  # dropout hides a weight from the result
                result, maximum, total = _take_keys(p, s, nothing, query, matrices, batch, head, row, column, start,
                                                    stop, True, True, BLOCK_M, BLOCK_N, HEAD, HEAD_CHUNKS, VALUE,
                                                    EXACT, PRECISION)

        result, log_sum = finish_rows(p, result, maximum, total, head)
        store_rows(Matrix(output, batch, head, s.first_q, s.len_q, p.value_head_dim, None), row, column, result)
        if chunk == 0:
            rows = row + tl.arange(0, BLOCK_M)
            lse_base = base_of(lse, batch, head, s.first_q)
            tl.store(lse_base + rows.to(tl.int64) * lse.row, log_sum, mask=rows < s.len_q)


def attention_forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None,
                      seqlens_k: Tensor | None, *options) -> tuple[Tensor, Tensor]:
    """output [B, Hq, Lq, Dv], lse [B, Hq, Lq]; the schema is csrc/attention.cpp's. bias and mask are expanded."""
    batch, heads, len_q, _ = query.shape
    problem = dense_problem(query, key, value, bias, mask, seqlens_k, *options)
    output = heads_together("attention", query, heads, len_q, value.shape[3])
    lse = allocate("attention", query, batch, heads, len_q, dtype=torch.float32)
    _launch_forward(problem, batch, view(output), view(lse), query, key, value)
    return output, lse


def varlen_attention_forward(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor,
                             bias: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
                             dropout_seed: Tensor | None, max_q: int, max_k: int, *numbers) -> tuple[Tensor, Tensor]:
    """output [tokens_q, Hq, Dv], lse [Hq, tokens_q]."""
    problem = packed_problem(
        query, key, value, cu_q, cu_k, bias, alibi_slopes, sinks, dropout_seed, max_q, max_k, *numbers
    )
    output = allocate("varlen_attention", query, *query.shape[:2], value.shape[2])
    lse = allocate("varlen_attention", query, query.shape[1], query.shape[0], dtype=torch.float32)
    of_heads = (t.transpose(0, 1)[None] for t in (query, key, value))
    _launch_forward(problem, cu_q.shape[0] - 1, packed_view(output), packed_view(lse.mT), *of_heads)
    return output, lse


def _launch_forward(problem, sequences: int, output, lse, query: Tensor, key: Tensor, value: Tensor) -> None:
    """query, key and value are [B, H, L, D], or [1, H, tokens, D]."""
    options, tile = tile_options("forward", query, value, problem)
    value_chunks = options.pop("VALUE_CHUNKS")
    blocks = triton.cdiv(problem.max_q, options["BLOCK_M"])
    grid = (blocks * value_chunks * problem.num_heads * sequences,)
    launch(attention_forward_kernel, grid, tile.row, query.device, p=problem, output=output, lse=lse,
           key_tiles=tile.descriptor_of(key, options["BLOCK_N"], options["HEAD"]),
           value_tiles=tile.descriptor_of(value, options["BLOCK_N"], options["VALUE"]), num_blocks=blocks,
           value_chunks=value_chunks, **options)
