"""Attention backward by owners: each gradient is summed by the one program that writes it, in one order, no atomics.

    P = softmax(scores)       D = 1 / (1 - p) where dropout keeps, else 0
    dV = (P * D)^T dO         dP = D * (dO V^T)
    dS = P * (dP - delta)     delta = sum of dO * O, less the gradient of lse
    dbias = dS                dslope = -dS * distance        dsink = -P_sink * delta
    dR = dS * cap_slope       dQ = scale * dR K              dK = scale * dR^T Q

Three kernels in order. The first owns blocks of queries: dQ, and the parts of dslope and dsink. It also leaves what the
others need of each row: delta, a reference that scores are taken relative to, the normaliser of their exponentials.
The second owns blocks of keys: dK and dV, heads of a group and queries in order; a bias as large as the scores gets its
gradient there. The third owns blocks of a broadcast bias. What programs leave as parts is added in order by a fourth.
Policy: attention_scores.py. lse is rounded at the size of the largest logit, and exp(score - lse) would carry that
rounding, 5e-4 at logits of 1e4: it only serves as a reference, and the weights are divided by their own sum. Rows of
logits so large that the rounding could overflow find their maximum again. Likewise delta: that of the rounded output
serves dQ (which float32 corrects), and the sum of dS that it leaves corrects it for the other gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_problem import (
    allocate,
    dense_problem,
    excludes_pairs,
    heads_together,
    packed_problem,
    packed_view,
    tile_options,
    view,
)
from .attention_scores import (
    Matrix,
    all_finite,
    base_of,
    distance,
    finish_scores,
    kept_draws,
    keys_of_rows,
    load_rows,
    multiply,
    multiply_kept,
    products,
    rows_of_keys,
    selects,
    sequence_of,
    some_excluded,
    store_rows,
    weigh,
)
from .launch import Launch, launch
from .versions import narrowed, widened

HUGE_LOGIT = tl.constexpr(32768.0)  # the rounding of lse then is 2^-10: far from where exp(score - lse) overflows
LSE_ROUNDING = tl.constexpr(2.0**-20)  # a few ulp
SUM_BLOCK = 1024


@triton.jit
def load_statistic(t, batch, head, first_row, rows, num_rows):
    """The rows' entries of a [B, H, L] tensor, 0 beyond."""
    return tl.load(base_of(t, batch, head, first_row) + rows.to(tl.int64) * t.row, mask=rows < num_rows, other=0.0)


