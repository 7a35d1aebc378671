"""Attention of the newest tokens against a key/value cache, contiguous or paged: the inner loop of generation.

    cache[b, :, cache_seqlens[b] : cache_seqlens[b] + Lnew] = new_key[b], new_value[b]
    output[b] = attention(query[b], the valid keys of b, causal, bottom-right)

Read decode_attention and IMPLEMENTATIONS; then csrc/attention_decode.cpp and kernels/cpu/attention_decode.cpp,
csrc/cuda_attention_decode.cpp and kernels/cuda/attention_decode.cu, or kernels/triton/attention_decode.py.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from transfuse import dispatch
from transfuse.autograd import refuse_tangents
from transfuse.checks import check_scale, check_tensor
from transfuse.dispatch import dtype_name
from transfuse.ops import attention_checks as checks
from transfuse.raw_ops import RAW_OPS, raw_op
from transfuse.reference.decode_attention import decode_attention_reference

_OP = "decode_attention"
_FARTHEST = 2**62  # a window beyond every key, with room for a position to be subtracted


def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    new_key: Tensor | None = None,
    new_value: Tensor | None = None,
    block_table: Tensor | None = None,
    attn_bias: Tensor | None = None,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(softcap(scale * query @ key^T) + bias) @ value over a cache, whose newest keys may arrive with the call.

        output = transfuse.decode_attention(query, key_cache, value_cache, lengths, new_key=key, new_value=value)
        lengths += 1

    Args:
        query: [B, Hq, Lq, D], any strides, the Lq newest tokens of each entry; Hq a multiple of Hkv.
        key_cache, value_cache: [B, Hkv, Lmax, D], [B, Hkv, Lmax, Dv], query's dtype, any strides; or with block_table
            pages [blocks, block_size, Hkv, D], [blocks, block_size, Hkv, Dv], which batch entries may share.
        cache_seqlens: int32 or int64 [B], valid keys before new_key. What the cache holds beyond them never matters.
        new_key, new_value: [B, Hkv, Lnew, D], [B, Hkv, Lnew, Dv]: written into the caches from index cache_seqlens on,
            the one argument that is written to. cache_seqlens itself is left alone.
        block_table: int32 or int64 [B, max_blocks], the pages of each entry in order (Lmax = max_blocks * block_size).
            Only the pages of valid keys are looked at; the rest may be anything, -1 too.
        attn_bias: added to the scores, query's dtype or float32, broadcasts to [B, Hq, Lq, Lmax]: the last dimension is
            the key's position. -inf excludes.
        scale: factor of the scores; None is D ** -0.5.
        window: (left, right), keys from `left` before the query's position on. (Causality bounds the right side.)
        softcap: c * tanh(score / c), before biases.
        alibi_slopes: [Hq] or [B, Hq]; adds -slope * (distance of the key). sinks: [Hq], one more logit without a value.
        return_lse: also return log(sum(exp(score))).

    Returns:
        output [B, Hq, Lq, Dv] in query's dtype, a view of memory laid out [B, Lq, Hq, Dv]. With return_lse also
        lse [B, Hq, Lq], natural log, float32 (float64 for float64). Inference only: neither has a gradient.
        The last query stands at the last valid key (after appending), each other one a position before, and no query
        sees a later key. With new_key None the queries are those of the last Lq cached keys.

    Numerics: float64 throughout on the CPU, float32 sums on a GPU, one rounding at the end. A row with no key gives
        output 0, lse -inf (with a sink: output 0, lse = the sink). A NaN in a valid key gives NaN. Keys are summed in
        chunks counted from the entry's own first key (of 256; in the CUDA kernels of more above 16384 keys), so the
        bits depend neither on the batch, the threads, the layout of the cache, nor its block_size.
        Autocast: query and the new keys and values are cast to the cache's dtype, and the cache never.

    Raises:
        ValueError: shapes, options, and lengths and block numbers out of range (the first bad entry is named; on a GPU
        with TRANSFUSE_CHECK=1, else they are clamped, and new keys without a place are left out); nothing has been
        written then.
        TypeError: types and dtypes. RuntimeError: devices; an argument that requires grad, under enabled grad;
        appending inside torch.func transforms.

    Source: split keys as in Flash-Decoding (Dao et al., 2023), pages as in vLLM (Kwon et al., 2023).
    """
    arguments, features = _normalise(
        query, key_cache, value_cache, cache_seqlens, new_key, new_value, block_table, attn_bias, scale, window,
        softcap, alibi_slopes, sinks,
    )
    query, _, value_cache = arguments[:3]
    widest = max(query.shape[-1], value_cache.shape[-1])
    device = "cpu" if query.device.type == "cpu" else str(query.device)
    key = (device, query.dtype, widest > checks.CUDA_DECODE_HEAD_DIM, widest > checks.MAX_HEAD_DIM)
    implementation = dispatch.select(_OP, IMPLEMENTATIONS, key, lambda: _problem(arguments, features))
    output, lse = implementation.run(*arguments, features)
    return (output, lse) if return_lse else output


