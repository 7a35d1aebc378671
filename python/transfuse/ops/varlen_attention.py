"""Attention over packed sequences: no padding is stored, none is computed.

    output[cu[n] : cu[n + 1]] = attention(query[cu_q[n] : cu_q[n + 1]], key[cu_k[n] : ...], value[cu_k[n] : ...])

Read varlen_attention, IMPLEMENTATIONS, VarlenAttentionFunction; then csrc/attention.cpp. The same kernels as attention
run it, so a packed sequence gives bit for bit what it gives in a padded batch.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from transfuse import dispatch
from transfuse.autograd import distinct, refuse_tangents, wants_grad
from transfuse.checks import check_alignment, check_flag, check_scale
from transfuse.ops import attention_checks as checks
from transfuse.raw_ops import RAW_OPS, raw_op
from transfuse.reference.varlen_attention import varlen_attention_reference

_OP = "varlen_attention"


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    attn_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    causal_alignment: str = "bottom_right",
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Each sequence attends to itself (or to its partner in key) and to nothing else.

    Args:
        query, key, value: [tokens_q, Hq, D], [tokens_k, Hkv, D], [tokens_k, Hkv, Dv], any strides; Hq a multiple
            of Hkv.
        cu_seqlens_q: int32 or int64 [N + 1], from 0 to tokens_q, never falling; a zero-length sequence is legal. pack()
            makes it from a mask.
        cu_seqlens_k: the same over tokens_k; None is cu_seqlens_q.
        max_seqlen_q, max_seqlen_k: at least the longest sequence. Needed where the offsets cannot be read: inside
            torch.compile, and on a GPU without a synchronisation.
        attn_bias: [1|N, 1|Hq, max_seqlen_q, max_seqlen_k], indexed by position inside the sequence.
        dropout_p, is_causal, causal_alignment, scale, window, softcap, alibi_slopes, sinks: as in
            scaled_dot_product_attention; alignment is per sequence. alibi_slopes [Hq] or [N, Hq].
        return_lse: also return the log-sum-exp.

    Returns:
        output [tokens_q, Hq, Dv] in query's dtype. With return_lse also lse [Hq, tokens_q], natural log, float32
        (float64 for float64), differentiable.

    Numerics: those of scaled_dot_product_attention, and equal to it bit for bit, sequence by sequence.

    Raises:
        ValueError: shapes, options, and offsets that are not monotone from 0 to tokens (the first bad entry is named;
        on a GPU with TRANSFUSE_CHECK=1, else they are clamped).
        TypeError: types and dtypes. RuntimeError: devices; a second derivative of the compiled kernels.
    """
    arguments, features = _normalise(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, attn_bias, dropout_p, is_causal,
        causal_alignment, scale, window, softcap, alibi_slopes, sinks,
    )
    choice = checks.choice_key(arguments[0], arguments[2], features)
    implementation = dispatch.select(_OP, IMPLEMENTATIONS, choice, lambda: _problem(arguments, features))
    output, lse = implementation.run(*arguments, features)
    return (output, lse) if return_lse else output


@dataclass(frozen=True)
class VarlenAttentionProblem(dispatch.Problem):
    """What the choice of an implementation may depend on, and what explain() prints."""

    query_shape: tuple[int, ...]  # [tokens_q, Hq, D]
    key_shape: tuple[int, ...]  # [tokens_k, Hkv, D]
    value_shape: tuple[int, ...]  # [tokens_k, Hkv, Dv]
    num_sequences: int
    max_seqlen_q: int
    max_seqlen_k: int
    is_causal: bool
    features: tuple[str, ...]  # of attn_bias, dropout_p, window, softcap, alibi_slopes, sinks


def _unsupported(reasons_of_backend, problem: VarlenAttentionProblem) -> tuple[str, ...]:
    reasons = reasons_of_backend(problem)
    return reasons + checks.head_dim_reasons(problem.query_shape[-1], problem.value_shape[-1])


def _cuda_unsupported(problem: VarlenAttentionProblem) -> tuple[str, ...]:
    sizes = (("head_dim", problem.query_shape[-1]), ("value's head_dim", problem.value_shape[-1]))
    return checks.cuda_reasons(problem, sizes)


def _run_kernels(kind, query, key, value, cu_q, cu_k, max_q, max_k, scale, is_causal, bottom_right, features):
    if checks.page_reads_values(kind, query):
        _check_offset_values(query, key, cu_q, cu_k, max_q, max_k)
    alibi_slopes, sinks, dropout_seed, *options = checks.kernel_options(features, query.device)
    bias = features.get("attn_bias")
    if bias is not None and bias.dim() < 4:
        bias = bias[(None,) * (4 - bias.dim())]
    tensors = (query, key, value, cu_q, cu_k, bias, alibi_slopes, sinks, dropout_seed)
    options = (max_q, max_k, scale, is_causal, bottom_right, *options, kind)
    refuse_tangents(_OP, kind, query, key, value, bias, alibi_slopes, sinks)
    if wants_grad(query, key, value, bias, alibi_slopes, sinks):
        return VarlenAttentionFunction.apply(*distinct(*tensors), *options)
    return _forward(*tensors, *options)


