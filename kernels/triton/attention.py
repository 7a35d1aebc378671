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
    sequence_of,
    some_excluded,
    store_rows,
    weigh,
)
from .launch import launch
from .versions import narrowed


@triton.jit
def _take_keys(p, s, state, query, bases, batch, head, rows, value_columns, start, stop, EDGES: tl.constexpr,
               KEPT: tl.constexpr,
               BLOCK_N: tl.constexpr, HEAD: tl.constexpr, HEAD_CHUNKS: tl.constexpr, EXACT: tl.constexpr,
               PRECISION: tl.constexpr):
    """The state (output, maximum, sum) after blocks of keys [start, stop)."""
    output, maximum, total = state
    query_base, key_base, value_base = bases
    GUARDED: tl.constexpr = EDGES or (p.mask is not None) or (p.bias is not None)
    TYPE: tl.constexpr = p.value.data.dtype.element_ty
    for key in range(start, stop, BLOCK_N):
        columns = key + tl.arange(0, BLOCK_N)
        product = products(query, query_base, p.query, rows, s.len_q, key_base, p.key, columns, s.len_k, p.head_dim,
                           HEAD, HEAD_CHUNKS, PRECISION)
        scores, keep, _ = finish_scores(p, s, product, batch, head, rows[:, None], columns[None, :], EDGES)
        if GUARDED:
            scores = tl.where(keep, scores, float("-inf"))
        before = maximum
        maximum = tl.maximum(before, tl.max(scores, 1))
        reference = tl.where(maximum == float("-inf"), 0.0, maximum)  # no key yet, or scores of -inf: weights of 0
        weights = weigh(p, scores - reference[:, None], EXACT)
        if GUARDED:
            weights = tl.where(keep, weights, 0.0)
        factor = weigh(p, before - reference, EXACT)
        total = total * factor + tl.sum(weights, 1)
        output = output * factor[:, None]
        if p.dropout_seed is not None:
            weights = tl.where(kept_draws(p, batch, head, rows, key, BLOCK_N), weights, 0.0)
        values = load_rows(value_base, p.value, columns, s.len_k, value_columns, p.value_head_dim)
        if KEPT:
            output = multiply_kept(weights, keep, values, output, TYPE, PRECISION)
        else:
            output = multiply(narrowed(weights, TYPE), values, output, PRECISION)
    return output, maximum, total


@triton.jit
def attention_forward_kernel(p, output, lse, num_blocks, value_chunks, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                             HEAD: tl.constexpr, HEAD_CHUNKS: tl.constexpr, VALUE: tl.constexpr, EXACT: tl.constexpr,
                             PRECISION: tl.constexpr):
    """Program: (sequence, head, chunk of the values' columns, block of queries), the longest causal blocks first."""
    task = tl.program_id(0)
    block = num_blocks - 1 - task % num_blocks
    task = task // num_blocks
    chunk = task % value_chunks
    task = task // value_chunks
    head = task % p.num_heads
    batch = task // p.num_heads
    s = sequence_of(p, batch)
    first = block * BLOCK_M
    if first < s.len_q:
        rows = first + tl.arange(0, BLOCK_M)
        query_base = base_of(p.query, batch, head, s.first_q)
        bases = (query_base, base_of(p.key, batch, head // p.group, s.first_k),
                 base_of(p.value, batch, head // p.group, s.first_k))
        value_columns = chunk * VALUE + tl.arange(0, VALUE)
        query = load_rows(query_base, p.query, rows, s.len_q, tl.arange(0, HEAD), p.head_dim)
        start, full_start, full_stop, stop = keys_of_rows(p, s, first, tl.minimum(first + BLOCK_M, s.len_q), BLOCK_N)
        nothing = (tl.zeros((BLOCK_M, VALUE), tl.float32), tl.full((BLOCK_M,), float("-inf"), tl.float32),
                   tl.zeros((BLOCK_M,), tl.float32))
        state = nothing
        if p.window_left is not None:
            state = _take_keys(p, s, state, query, bases, batch, head, rows, value_columns, start,
                               tl.minimum(full_start, stop), True, False, BLOCK_N, HEAD, HEAD_CHUNKS, EXACT, PRECISION)
        state = _take_keys(p, s, state, query, bases, batch, head, rows, value_columns, full_start, full_stop, False,
                           False, BLOCK_N, HEAD, HEAD_CHUNKS, EXACT, PRECISION)
        state = _take_keys(p, s, state, query, bases, batch, head, rows, value_columns, full_stop, stop, True,
                           False, BLOCK_N, HEAD, HEAD_CHUNKS, EXACT, PRECISION)
        result, maximum, total = state
        if some_excluded(p):
            if not all_finite(result):
                result, maximum, total = _take_keys(p, s, nothing, query, bases, batch, head, rows, value_columns,
                                                    start, stop, True, True, BLOCK_N, HEAD, HEAD_CHUNKS, EXACT,
                                                    PRECISION)

        result, log_sum = finish_rows(p, result, maximum, total, head)
        store_rows(base_of(output, batch, head, s.first_q), output, rows, s.len_q, value_columns, p.value_head_dim,
                   result)
        if chunk == 0:
            lse_base = base_of(lse, batch, head, s.first_q)
            tl.store(lse_base + rows.to(tl.int64) * lse.row, log_sum, mask=rows < s.len_q)


def attention_forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None,
                      seqlens_k: Tensor | None, *options) -> tuple[Tensor, Tensor]:
    """output [B, Hq, Lq, Dv], lse [B, Hq, Lq]; the schema is csrc/attention.cpp's. bias and mask are expanded."""
    batch, heads, len_q, _ = query.shape
    problem = dense_problem(query, key, value, bias, mask, seqlens_k, *options)
    output = heads_together("attention", query, heads, len_q, value.shape[3])
    lse = allocate("attention", query, batch, heads, len_q, dtype=torch.float32)
    _launch_forward(problem, batch, view(output), view(lse), query, value)
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
    _launch_forward(problem, cu_q.shape[0] - 1, packed_view(output), packed_view(lse.mT), query, value)
    return output, lse


def _launch_forward(problem, sequences: int, output, lse, query: Tensor, value: Tensor) -> None:
    options, row = tile_options("forward", query, value)
    value_chunks = options.pop("VALUE_CHUNKS")
    blocks = triton.cdiv(problem.max_q, options["BLOCK_M"])
    grid = (blocks * value_chunks * problem.num_heads * sequences,)
    launch(attention_forward_kernel, grid, row, query.device, p=problem, output=output, lse=lse, num_blocks=blocks,
           value_chunks=value_chunks, **options)