@dataclass(frozen=True)
class DecodeAttentionProblem(dispatch.Problem):
    """What the choice of an implementation may depend on, and what explain() prints."""

    query_shape: tuple[int, ...]  # [B, Hq, Lq, D]
    key_cache_shape: tuple[int, ...]  # [B, Hkv, Lmax, D] or [blocks, block_size, Hkv, D]
    value_cache_shape: tuple[int, ...]
    new_keys: int
    paged: bool
    bias: str | None  # its dtype
    features: tuple[str, ...]  # of window, softcap, alibi_slopes, sinks


def _unsupported(reasons_of_backend, problem: DecodeAttentionProblem) -> tuple[str, ...]:
    reasons = reasons_of_backend(problem)
    return reasons + checks.head_dim_reasons(problem.query_shape[-1], problem.value_cache_shape[-1])


def _cuda_unsupported(problem: DecodeAttentionProblem) -> tuple[str, ...]:
    sizes = (("head_dim", problem.query_shape[-1]), ("value's head_dim", problem.value_cache_shape[-1]))
    return checks.cuda_reasons(problem, sizes, checks.CUDA_DECODE_HEAD_DIM)


def _run_kernels(kind, query, key_cache, value_cache, seqlens, new_key, new_value, block_table, bias, scale, features):
    per_head = (features.get("alibi_slopes"), features.get("sinks"))
    refuse_tangents(_OP, kind, query, key_cache, value_cache, new_key, new_value, bias, *per_head)
    if checks.page_reads_values(kind, query):
        _check_values(key_cache, seqlens, new_key, block_table)
    if new_key is not None:
        RAW_OPS[kind]["decode_attention_append"](key_cache, value_cache, seqlens, block_table, new_key, new_value)
        if not torch.compiler.is_compiling():
            increment_version((key_cache, value_cache))  # autograd refuses what it saved of them before
    left = features.get("window", (None, None))[0]
    slopes, sinks = (_of_kernels(features.get(name)) for name in ("alibi_slopes", "sinks"))
    return RAW_OPS[kind]["decode_attention_forward"](
        query, key_cache, value_cache, seqlens, block_table, bias, slopes, sinks,
        0 if new_key is None else new_key.shape[2], scale, -1 if left is None else min(left, _FARTHEST),
        features.get("softcap", 0.0),
    )


def _of_kernels(tensor: Tensor | None) -> Tensor | None:
    """In the type that the kernels of its device sum in."""
    if tensor is None:
        return None
    return tensor.to(torch.float64 if tensor.device.type == "cpu" else torch.float32).contiguous()


def _run_reference(query, key_cache, value_cache, seqlens, new_key, new_value, block_table, bias, scale, features):
    _check_values(key_cache, seqlens, new_key, block_table)
    return decode_attention_reference(
        query, key_cache, value_cache, seqlens, new_key=new_key, new_value=new_value, block_table=block_table,
        attn_bias=bias, scale=scale, return_lse=True, **features,
    )


IMPLEMENTATIONS = (
    dispatch.Implementation("cuda", _cuda_unsupported, partial(_run_kernels, "compiled")),
    dispatch.Implementation(
        "triton", partial(_unsupported, dispatch.triton_reasons), partial(_run_kernels, "triton"), automatic="cuda"
    ),
    dispatch.Implementation("cpu", partial(_unsupported, dispatch.cpu_reasons), partial(_run_kernels, "compiled")),
    dispatch.Implementation("reference", dispatch.supports_all, _run_reference),
)