def _check_offset_values(query, key, cu_q, cu_k, max_q, max_k):
    """On a GPU, unless TRANSFUSE_CHECK=1, the kernels clamp them."""
    checks.check_offset_values(_OP, "cu_seqlens_q", cu_q, query.shape[0], "query", max_q)
    checks.check_offset_values(_OP, "cu_seqlens_k", cu_k, key.shape[0], "key", max_k)


def _run_reference(query, key, value, cu_q, cu_k, max_q, max_k, scale, is_causal, bottom_right, features):
    _check_offset_values(query, key, cu_q, cu_k, max_q, max_k)
    return varlen_attention_reference(
        query, key, value, cu_q, cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k, is_causal=is_causal, scale=scale,
        causal_alignment="bottom_right" if bottom_right else "top_left", return_lse=True,
        **checks.reference_options(features, query.device),
    )


IMPLEMENTATIONS = (
    dispatch.Implementation("cuda", _cuda_unsupported, partial(_run_kernels, "compiled")),
    dispatch.Implementation(
        "triton", partial(_unsupported, dispatch.triton_reasons), partial(_run_kernels, "triton"), automatic="cuda"
    ),
    dispatch.Implementation("cpu", partial(_unsupported, dispatch.cpu_reasons), partial(_run_kernels, "compiled")),
    dispatch.Implementation("reference", dispatch.supports_all, _run_reference),
)


def _forward(query, key, value, cu_q, cu_k, bias, alibi_slopes, sinks, dropout_seed, max_q, max_k, *numbers):
    *numbers, kind = numbers
    return RAW_OPS[kind]["varlen_attention_forward"](
        query, key, value, cu_q, cu_k, _expand(bias, query, cu_q, max_q, max_k), alibi_slopes, sinks, dropout_seed,
        max_q, max_k, *numbers,
    )


def _expand(bias: Tensor | None, query: Tensor, cu_q: Tensor, max_q: int, max_k: int) -> Tensor | None:
    """The bias as a [N, Hq, max_seqlen_q, max_seqlen_k] view."""
    return None if bias is None else bias.expand(cu_q.shape[0] - 1, query.shape[1], max_q, max_k)