@triton.jit
def _maximum_of_rows(p, s, query, queries, keys, batch, head, row, start, stop, BLOCK_M: tl.constexpr,
                     BLOCK_N: tl.constexpr, HEAD: tl.constexpr, HEAD_CHUNKS: tl.constexpr, PRECISION: tl.constexpr):
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    rows = row + tl.arange(0, BLOCK_M)
    for key in range(start, stop, BLOCK_N):
        columns = key + tl.arange(0, BLOCK_N)
        product = products(query, queries, row, BLOCK_M, keys, key, BLOCK_N, HEAD, HEAD_CHUNKS, False, PRECISION)
        scores, keep, _ = finish_scores(p, s, product, batch, head, rows[:, None], columns[None, :], True)
        maximum = tl.maximum(maximum, tl.max(tl.where(keep, scores, float("-inf")), 1))
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _differentiate_keys(p, s, state, tiles, matrices, reference, delta, batch, head, row, out_column, start, stop,
                        EDGES: tl.constexpr, KEPT: tl.constexpr, SLOPES: tl.constexpr, BLOCK_M: tl.constexpr,
                        BLOCK_N: tl.constexpr, HEAD: tl.constexpr, HEAD_CHUNKS: tl.constexpr, VALUE: tl.constexpr,
                        VALUE_CHUNKS: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """The state after blocks of keys [start, stop), not normalised: dQ, sums of weights and of dS, for dslope those of
    dS * distance and of weights * distance, and where EXACT that of weights * cap_slope * K."""
    grad_query, total, grad_total, grad_slope, distances, weighted_keys = state
    query, grad = tiles
    queries, grads, keys, values = matrices
    TYPE: tl.constexpr = p.key.data.dtype.element_ty
    rows = row + tl.arange(0, BLOCK_M)
    for key in range(start, stop, BLOCK_N):
        columns = key + tl.arange(0, BLOCK_N)
        product = products(query, queries, row, BLOCK_M, keys, key, BLOCK_N, HEAD, HEAD_CHUNKS, not EDGES, PRECISION)
        scores, keep, cap_slope = finish_scores(p, s, product, batch, head, rows[:, None], columns[None, :], EDGES)
        if selects(p, EDGES):
            scores = tl.where(keep, scores, float("-inf"))
        weights = weigh(p, scores - reference[:, None], EXACT)
        if selects(p, EDGES):
            weights = tl.where(keep, weights, 0.0)
        total += tl.sum(weights, 1)
        grad_weights = products(grad, grads, row, BLOCK_M, values, key, BLOCK_N, VALUE, VALUE_CHUNKS, not EDGES,
                                PRECISION)
        if p.dropout_seed is not None:
            draws = kept_draws(p, batch, head, rows, key, BLOCK_N)
            grad_weights = tl.where(draws, grad_weights * p.dropout_scale, 0.0)
        grad_scores = weights * (grad_weights - delta[:, None])
        if selects(p, EDGES):
            grad_scores = tl.where(keep, grad_scores, 0.0)  # V at an excluded key may be anything
        grad_total += tl.sum(grad_scores, 1)
        if SLOPES:
            grad_slope -= tl.sum(grad_scores * distance(s, rows[:, None], columns[None, :]), 1)
            distances += tl.sum(weights * distance(s, rows[:, None], columns[None, :]), 1)
        if p.softcap is not None:
            grad_scores = grad_scores * cap_slope
            weights = weights * cap_slope
            if selects(p, EDGES):
                grad_scores = tl.where(keep, grad_scores, 0.0)
                weights = tl.where(keep, weights, 0.0)
        tile = load_rows(keys, key, BLOCK_N, out_column, HEAD, not EDGES)
        if KEPT:
            grad_query = multiply_kept(grad_scores, keep, tile, grad_query, TYPE, PRECISION)
            if EXACT:
                weighted_keys = multiply_kept(weights, keep, tile, weighted_keys, TYPE, PRECISION)
        else:
            grad_query = multiply(narrowed(grad_scores, TYPE), tile, grad_query, PRECISION)
            if EXACT:
                weighted_keys = multiply(weights, tile, weighted_keys, PRECISION)
    return grad_query, total, grad_total, grad_slope, distances, weighted_keys


@triton.jit
def attention_backward_query_kernel(p, grad_output, output, lse, grad_lse, grad_query, references, normalisers, deltas,
                                    slope_parts, sink_parts, key_tiles, value_tiles, num_blocks, head_chunks, scale,
                                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD: tl.constexpr,
                                    HEAD_CHUNKS: tl.constexpr, VALUE: tl.constexpr, VALUE_CHUNKS: tl.constexpr,
                                    EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """Program: (sequence, head, chunk of the query's columns, block of queries). Parts are [programs of chunk 0]."""
    task = tl.program_id(0)
    block = num_blocks - 1 - task % num_blocks
    task = task // num_blocks
    chunk = task % head_chunks
    task = task // head_chunks
    head = task % p.num_heads
    batch = task // p.num_heads
    s = sequence_of(p, batch)
    row = block * BLOCK_M
    part = (batch * p.num_heads + head).to(tl.int64) * num_blocks + block
    if row < s.len_q:
        rows = row + tl.arange(0, BLOCK_M)
        kv_head = head // p.group
        entry = batch if p.offsets_k is None else 0  # sequences that are packed lie in one
        queries = Matrix(p.query, entry, head, s.first_q, s.len_q, p.head_dim, None)
        grads = Matrix(grad_output, entry, head, s.first_q, s.len_q, p.value_head_dim, None)
        outputs = Matrix(output, entry, head, s.first_q, s.len_q, p.value_head_dim, None)
        keys = Matrix(p.key, entry, kv_head, s.first_k, s.len_k, p.head_dim, key_tiles)
        values = Matrix(p.value, entry, kv_head, s.first_k, s.len_k, p.value_head_dim, value_tiles)
        query = load_rows(queries, row, BLOCK_M, 0, HEAD, False)
        grad = load_rows(grads, row, BLOCK_M, 0, VALUE, False)
        delta = tl.zeros((BLOCK_M,), tl.float32)
        for value_chunk in tl.static_range(VALUE_CHUNKS):
            of_grad = load_rows(grads, row, BLOCK_M, value_chunk * VALUE, VALUE, False)
            of_output = load_rows(outputs, row, BLOCK_M, value_chunk * VALUE, VALUE, False)
            delta += tl.sum(widened(of_grad) * widened(of_output), 1)
        of_lse = tl.zeros((BLOCK_M,), tl.float32)
        if grad_lse is not None:
            of_lse = load_statistic(grad_lse, batch, head, s.first_q, rows, s.len_q)
        delta -= of_lse

        log_sum = load_statistic(lse, batch, head, s.first_q, rows, s.len_q)
        start, full_start, full_stop, stop = keys_of_rows(p, s, row, tl.minimum(row + BLOCK_M, s.len_q), BLOCK_N)
        reference = tl.where(log_sum == float("-inf"), 0.0, log_sum / p.logit_scale)
        huge = (tl.abs(log_sum) > HUGE_LOGIT) & (tl.abs(log_sum) < float("inf"))
        if tl.max(huge.to(tl.int32), 0) > 0:
            maximum = _maximum_of_rows(p, s, query, queries, keys, batch, head, row, start, stop, BLOCK_M, BLOCK_N,
                                       HEAD, HEAD_CHUNKS, PRECISION)
            reference = tl.where(huge, maximum, reference)

        column = chunk * HEAD
        tiles = (query, grad)
        matrices = (queries, grads, keys, values)
        SLOPES: tl.constexpr = slope_parts is not None
        none = tl.zeros((BLOCK_M,), tl.float32)
        no_query = tl.zeros((BLOCK_M, HEAD), tl.float32)
        no_keys = none
        if EXACT:
            no_keys = no_query
        nothing = (no_query, none, none, none, none, no_keys)
        state = nothing
        if p.window_left is not None:
            state = _differentiate_keys(p, s, state, tiles, matrices, reference, delta, batch, head, row, column,
                                        start, tl.minimum(full_start, stop), True, False, SLOPES, BLOCK_M, BLOCK_N,
                                        HEAD, HEAD_CHUNKS, VALUE, VALUE_CHUNKS, EXACT, PRECISION)
        state = _differentiate_keys(p, s, state, tiles, matrices, reference, delta, batch, head, row, column,
                                    full_start, full_stop, False, False, SLOPES, BLOCK_M, BLOCK_N, HEAD, HEAD_CHUNKS,
                                    VALUE, VALUE_CHUNKS, EXACT, PRECISION)
        state = _differentiate_keys(p, s, state, tiles, matrices, reference, delta, batch, head, row, column,
                                    full_stop, stop, True, False, SLOPES, BLOCK_M, BLOCK_N, HEAD, HEAD_CHUNKS, VALUE,
                                    VALUE_CHUNKS, EXACT, PRECISION)
        result, total, grad_total, grad_slope, distances, weighted_keys = state
        if some_excluded(p):
            if not all_finite(result):
                state = _differentiate_keys(p, s, nothing, tiles, matrices, reference, delta, batch, head, row, column,
                                            start, stop, True, True, SLOPES, BLOCK_M, BLOCK_N, HEAD, HEAD_CHUNKS,
                                            VALUE, VALUE_CHUNKS, EXACT, PRECISION)
                result, total, grad_total, grad_slope, distances, weighted_keys = state

        # lse is that of these very keys, or of more keys when a longer row was computed in parts (ring attention): then
        # it is P's true normaliser. The weight of this part tells the two apart.
        share = tl.zeros((BLOCK_M,), tl.float32)
        whole_sum = total
        if p.sinks is not None:
            share = tl.exp(tl.load(p.sinks + head) - reference * p.logit_scale)
            whole_sum = total + share
        relative = tl.where(huge, tl.exp(reference * p.logit_scale - log_sum), 1.0)
        part_of_row = relative * whole_sum
        size = tl.maximum(tl.abs(log_sum), tl.abs(reference * p.logit_scale))
        is_part = tl.abs(part_of_row - 1.0) > LSE_ROUNDING * (1.0 + size)
        normaliser = tl.where(is_part & ~(whole_sum == float("inf")), relative, 1.0 / whole_sum)
        normaliser = tl.where(total == 0, 0.0, normaliser)
        exact_delta = normaliser * grad_total + normaliser * total * delta - of_lse
        exact_delta = tl.where(is_part, delta, exact_delta)
        if EXACT:
            result -= (exact_delta - delta)[:, None] * weighted_keys
        store_rows(Matrix(grad_query, entry, head, s.first_q, s.len_q, p.head_dim, None), row, column,
                   result * (normaliser * scale)[:, None])
        if chunk == 0:
            inside = rows < s.len_q
            row64 = rows.to(tl.int64)
            tl.store(base_of(references, batch, head, s.first_q) + row64 * references.row, reference, mask=inside)
            tl.store(base_of(normalisers, batch, head, s.first_q) + row64 * normalisers.row, normaliser, mask=inside)
            tl.store(base_of(deltas, batch, head, s.first_q) + row64 * deltas.row, exact_delta, mask=inside)
            if slope_parts is not None:
                grad_slope = normaliser * (grad_slope + (exact_delta - delta) * distances)
                tl.store(slope_parts + part, tl.sum(tl.where(inside, grad_slope, 0.0), 0))
            if sink_parts is not None:
                weight = tl.where(is_part, relative * share, share / whole_sum)
                weight = tl.where(whole_sum == float("inf"), 1.0, weight)
                tl.store(sink_parts + part, -tl.sum(tl.where(inside & (share > 0), weight * exact_delta, 0.0), 0))
    elif chunk == 0:
        if slope_parts is not None:
            tl.store(slope_parts + part, 0.0)
        if sink_parts is not None:
            tl.store(sink_parts + part, 0.0)


@triton.jit
def _differentiate_rows(p, s, state, tiles, matrices, statistics, grad_bias, batch, head, key, head_column,
                        value_column, start, stop, EDGES: tl.constexpr, KEPT: tl.constexpr, BLOCK_M: tl.constexpr,
                        BLOCK_N: tl.constexpr, HEAD: tl.constexpr, HEAD_CHUNKS: tl.constexpr, VALUE: tl.constexpr,
                        VALUE_CHUNKS: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """The state (dK, dV) after blocks of rows [start, stop) of one head. Tiles are [keys, queries]."""
    grad_key, grad_value = state
    key_tile, value_tile = tiles
    keys, values, queries, grads = matrices
    references, normalisers, deltas = statistics
    TYPE: tl.constexpr = p.query.data.dtype.element_ty
    columns = key + tl.arange(0, BLOCK_N)
    for row in range(start, stop, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        reference = load_statistic(references, batch, head, s.first_q, rows, s.len_q)
        normaliser = load_statistic(normalisers, batch, head, s.first_q, rows, s.len_q)
        delta = load_statistic(deltas, batch, head, s.first_q, rows, s.len_q)
        product = products(key_tile, keys, key, BLOCK_N, queries, row, BLOCK_M, HEAD, HEAD_CHUNKS, not EDGES,
                           PRECISION)
        scores, keep, cap_slope = finish_scores(p, s, product, batch, head, rows[None, :], columns[:, None], EDGES)
        if selects(p, EDGES):
            scores = tl.where(keep, scores, float("-inf"))
        weights = weigh(p, scores - reference[None, :], EXACT) * normaliser[None, :]
        if selects(p, EDGES):
            weights = tl.where(keep, weights, 0.0)
        grad_weights = products(value_tile, values, key, BLOCK_N, grads, row, BLOCK_M, VALUE, VALUE_CHUNKS, not EDGES,
                                PRECISION)
        kept_weights = weights
        if p.dropout_seed is not None:
            draws = tl.trans(kept_draws(p, batch, head, rows, key, BLOCK_N))
            grad_weights = tl.where(draws, grad_weights * p.dropout_scale, 0.0)
            kept_weights = tl.where(draws, weights * p.dropout_scale, 0.0)
        grad_scores = weights * (grad_weights - delta[None, :])
        if selects(p, EDGES):
            grad_scores = tl.where(keep, grad_scores, 0.0)
        if grad_bias is not None:
            addresses = base_of(grad_bias, batch, head, 0) + rows.to(tl.int64)[None, :] * grad_bias.row
            addresses += columns.to(tl.int64)[:, None] * grad_bias.col
            inside = (rows < s.len_q)[None, :] & (columns < s.len_k)[:, None]
            tl.store(addresses, narrowed(grad_scores, grad_bias.data.dtype.element_ty), mask=inside)
        if p.softcap is not None:
            grad_scores = grad_scores * cap_slope
            if selects(p, EDGES):
                grad_scores = tl.where(keep, grad_scores, 0.0)
        grad_tile = load_rows(grads, row, BLOCK_M, value_column, VALUE, not EDGES)
        query_tile = load_rows(queries, row, BLOCK_M, head_column, HEAD, not EDGES)
        if KEPT:
            grad_value = multiply_kept(kept_weights, keep, grad_tile, grad_value, TYPE, PRECISION)
            grad_key = multiply_kept(grad_scores, keep, query_tile, grad_key, TYPE, PRECISION)
        else:
            grad_value = multiply(narrowed(kept_weights, TYPE), grad_tile, grad_value, PRECISION)
            grad_key = multiply(narrowed(grad_scores, TYPE), query_tile, grad_key, PRECISION)
    return grad_key, grad_value


@triton.jit
def attention_backward_key_kernel(p, grad_output, grad_key, grad_value, references, normalisers, deltas, grad_bias,
                                  query_tiles, grad_tiles, poisoned, num_blocks, num_chunks, num_kv_heads, scale,
                                  KEPT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD: tl.constexpr,
                                  HEAD_CHUNKS: tl.constexpr, VALUE: tl.constexpr, VALUE_CHUNKS: tl.constexpr,
                                  EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """Program: (sequence, key head, chunk of the columns, block of keys).

    Where pairs may be excluded, the walk over kept pairs alone is a launch of its own (KEPT), of the programs that have
    marked themselves as poisoned: in one kernel with the others its registers would be theirs, and theirs would spill.
    """
    task = tl.program_id(0)
    key = task % num_blocks * BLOCK_N
    task = task // num_blocks
    chunk = task % num_chunks
    task = task // num_chunks
    kv_head = task % num_kv_heads
    batch = task // num_kv_heads
    s = sequence_of(p, batch)
    length = s.len_k
    if p.offsets_k is None:
        length = tl.cast(p.max_k, tl.int32)  # keys beyond seqlens_k have gradients too: 0
    wanted = key < length
    if KEPT:
        wanted = wanted & (tl.load(poisoned + tl.program_id(0), mask=wanted, other=0) != 0)
    if wanted:
        entry = batch if p.offsets_k is None else 0  # sequences that are packed lie in one
        keys = Matrix(p.key, entry, kv_head, s.first_k, s.len_k, p.head_dim, None)
        values = Matrix(p.value, entry, kv_head, s.first_k, s.len_k, p.value_head_dim, None)
        tiles = (load_rows(keys, key, BLOCK_N, 0, HEAD, False), load_rows(values, key, BLOCK_N, 0, VALUE, False))
        head_column, value_column = chunk * HEAD, chunk * VALUE
        key_stop = tl.minimum(key + BLOCK_N, s.len_k)
        start, full_start, full_stop, stop = rows_of_keys(p, s, key, key_stop, BLOCK_M)
        if key + BLOCK_N > s.len_k:  # some key does not exist: no row takes them all
            full_start = start
            full_stop = start
        if key >= s.len_k:
            stop = start
        statistics = (references, normalisers, deltas)
        state = (tl.zeros((BLOCK_N, HEAD), tl.float32), tl.zeros((BLOCK_N, VALUE), tl.float32))
        for head in range(kv_head * p.group, (kv_head + 1) * p.group):
            matrices = (keys, values, Matrix(p.query, entry, head, s.first_q, s.len_q, p.head_dim, query_tiles),
                        Matrix(grad_output, entry, head, s.first_q, s.len_q, p.value_head_dim, grad_tiles))
            if KEPT:
                state = _differentiate_rows(p, s, state, tiles, matrices, statistics, grad_bias, batch, head, key,
                                            head_column, value_column, start, stop, True, True, BLOCK_M, BLOCK_N, HEAD,
                                            HEAD_CHUNKS, VALUE, VALUE_CHUNKS, EXACT, PRECISION)
            else:
                if p.window_right is not None:
                    state = _differentiate_rows(p, s, state, tiles, matrices, statistics, grad_bias, batch, head, key,
                                                head_column, value_column, start, tl.minimum(full_start, stop), True,
                                                False, BLOCK_M, BLOCK_N, HEAD, HEAD_CHUNKS, VALUE, VALUE_CHUNKS, EXACT,
                                                PRECISION)
                state = _differentiate_rows(p, s, state, tiles, matrices, statistics, grad_bias, batch, head, key,
                                            head_column, value_column, full_start, full_stop, False, False, BLOCK_M,
                                            BLOCK_N, HEAD, HEAD_CHUNKS, VALUE, VALUE_CHUNKS, EXACT, PRECISION)
                state = _differentiate_rows(p, s, state, tiles, matrices, statistics, grad_bias, batch, head, key,
                                            head_column, value_column, full_stop, stop, True, False, BLOCK_M, BLOCK_N,
                                            HEAD, HEAD_CHUNKS, VALUE, VALUE_CHUNKS, EXACT, PRECISION)
        key_result, value_result = state
        if poisoned is not None and not KEPT:
            finite = all_finite(key_result) & all_finite(value_result)
            tl.store(poisoned + tl.program_id(0), tl.where(finite, 0, 1).to(tl.uint8))
        store_rows(Matrix(grad_key, entry, kv_head, s.first_k, length, p.head_dim, None), key, head_column,
                   key_result * scale)
        store_rows(Matrix(grad_value, entry, kv_head, s.first_k, length, p.value_head_dim, None), key, value_column,
                   value_result)


@triton.jit
def attention_backward_bias_kernel(p, grad_output, grad_bias, references, normalisers, deltas, own_heads, row_blocks,
                                   column_blocks, batches_each, heads_each, rows_each, columns_each,
                                   SUM_ROWS: tl.constexpr, SUM_COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr,
                                   BLOCK_N: tl.constexpr, HEAD: tl.constexpr, HEAD_CHUNKS: tl.constexpr,
                                   VALUE: tl.constexpr, VALUE_CHUNKS: tl.constexpr, EXACT: tl.constexpr,
                                   PRECISION: tl.constexpr):
    """dS summed over what the bias is broadcast in. Program: (batch, head, block of rows, of columns) of grad_bias.

    A program walks batches_each sequences, heads_each heads, rows_each blocks of rows and columns_each of columns, in
    this order, and sums a tile over the rows or columns that it walks.
    """
    task = tl.program_id(0)
    column_block = task % column_blocks
    task = task // column_blocks
    row_block = task % row_blocks
    task = task // row_blocks
    own_head = task % own_heads
    own_batch = task // own_heads
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(batches_each):
        batch = own_batch * batches_each + i
        s = sequence_of(p, batch)
        for head in range(own_head * heads_each, (own_head + 1) * heads_each):
            kv_head = head // p.group
            entry = batch if p.offsets_k is None else 0
            queries = Matrix(p.query, entry, head, s.first_q, s.len_q, p.head_dim, None)
            grads = Matrix(grad_output, entry, head, s.first_q, s.len_q, p.value_head_dim, None)
            keys = Matrix(p.key, entry, kv_head, s.first_k, s.len_k, p.head_dim, None)
            values = Matrix(p.value, entry, kv_head, s.first_k, s.len_k, p.value_head_dim, None)
            for m in range(row_block * rows_each, (row_block + 1) * rows_each):
                row = m * BLOCK_M
                blocks = keys_of_rows(p, s, row, tl.minimum(row + BLOCK_M, s.len_q), BLOCK_N)
                first = tl.maximum(blocks[0] // BLOCK_N, column_block * columns_each)
                last = tl.minimum((blocks[3] + BLOCK_N - 1) // BLOCK_N, (column_block + 1) * columns_each)
                if row < s.len_q:
                    rows = row + tl.arange(0, BLOCK_M)
                    reference = load_statistic(references, batch, head, s.first_q, rows, s.len_q)
                    normaliser = load_statistic(normalisers, batch, head, s.first_q, rows, s.len_q)
                    delta = load_statistic(deltas, batch, head, s.first_q, rows, s.len_q)
                    query = load_rows(queries, row, BLOCK_M, 0, HEAD, False)
                    grad = load_rows(grads, row, BLOCK_M, 0, VALUE, False)
                    for n in range(first, last):
                        key = n * BLOCK_N
                        columns = key + tl.arange(0, BLOCK_N)
                        product = products(query, queries, row, BLOCK_M, keys, key, BLOCK_N, HEAD, HEAD_CHUNKS, False,
                                           PRECISION)
                        scores, keep, _ = finish_scores(p, s, product, batch, head, rows[:, None], columns[None, :],
                                                        True)
                        scores = tl.where(keep, scores, float("-inf"))
                        weights = weigh(p, scores - reference[:, None], EXACT) * normaliser[:, None]
                        grad_weights = products(grad, grads, row, BLOCK_M, values, key, BLOCK_N, VALUE, VALUE_CHUNKS,
                                                False, PRECISION)
                        if p.dropout_seed is not None:
                            draws = kept_draws(p, batch, head, rows, key, BLOCK_N)
                            grad_weights = tl.where(draws, grad_weights * p.dropout_scale, 0.0)
                        total += tl.where(keep, weights * (grad_weights - delta[:, None]), 0.0)

    rows, columns = row_block * BLOCK_M + tl.arange(0, BLOCK_M), column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    base = base_of(grad_bias, own_batch, own_head, 0)
    inside_rows, inside_columns = rows < p.max_q, columns < p.max_k
    if SUM_ROWS:
        total = tl.sum(total, 0)[None, :] + tl.zeros_like(total)
        inside_rows = rows == 0
    if SUM_COLUMNS:
        total = tl.sum(total, 1)[:, None] + tl.zeros_like(total)
        inside_columns = columns == 0
    addresses = base + rows.to(tl.int64)[:, None] * grad_bias.row + columns.to(tl.int64)[None, :] * grad_bias.col
    inside = inside_rows[:, None] & inside_columns[None, :]
    tl.store(addresses, narrowed(total, grad_bias.data.dtype.element_ty), mask=inside)


@triton.jit
def add_in_order_kernel(parts, sums, count, stride, outer_stride, size, BLOCK: tl.constexpr):
    """sums[o, i] = parts[o, 0, i] + parts[o, 1, i] + ..., `count` of them `stride` apart."""
    blocks = tl.cdiv(size, BLOCK)
    outer = tl.program_id(0) // blocks
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    base = parts + outer.to(tl.int64) * outer_stride + at
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(count):
        total += tl.load(base + i * tl.cast(stride, tl.int64), mask=at < size, other=0.0)
    tl.store(sums + outer.to(tl.int64) * size + at, total, mask=at < size)


# ---- host ----


def attention_backward(grad_output, grad_lse, query, key, value, output, lse, bias, mask, seqlens_k, alibi_slopes,
                       sinks, dropout_seed, scale, *rest) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, bias, alibi_slopes, sinks; of the last three empty ones where not wanted."""
    *numbers, bias_shape, need_bias, need_alibi, need_sinks = rest
    problem = dense_problem(
        query, key, value, bias, mask, seqlens_k, alibi_slopes, sinks, dropout_seed, scale, *numbers
    )
    grads = [heads_together("attention", t, t.shape[1], t.shape[2], t.shape[3]) for t in (query, key, value)]
    statistics = [torch.empty_like(lse, memory_format=torch.contiguous_format) for _ in range(3)]
    extras = _Extras(query, bias, alibi_slopes, sinks, bias_shape, need_bias, need_alibi, need_sinks)
    _launch_backward(problem, query.shape[0], scale, (query, key, value, grad_output), view(grad_output), view(output),
                     view(lse), view(grad_lse), *map(view, grads), [view(t) for t in statistics], extras)
    return *grads, *extras.results()


def varlen_attention_backward(grad_output, grad_lse, query, key, value, output, lse, cu_q, cu_k, bias, alibi_slopes,
                              sinks, dropout_seed, max_q, max_k, scale, *rest) -> tuple[Tensor, ...]:
    *numbers, bias_shape, need_bias, need_alibi, need_sinks = rest
    problem = packed_problem(
        query, key, value, cu_q, cu_k, bias, alibi_slopes, sinks, dropout_seed, max_q, max_k, scale, *numbers
    )
    grads = [allocate("varlen_attention", t, *t.shape) for t in (query, key, value)]
    statistics = [torch.empty_like(lse, memory_format=torch.contiguous_format) for _ in range(3)]
    extras = _Extras(query, bias, alibi_slopes, sinks, bias_shape, need_bias, need_alibi, need_sinks)
    of_heads = tuple(t.transpose(0, 1)[None] for t in (query, key, value, grad_output))
    _launch_backward(problem, cu_q.shape[0] - 1, scale, of_heads, packed_view(grad_output), packed_view(output),
                     packed_view(lse.mT), None if grad_lse is None else packed_view(grad_lse.mT),
                     *map(packed_view, grads), [packed_view(t.mT) for t in statistics], extras)
    return *grads, *extras.results()


class _Extras:
    """Gradients of what is not query, key or value: which are wanted, and where they are gathered."""

    def __init__(self, query, bias, alibi_slopes, sinks, bias_shape, need_bias, need_alibi, need_sinks):
        self.query, self.bias, self.alibi_slopes, self.sinks = query, bias, alibi_slopes, sinks
        self.need_alibi, self.need_sinks = need_alibi, need_sinks
        self.grad_bias = self._empty(bias)
        self.grad_alibi = self._empty(alibi_slopes)
        self.grad_sinks = self._empty(sinks)
        self.sums_bias = need_bias and tuple(bias_shape) != tuple(bias.shape)
        if need_bias:
            self.grad_bias = bias.new_zeros(bias_shape)

    def _empty(self, like: Tensor | None) -> Tensor:
        return (self.query if like is None else like).new_empty(0)

    def whole_bias(self):
        """The gradient of a bias as large as the scores, for the kernel that visits each of them once."""
        return None if self.grad_bias.dim() != 4 or self.sums_bias else view(self.grad_bias)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.grad_bias, self.grad_alibi, self.grad_sinks


def _launch_backward(problem, sequences, scale, of_heads, grad_output, output, lse, grad_lse, grad_query, grad_key,
                     grad_value, statistics, extras) -> None:
    """of_heads: query, key, value and gradient of the output, [B, H, L, D] or [1, H, tokens, D]."""
    query, key, value, grad = of_heads
    device, heads = query.device, problem.num_heads
    kv_heads = heads // problem.group if heads else 0
    shared = {"p": problem, "grad_output": grad_output,
              **dict(zip(("references", "normalisers", "deltas"), statistics))}

    options, tile = tile_options("query", query, value, problem)
    blocks = triton.cdiv(problem.max_q, options["BLOCK_M"])
    slope_parts, sink_parts = (
        query.new_empty(sequences, heads, blocks, dtype=torch.float32) if wanted else None
        for wanted in (extras.need_alibi, extras.need_sinks)
    )
    launch(attention_backward_query_kernel, (blocks * options["HEAD_CHUNKS"] * heads * sequences,), tile.row, device,
           **shared, output=output, lse=lse, grad_lse=grad_lse, grad_query=grad_query, slope_parts=slope_parts,
           sink_parts=sink_parts, key_tiles=tile.descriptor_of(key, options["BLOCK_N"], options["HEAD"]),
           value_tiles=tile.descriptor_of(value, options["BLOCK_N"], options["VALUE"]), num_blocks=blocks,
           head_chunks=options["HEAD_CHUNKS"], scale=scale, **options)
    if extras.need_alibi:
        sums = _add_in_order(slope_parts.view(-1, blocks, 1)).view(sequences, heads)
        sums = sums if extras.alibi_slopes.dim() == 2 else _add_in_order(sums[None]).view(heads)
        extras.grad_alibi = sums.to(extras.alibi_slopes.dtype)
    if extras.need_sinks:
        sums = _add_in_order(sink_parts.view(-1, blocks, 1)).view(1, sequences, heads)
        extras.grad_sinks = _add_in_order(sums).view(heads).to(extras.sinks.dtype)

    options, tile = tile_options("key", query, value, problem)
    blocks = triton.cdiv(problem.max_k, options["BLOCK_N"])
    chunks = max(options["HEAD_CHUNKS"], options["VALUE_CHUNKS"])
    grid = (blocks * chunks * kv_heads * sequences,)
    poisoned = query.new_empty(grid, dtype=torch.uint8) if excludes_pairs(problem) else None
    of_keys = {**shared, "grad_key": grad_key, "grad_value": grad_value, "grad_bias": extras.whole_bias(),
               "poisoned": poisoned, "num_blocks": blocks, "num_chunks": chunks, "num_kv_heads": kv_heads,
               "scale": scale, **options}
    launch(attention_backward_key_kernel, grid, tile.row, device, **of_keys, KEPT=False,
           query_tiles=tile.descriptor_of(query, options["BLOCK_M"], options["HEAD"]),
           grad_tiles=tile.descriptor_of(grad, options["BLOCK_M"], options["VALUE"]))
    if poisoned is not None:
        launch(attention_backward_key_kernel, grid, tile.kept_row, device, **of_keys, KEPT=True, query_tiles=None,
               grad_tiles=None)
    if extras.sums_bias:
        _launch_bias(problem, sequences, query, value, shared, extras)


def _launch_bias(problem, sequences, query, value, shared, extras) -> None:
    """A bias summed over rows or columns is gathered per sequence and head, and these parts are added in order."""
    options, tile = tile_options("bias", query, value, problem)
    heads = problem.num_heads
    shape = extras.grad_bias.shape
    sum_batch, sum_heads, sum_rows, sum_columns = (a == 1 for a in shape)
    in_parts = sum_rows or sum_columns
    gathered = extras.grad_bias
    if in_parts:
        gathered = query.new_zeros(sequences, heads, *shape[2:], dtype=torch.float32)
        sum_batch = sum_heads = False
    row_blocks = triton.cdiv(problem.max_q, options["BLOCK_M"])
    column_blocks = triton.cdiv(problem.max_k, options["BLOCK_N"])
    own_batches, own_heads = 1 if sum_batch else sequences, 1 if sum_heads else heads
    own_rows, own_columns = 1 if sum_rows else row_blocks, 1 if sum_columns else column_blocks
    launch(attention_backward_bias_kernel, (own_batches * own_heads * own_rows * own_columns,), tile.row, query.device,
           **shared, grad_bias=view(gathered), own_heads=own_heads, row_blocks=own_rows, column_blocks=own_columns,
           batches_each=sequences if sum_batch else 1, heads_each=heads if sum_heads else 1,
           rows_each=row_blocks if sum_rows else 1, columns_each=column_blocks if sum_columns else 1,
           SUM_ROWS=sum_rows, SUM_COLUMNS=sum_columns, **options)
    if not in_parts:
        return
    size = shape[2] * shape[3]
    if shape[0] == 1:
        gathered = _add_in_order(gathered.view(1, sequences, heads * size)).view(1, heads, size)
    if shape[1] == 1:
        gathered = _add_in_order(gathered.view(-1, heads, size))
    extras.grad_bias = gathered.view(shape).to(extras.grad_bias.dtype)


def _add_in_order(parts: Tensor) -> Tensor:
    """Sums [O, size] of float32 parts [O, count, size]."""
    outer, count, size = parts.shape
    sums = parts.new_zeros(outer, size)
    if count and size:
        row = Launch(4)
        launch(add_in_order_kernel, (outer * triton.cdiv(size, SUM_BLOCK),), row, parts.device, parts=parts, sums=sums,
               count=count, stride=size, outer_stride=count * size, size=size, BLOCK=SUM_BLOCK)
    return sums