def _normalise(
    query, key_cache, value_cache, seqlens, new_key, new_value, block_table, attn_bias, scale, window, softcap,
    alibi_slopes, sinks,
):
    """Checks everything once; returns what the implementations take, and the options in use."""
    for name, tensor in (("query", query), ("key_cache", key_cache), ("value_cache", value_cache)):
        check_tensor(_OP, name, tensor)
    query, new_key, new_value = _autocast(key_cache, query, new_key, new_value)
    if not query.is_floating_point():
        raise TypeError(f"{_OP}: query has dtype {dtype_name(query.dtype)}, expected a floating dtype")
    paged = block_table is not None
    layout = "(blocks, block_size, Hkv, D)" if paged else "(B, Hkv, Lmax, D)"
    _check_shape("query", query, query, "(B, Hq, Lq, D)")
    _check_shape("key_cache", key_cache, query, layout)
    _check_shape("value_cache", value_cache, query, layout)
    batch, heads, _, head_dim = query.shape
    if key_cache.shape[3] != head_dim:
        raise ValueError(f"{_OP}: key_cache has head_dim {key_cache.shape[3]}, expected {head_dim} (query's)")
    if key_cache.shape[:3] != value_cache.shape[:3]:
        expected = f"{tuple(key_cache.shape[:3])} and a head_dim (key_cache's)"
        raise ValueError(f"{_OP}: value_cache has shape {tuple(value_cache.shape)}, expected {expected}")
    kv_heads, capacity = key_cache.shape[2 if paged else 1], key_cache.shape[1 if paged else 2]
    if paged:
        _check_block_table(block_table, query)
        capacity *= block_table.shape[1]
    elif key_cache.shape[0] != batch:
        raise ValueError(f"{_OP}: key_cache has batch {key_cache.shape[0]}, expected {batch} (query's)")
    if kv_heads != heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"{_OP}: key_cache has {kv_heads} heads, expected a divisor of {heads} (query's)")
    checks.check_lengths(_OP, "cache_seqlens", seqlens, query, batch)
    _check_new(new_key, new_value, key_cache, value_cache, (batch, kv_heads))
    _refuse_gradients(query, key_cache, value_cache, new_key, new_value, attn_bias, alibi_slopes, sinks)

    scale = head_dim**-0.5 if scale is None else check_scale(_OP, scale)
    features = checks.NO_FEATURES
    if window is not None or softcap is not None or alibi_slopes is not None or sinks is not None:
        features = checks.features_in_use(_OP, query, batch, heads, 0.0, window, softcap, alibi_slopes, sinks)
    if attn_bias is not None:
        target = (batch, heads, query.shape[2], capacity)
        checks.check_additive(_OP, "attn_bias", attn_bias, query, allow_bool=False)
        checks.check_broadcast(_OP, "attn_bias", attn_bias.shape, target)
        attn_bias = attn_bias.expand(target)
    return (query, key_cache, value_cache, seqlens, new_key, new_value, block_table, attn_bias, scale), features


def _autocast(key_cache: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, in the cache's dtype: it is the model's state, and a copy of it could not be appended to."""
    if key_cache.is_meta or not torch.is_autocast_enabled(key_cache.device.type):
        return tensors
    return tuple(t.to(key_cache.dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors)


def _check_shape(name: str, tensor: Tensor, query: Tensor, layout: str) -> None:
    """Four dimensions, the last not 0, query's dtype and device."""
    if tensor.dtype != query.dtype:
        expected = f"{dtype_name(query.dtype)} (query's)"
        raise TypeError(f"{_OP}: {name} has dtype {dtype_name(tensor.dtype)}, expected {expected}")
    checks.check_device(_OP, name, tensor, query)
    if tensor.dim() != 4:
        raise ValueError(f"{_OP}: {name} has shape {tuple(tensor.shape)}, expected {layout}")
    if tensor.shape[3] == 0:
        raise ValueError(f"{_OP}: {name} has head_dim 0, expected at least 1")


def _check_block_table(block_table: Tensor, query: Tensor) -> None:
    check_tensor(_OP, "block_table", block_table, "a Tensor or None")
    if block_table.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{_OP}: block_table has dtype {dtype_name(block_table.dtype)}, expected int32 or int64")
    if block_table.dim() != 2 or block_table.shape[0] != query.shape[0]:
        expected = f"({query.shape[0]}, max_blocks)"
        raise ValueError(f"{_OP}: block_table has shape {tuple(block_table.shape)}, expected {expected}")
    checks.check_device(_OP, "block_table", block_table, query)


def _check_new(new_key, new_value, key_cache, value_cache, lead) -> None:
    """Both or neither; [B, Hkv, Lnew, D | Dv] in the cache's dtype; a cache that can be written to."""
    pairs = (("new_key", new_key, "key_cache", key_cache), ("new_value", new_value, "value_cache", value_cache))
    if new_key is None and new_value is None:
        return
    for name, new, owner, cache in pairs:
        check_tensor(_OP, name, new, "a Tensor, since the other one is given")
        if new.dtype != cache.dtype:
            expected = f"{dtype_name(cache.dtype)} ({owner}'s)"
            raise TypeError(f"{_OP}: {name} has dtype {dtype_name(new.dtype)}, expected {expected}")
        checks.check_device(_OP, name, new, cache)
        expected = (*lead, new_key.shape[2] if new_key.dim() == 4 else "Lnew", cache.shape[3])
        if tuple(new.shape) != expected:
            raise ValueError(f"{_OP}: {name} has shape {tuple(new.shape)}, expected ({', '.join(map(str, expected))})")
        for dim, (size, stride) in enumerate(zip(cache.shape, cache.stride(), strict=True)):
            if stride == 0 and size > 1:
                raise ValueError(
                    f"{_OP}: {owner} has stride 0 in dimension {dim}, expected memory of its own to write new keys to"
                )
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"{_OP}: new_key is given inside a torch.func transform, expected None: it writes in place")