class VarlenAttentionFunction(torch.autograd.Function):
    """The raw op with its gradient, entered only when a gradient is wanted."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        return _forward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        checks.save_for_backward(ctx, inputs, output)

    @staticmethod
    def backward(ctx, grad_output, grad_lse):
        extras = (5, 6, 7)  # bias, alibi_slopes, sinks
        return checks.input_gradients(ctx, _OP, _backward, extras, grad_output, grad_lse)


def _backward(
    grad_output, grad_lse, query, key, value, output, lse, cu_q, cu_k, bias, alibi_slopes, sinks, dropout_seed, max_q,
    max_k, *rest,
):
    *numbers, kind, need_bias, need_alibi_slopes, need_sinks = rest
    bias_shape = [1, 1, 1, 1] if bias is None else list(bias.shape)
    return RAW_OPS[kind]["varlen_attention_backward"](
        grad_output, grad_lse, query, key, value, output, lse, cu_q, cu_k, _expand(bias, query, cu_q, max_q, max_k),
        alibi_slopes, sinks, dropout_seed, max_q, max_k, *numbers, bias_shape, need_bias, need_alibi_slopes, need_sinks,
    )


def _normalise(
    query, key, value, cu_q, cu_k, max_q, max_k, attn_bias, dropout_p, is_causal, causal_alignment, scale, window,
    softcap, alibi_slopes, sinks,
):
    """Checks everything once; returns what the implementations take, and the options that only some of them have."""
    query, key, value = checks.autocast(query, key, value)
    (attn_bias,) = checks.autocast_additive(query, attn_bias)
    checks.check_tensors(_OP, query, key, value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3:
            raise ValueError(f"{_OP}: {name} has shape {tuple(tensor.shape)}, expected (tokens, heads, head_dim)")
    _, heads, head_dim = query.shape
    tokens_k, kv_heads, _ = key.shape
    if value.shape[0] != tokens_k:
        raise ValueError(f"{_OP}: value has {value.shape[0]} tokens, expected {tokens_k} (key's)")
    if value.shape[1] != kv_heads:
        raise ValueError(f"{_OP}: value has {value.shape[1]} heads, expected {kv_heads} (key's)")
    if kv_heads != heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"{_OP}: key has {kv_heads} heads, expected a divisor of {heads} (query's)")

    checks.check_offsets(_OP, "cu_seqlens_q", cu_q, query)
    if cu_k is None:
        cu_k = cu_q
        if max_k is None:
            max_k = max_q
    else:
        checks.check_offsets(_OP, "cu_seqlens_k", cu_k, query)
        if cu_k.shape != cu_q.shape:
            entries = cu_k.shape[0]
            raise ValueError(f"{_OP}: cu_seqlens_k has {entries} entries, expected {cu_q.shape[0]} (cu_seqlens_q's)")
    max_q = _longest("max_seqlen_q", max_q, cu_q)
    max_k = _longest("max_seqlen_k", max_k, cu_k)

    check_flag(_OP, "is_causal", is_causal)
    scale = head_dim**-0.5 if scale is None else check_scale(_OP, scale)
    bottom_right = causal_alignment != "top_left" and check_alignment(_OP, causal_alignment)
    features, num_sequences = checks.NO_FEATURES, cu_q.shape[0] - 1
    dropout = dropout_p.__class__ is not float or dropout_p != 0.0  # a tensor is refused there, and not compared here
    if dropout or window is not None or softcap is not None or alibi_slopes is not None or sinks is not None:
        features = checks.features_in_use(
            _OP, query, num_sequences, heads, dropout_p, window, softcap, alibi_slopes, sinks
        )
    if attn_bias is not None:
        checks.check_additive(_OP, "attn_bias", attn_bias, query, allow_bool=False)
        checks.check_broadcast(_OP, "attn_bias", attn_bias.shape, (num_sequences, heads, max_q, max_k))
        features = {"attn_bias": attn_bias, **features}
    return (query, key, value, cu_q, cu_k, max_q, max_k, scale, is_causal, bottom_right), features


def _longest(name: str, given: int | None, offsets: Tensor) -> int:
    """The bound on the sequence lengths: as given, or read from the offsets."""
    if given is None:
        if torch.compiler.is_compiling():
            raise ValueError(f"{_OP}: {name} is None, expected an int inside torch.compile")
        if offsets.is_meta:
            raise ValueError(f"{_OP}: {name} is None, expected an int where the offsets are on meta and have no values")
        return int(offsets.diff().max()) if offsets.shape[0] > 1 else 0
    if isinstance(given, bool) or not isinstance(given, (int, torch.SymInt)):
        raise TypeError(f"{_OP}: {name} is a {type(given).__name__}, expected int or None")
    if given < 0:
        raise ValueError(f"{_OP}: {name} is {given}, expected at least 0")
    if given > checks.INT64_MAX:
        raise ValueError(f"{_OP}: {name} is {given}, expected an int64")
    return given


def _problem(arguments, features) -> VarlenAttentionProblem:
    query, key, value, cu_q, _, max_q, max_k, _, is_causal, _ = arguments
    floats = [query, key, value, *(features.get(name) for name in ("attn_bias", "alibi_slopes", "sinks"))]
    return VarlenAttentionProblem(
        op=_OP,
        device=str(query.device),
        dtype=query.dtype,
        requires_grad=torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in floats),
        query_shape=tuple(query.shape),
        key_shape=tuple(key.shape),
        value_shape=tuple(value.shape),
        num_sequences=cu_q.shape[0] - 1,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        is_causal=is_causal,
        features=tuple(features),
    )


def _explain_problem(
    query, key, value, cu_seqlens_q, cu_seqlens_k=None, *, max_seqlen_q=None, max_seqlen_k=None, attn_bias=None,
    dropout_p=0.0, is_causal=False, causal_alignment="bottom_right", scale=None, window=None, softcap=None,
    alibi_slopes=None, sinks=None, return_lse=False,
):
    arguments, features = _normalise(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, attn_bias, dropout_p, is_causal,
        causal_alignment, scale, window, softcap, alibi_slopes, sinks,
    )
    return _OP, IMPLEMENTATIONS, _problem(arguments, features)


varlen_attention.explain_problem = _explain_problem


# ---- raw ops: csrc/attention.cpp, kernels/triton/attention.py ----
# What is declared with them: shapes and dtypes without data.


@raw_op(
    "attention",
    "varlen_attention_forward(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? dropout_seed, int max_seqlen_q, int max_seqlen_k, "
    f"{checks.SCHEMA_OPTIONS}) -> (Tensor, Tensor)",
)
def _(query, key, value, *rest):
    tokens_q, heads, _ = query.shape
    lse = query.new_empty(heads, tokens_q, dtype=checks.statistics_dtype(query))
    return query.new_empty(tokens_q, heads, value.shape[2]), lse


@raw_op(
    "attention_backward",
    "varlen_attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    "Tensor output, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? bias, Tensor? alibi_slopes, "
    "Tensor? sinks, Tensor? dropout_seed, int max_seqlen_q, int max_seqlen_k, "
    f"{checks.SCHEMA_OPTIONS}, {checks.SCHEMA_NEEDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _(grad_output, grad_lse, query, key, value, output, lse, cu_q, cu_k, bias, alibi_slopes, sinks, *rest):
    grads = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    return *grads, *checks.fake_extra_grads(query, bias, alibi_slopes, sinks, *rest[-4:])