def _refuse_gradients(query, key_cache, value_cache, new_key, new_value, attn_bias, alibi_slopes, sinks) -> None:
    if not torch.is_grad_enabled():
        return
    names = ("query", "key_cache", "value_cache", "new_key", "new_value", "attn_bias", "alibi_slopes", "sinks")
    tensors = (query, key_cache, value_cache, new_key, new_value, attn_bias, alibi_slopes, sinks)
    for name, tensor in zip(names, tensors, strict=True):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            raise RuntimeError(
                f"{_OP}: {name} requires grad, expected inference: call it under torch.no_grad(), or train with "
                "scaled_dot_product_attention"
            )


def _check_values(key_cache, seqlens, new_key, block_table) -> None:
    """Lengths and pages in use are in range, where values can be read. (The compiled kernels check for themselves.)"""
    if not checks.may_read_values(seqlens) or block_table is not None and not checks.may_read_values(block_table):
        return
    num_new = 0 if new_key is None else new_key.shape[2]
    block_size = key_cache.shape[1 if block_table is not None else 2]
    capacity = block_size * (1 if block_table is None else block_table.shape[1])
    brings = f", new_key brings {num_new}" if num_new else ""
    for entry, length in enumerate(seqlens.tolist()):
        if not 0 <= length <= capacity - num_new:
            expected = f"0 to {capacity - num_new} (the cache holds {capacity} keys{brings})"
            raise ValueError(f"{_OP}: cache_seqlens[{entry}] is {length}, expected {expected}")
    if block_table is None:
        return
    blocks = key_cache.shape[0]
    for entry, (length, row) in enumerate(zip(seqlens.tolist(), block_table.tolist(), strict=True)):
        for page, block in enumerate(row):
            if page * block_size < length + num_new and not 0 <= block < blocks:
                expected = f"0 to {blocks - 1} (key_cache has {blocks} blocks)"
                raise ValueError(f"{_OP}: block_table[{entry}][{page}] is {block}, expected {expected}")


def _problem(arguments, features) -> DecodeAttentionProblem:
    query, key_cache, value_cache, _, new_key, _, block_table, bias, _ = arguments
    return DecodeAttentionProblem(
        op=_OP,
        device=str(query.device),
        dtype=query.dtype,
        requires_grad=False,
        query_shape=tuple(query.shape),
        key_cache_shape=tuple(key_cache.shape),
        value_cache_shape=tuple(value_cache.shape),
        new_keys=0 if new_key is None else new_key.shape[2],
        paged=block_table is not None,
        bias=None if bias is None else dtype_name(bias.dtype),
        features=tuple(features),
    )


def _explain_problem(
    query, key_cache, value_cache, cache_seqlens, *, new_key=None, new_value=None, block_table=None, attn_bias=None,
    scale=None, window=None, softcap=None, alibi_slopes=None, sinks=None, return_lse=False,
):
    arguments, features = _normalise(
        query, key_cache, value_cache, cache_seqlens, new_key, new_value, block_table, attn_bias, scale, window,
        softcap, alibi_slopes, sinks,
    )
    return _OP, IMPLEMENTATIONS, _problem(arguments, features)


decode_attention.explain_problem = _explain_problem


# ---- raw ops: csrc/attention_decode.cpp, csrc/cuda_attention_decode.cpp, kernels/triton/attention_decode.py ----
# What is declared with them: shapes, dtypes and layout without data.


@raw_op(
    "attention_decode",
    "decode_attention_append(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor cache_seqlens, Tensor? block_table,"
    " Tensor new_key, Tensor new_value) -> ()",
)
def _(key_cache, value_cache, cache_seqlens, block_table, new_key, new_value):
    return None


@raw_op(
    "attention_decode",
    "decode_attention_forward(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_seqlens,"
    " Tensor? block_table, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, int num_new, float scale,"
    " int window_left, float softcap) -> (Tensor output, Tensor lse)",
)
def _(
    query, key_cache, value_cache, cache_seqlens, block_table, bias, alibi_slopes, sinks, num_new, scale, window_left,
    softcap,
):
    batch, heads, length, _ = query.shape
    output = query.new_empty(batch, length, heads, value_cache.shape[3]).transpose(1, 2)
    return output, query.new_empty(batch, heads, length, dtype=checks.statistics_dtype(query))
