"""Attention with torch's scaled_dot_product_attention signature, and what that one lacks: lengths, biases, lse.

    output = softmax(scale * query @ key^T + bias, over the keys that take part) @ value

Read in this order: scaled_dot_product_attention (the contract), IMPLEMENTATIONS (who runs it), AttentionFunction
(autograd around the raw op), the raw ops. Then csrc/attention.cpp and kernels/cpu/attention.cpp, or
kernels/triton/attention.py.
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
from transfuse.reference.attention import attention_reference

_OP = "attention"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    attn_bias: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(softcap(scale * query @ key^T) + bias) @ value; score = -inf wherever a mask, length or window excludes.

    A drop-in for torch.nn.functional.scaled_dot_product_attention: the first eight arguments are torch's.

    Args:
        query, key, value: [..., Hq, Lq, D], [..., Hkv, Lk, D], [..., Hkv, Lk, Dv], any strides, any number of leading
            dimensions (their product is the batch B), or [L, D]. Leading dimensions and heads of size 1 broadcast.
        attn_mask: bool, True = keep, or additive in query's dtype or float32; broadcasts to [..., Hq, Lq, Lk].
        dropout_p: probability to drop a weight, applied whenever it is above 0, as torch does. The seed comes from torch's
            generator, the draws from Philox: the same mask on every backend and any number of threads.
        is_causal: key j takes part in row i if j <= i + offset. ANDs with every mask, where torch refuses the pair.
        scale: factor of the scores; None is D ** -0.5.
        enable_gqa: query head h uses key head h // (Hq // Hkv).
        attn_bias: additive like a float attn_mask, and may stand beside it or beside a boolean one. Both get gradients.
        seqlens_k: int32 or int64 [B], how many of the Lk keys are valid in each batch entry.
        causal_alignment: "top_left" (torch, offset 0) or "bottom_right" (the last query meets the last valid key:
            offset = Lk - Lq, or seqlens_k - Lq).
        window: (left, right), keys i + offset - left .. i + offset + right take part; None is unbounded on that side.
        softcap: c * tanh(score / c), before biases.
        alibi_slopes: [Hq] or [B, Hq]; adds -slope * abs(i + offset - j). Differentiable.
        sinks: [Hq], one more logit per row that takes part in the sum and has no value. Differentiable.
        return_lse: also return log(sum(exp(score))).

    Returns:
        output [..., Hq, Lq, Dv] in query's dtype, a view of memory laid out [..., Lq, Hq, Dv]. With return_lse also
        lse [..., Hq, Lq], natural log, float32 (float64 for float64), differentiable.

    Numerics: scores, sums and statistics in float32 (float64 for float64), one rounding at the end. Exclusion is a
        predicate: what an excluded key or value holds never matters, NaN included. A row with no key gives output 0,
        lse -inf and zero gradients. A finite mask value is a number. NaN and +inf scores give NaN rows. A row's result
        depends neither on the other rows of the batch nor on the number of threads, bit for bit.

    Raises:
        ValueError: shapes, values, options. TypeError: types and dtypes. RuntimeError: devices; a second derivative of
        the compiled kernels (the reference backend has it).

    Source: online softmax of Milakov and Gimelshein (2018), tiled as in FlashAttention (Dao et al., 2022).
    """
    arguments, features, restore = _normalise(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attn_bias, seqlens_k, causal_alignment,
        window, softcap, alibi_slopes, sinks,
    )
    choice = checks.choice_key(arguments[0], arguments[2], features)
    implementation = dispatch.select(_OP, IMPLEMENTATIONS, choice, lambda: _problem(arguments, features))
    output, lse = implementation.run(*arguments, features)
    if restore is not None:
        output, lse = output.view(*restore, *output.shape[2:]), lse.view(*restore, lse.shape[2])
    return (output, lse) if return_lse else output


@dataclass(frozen=True)
class AttentionProblem(dispatch.Problem):
    """What the choice of an implementation may depend on, and what explain() prints."""

    query_shape: tuple[int, ...]  # [B, Hq, Lq, D]
    key_shape: tuple[int, ...]  # [B, Hkv, Lk, D]
    value_shape: tuple[int, ...]  # [B, Hkv, Lk, Dv]
    bias: str | None  # its dtype
    mask: bool
    seqlens_k: bool
    is_causal: bool
    features: tuple[str, ...]  # of dropout_p, window, softcap, alibi_slopes, sinks


def _unsupported(reasons_of_backend, problem: AttentionProblem) -> tuple[str, ...]:
    reasons = reasons_of_backend(problem)
    return reasons + checks.head_dim_reasons(problem.query_shape[-1], problem.value_shape[-1])


def _cuda_unsupported(problem: AttentionProblem) -> tuple[str, ...]:
    sizes = (("head_dim", problem.query_shape[-1]), ("value's head_dim", problem.value_shape[-1]))
    return checks.cuda_reasons(problem, sizes)


def _run_kernels(kind, query, key, value, bias, mask, seqlens_k, scale, is_causal, bottom_right, features):
    if seqlens_k is not None and checks.page_reads_values(kind, query):
        checks.check_length_values(_OP, "seqlens_k", seqlens_k, key.shape[2])
    alibi_slopes, sinks, dropout_seed, *options = checks.kernel_options(features, query.device)
    tensors = (query, key, value, bias, mask, seqlens_k, alibi_slopes, sinks, dropout_seed)
    refuse_tangents(_OP, kind, query, key, value, bias, alibi_slopes, sinks)
    if wants_grad(query, key, value, bias, alibi_slopes, sinks):
        return AttentionFunction.apply(*distinct(*tensors), scale, is_causal, bottom_right, *options, kind)
    return _forward(*tensors, scale, is_causal, bottom_right, *options, kind)


def _run_reference(query, key, value, bias, mask, seqlens_k, scale, is_causal, bottom_right, features):
    if seqlens_k is not None:
        checks.check_length_values(_OP, "seqlens_k", seqlens_k, key.shape[2])
    return attention_reference(
        query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=True, attn_bias=bias, seqlens_k=seqlens_k,
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


def _forward(query, key, value, bias, mask, seqlens_k, *rest):
    """`rest`: alibi_slopes, sinks, dropout_seed, the numbers from scale to dropout_p, the kind of kernel."""
    *rest, kind = rest
    return RAW_OPS[kind]["attention_forward"](
        query, key, value, _expand(bias, query, key), _expand(mask, query, key), seqlens_k, *rest
    )


def _expand(tensor: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """A mask or bias as a [B, Hq, Lq, Lk] view."""
    return None if tensor is None else tensor.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


class AttentionFunction(torch.autograd.Function):
    """The raw op with its gradient. Outside the op, and entered only when a gradient is wanted: 3 us instead of 10."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        return _forward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        checks.save_for_backward(ctx, inputs, output)

    @staticmethod
    def backward(ctx, grad_output, grad_lse):
        extras = (3, 6, 7)  # bias, alibi_slopes, sinks
        return checks.input_gradients(ctx, _OP, _backward, extras, grad_output, grad_lse)


def _backward(grad_output, grad_lse, query, key, value, output, lse, bias, mask, *rest):
    *rest, kind, need_bias, need_alibi_slopes, need_sinks = rest
    bias_shape = [1, 1, 1, 1] if bias is None else list(bias.shape)
    return RAW_OPS[kind]["attention_backward"](
        grad_output, grad_lse, query, key, value, output, lse, _expand(bias, query, key), _expand(mask, query, key),
        *rest, bias_shape, need_bias, need_alibi_slopes, need_sinks,
    )


def _normalise(
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attn_bias, seqlens_k, causal_alignment,
    window, softcap, alibi_slopes, sinks,
):
    """Checks everything once and brings it to the form the implementations take.

    Returns:
        arguments: query, key, value as 4-D, bias, mask as 4-D with 1 where broadcast, seqlens_k, scale, is_causal,
            bottom_right.
        features: option name -> value, for the options in use that only some backends have.
        restore: the caller's dimensions before [Lq, Dv], or None if there were four.
    """
    query, key, value = checks.autocast(query, key, value)
    attn_mask, attn_bias = checks.autocast_additive(query, attn_mask, attn_bias)
    checks.check_tensors(_OP, query, key, value)
    query, key, value, lead = _to_4d(query, key, value, enable_gqa)
    batch, heads, len_q, head_dim = query.shape
    len_k = key.shape[2]

    bias = mask = None
    if attn_mask is not None or attn_bias is not None:
        bias, mask = _masks(attn_mask, attn_bias, query, lead, (heads, len_q, len_k))
    if seqlens_k is not None:
        checks.check_lengths(_OP, "seqlens_k", seqlens_k, query, batch)
    if is_causal.__class__ is not bool:
        check_flag(_OP, "is_causal", is_causal)
    scale = head_dim**-0.5 if scale is None else check_scale(_OP, scale)
    bottom_right = causal_alignment != "top_left" and check_alignment(_OP, causal_alignment)

    features = checks.NO_FEATURES
    dropout = dropout_p.__class__ is not float or dropout_p != 0.0  # a tensor is refused there, and not compared here
    if dropout or window is not None or softcap is not None or alibi_slopes is not None or sinks is not None:
        features = checks.features_in_use(_OP, query, batch, heads, dropout_p, window, softcap, alibi_slopes, sinks)
    restore = None if lead is not None and len(lead) == 1 else () if lead is None else (*lead, heads)
    arguments = (query, key, value, bias, mask, seqlens_k, scale, is_causal, bottom_right)
    return arguments, features, restore


def _to_4d(query, key, value, enable_gqa):
    """query, key, value as [B, H, L, D], and the caller's dimensions before the heads (None for [L, D] input)."""
    if enable_gqa.__class__ is not bool:
        check_flag(_OP, "enable_gqa", enable_gqa)
    q_shape, k_shape, v_shape = query.shape, key.shape, value.shape
    if k_shape[-2] != v_shape[-2]:
        raise ValueError(f"{_OP}: value has {v_shape[-2]} keys, expected {k_shape[-2]} (key's)")
    if len(q_shape) == 4 and q_shape[:2] == k_shape[:2] == v_shape[:2]:
        return query, key, value, q_shape[:1]
    if len(q_shape) == len(k_shape) == len(v_shape) == 2:
        return query[None, None], key[None, None], value[None, None], None

    query, key, value = (tensor.unsqueeze(0) if tensor.dim() == 2 else tensor for tensor in (query, key, value))
    leads = [tensor.shape[:-3] for tensor in (query, key, value)]
    lead = leads[0]
    for name, other in (("key", leads[1]), ("value", leads[2])):
        if other != lead:
            try:
                lead = torch.broadcast_shapes(lead, other)
            except RuntimeError:
                raise ValueError(f"{_OP}: {name} has leading shape {tuple(other)}, expected {tuple(lead)}") from None
    query, key, value = _match_heads(query, key, value, enable_gqa)
    flat = []
    for tensor in (query, key, value):
        if tensor.shape[:-3] != lead:
            tensor = tensor.expand(*lead, *tensor.shape[-3:])
        flat.append(tensor.unsqueeze(0) if len(lead) == 0 else tensor.flatten(0, -4) if len(lead) > 1 else tensor)
    return *flat, lead


def _match_heads(query, key, value, enable_gqa):
    """Heads that the kernels take: key's and value's equal, query's a multiple of them."""
    heads, key_heads, value_heads = query.shape[-3], key.shape[-3], value.shape[-3]
    if enable_gqa:
        for name, count in (("key", key_heads), ("value", value_heads)):
            if count != heads and (count == 0 or heads % count):
                raise ValueError(f"{_OP}: {name} has {count} heads, expected a divisor of {heads} (query's)")
        if key_heads != value_heads:
            key = key.repeat_interleave(heads // key_heads, dim=-3)
            value = value.repeat_interleave(heads // value_heads, dim=-3)
        return query, key, value
    if heads == 1 and max(key_heads, value_heads) != 1:
        heads = key_heads if key_heads != 1 else value_heads
        query = query.expand(*query.shape[:-3], heads, *query.shape[-2:])
    for name, count in (("key", key_heads), ("value", value_heads)):
        if count not in (1, heads):
            raise ValueError(
                f"{_OP}: {name} has {count} heads, expected {heads} (query's); enable_gqa=True groups query heads"
            )
    if key_heads != value_heads:
        key = key.expand(*key.shape[:-3], heads, *key.shape[-2:])
        value = value.expand(*value.shape[:-3], heads, *value.shape[-2:])
    return query, key, value


def _masks(attn_mask, attn_bias, query, lead, scores_shape):
    """(bias, mask), 4-D. A float attn_mask is a bias; two biases become one sum in float32."""
    target = scores_shape[1:] if lead is None else (*lead, *scores_shape)
    bias = mask = None
    for name, tensor in (("attn_mask", attn_mask), ("attn_bias", attn_bias)):
        if tensor is None:
            continue
        checks.check_additive(_OP, name, tensor, query, allow_bool=name == "attn_mask")
        checks.check_broadcast(_OP, name, tensor.shape, target)
        tensor = _scores_4d(tensor, lead)
        if tensor.dtype == torch.bool:
            mask = tensor
        else:
            bias = tensor if bias is None else _add_biases(bias, tensor)
    return bias, mask


def _scores_4d(tensor: Tensor, lead: torch.Size | None) -> Tensor:
    """A mask or bias with four dimensions, 1 where it broadcasts. Leading dimensions become the batch."""
    if tensor.dim() == 4 and lead is not None and len(lead) == 1:
        return tensor
    if lead is not None and len(lead) > 1 and any(size != 1 for size in tensor.shape[:-3]):
        tensor = tensor.expand(*lead, *tensor.shape[-3:])
        return tensor.flatten(0, -4)
    if tensor.dim() > 4:
        return tensor.flatten(0, -4)
    return tensor[(None,) * (4 - tensor.dim())]


def _add_biases(first: Tensor, second: Tensor) -> Tensor:
    """Their sum in float32 (float64 if one is); -inf in either excludes, whatever the other holds."""
    wide = torch.float64 if torch.float64 in (first.dtype, second.dtype) else torch.float32
    excluded = (first == -torch.inf) | (second == -torch.inf)
    return torch.where(excluded, -torch.inf, first.to(wide) + second.to(wide))


def _problem(arguments, features) -> AttentionProblem:
    query, key, value, bias, mask, seqlens_k, _, is_causal, _ = arguments
    floats = [query, key, value, bias, features.get("alibi_slopes"), features.get("sinks")]
    return AttentionProblem(
        op=_OP,
        device=str(query.device),
        dtype=query.dtype,
        requires_grad=torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in floats),
        query_shape=tuple(query.shape),
        key_shape=tuple(key.shape),
        value_shape=tuple(value.shape),
        bias=None if bias is None else dispatch.dtype_name(bias.dtype),
        mask=mask is not None,
        seqlens_k=seqlens_k is not None,
        is_causal=is_causal,
        features=tuple(features),
    )


def _explain_problem(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, *, attn_bias=None,
    seqlens_k=None, causal_alignment="top_left", window=None, softcap=None, alibi_slopes=None, sinks=None,
    return_lse=False,
):
    arguments, features, _ = _normalise(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attn_bias, seqlens_k, causal_alignment,
        window, softcap, alibi_slopes, sinks,
    )
    return _OP, IMPLEMENTATIONS, _problem(arguments, features)


scaled_dot_product_attention.explain_problem = _explain_problem


# ---- raw ops: csrc/attention.cpp, kernels/triton/attention.py ----
# What is declared with them: shapes, dtypes and layout without data.


@raw_op(
    "attention",
    "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask, Tensor? seqlens_k, "
    f"Tensor? alibi_slopes, Tensor? sinks, Tensor? dropout_seed, {checks.SCHEMA_OPTIONS}) -> (Tensor, Tensor)",
)
def _(query, key, value, *rest):
    batch, heads, len_q, _ = query.shape
    output = query.new_empty(batch, len_q, heads, value.shape[3]).transpose(1, 2)
    return output, query.new_empty(batch, heads, len_q, dtype=checks.statistics_dtype(query))


@raw_op(
    "attention_backward",
    "attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    "Tensor output, Tensor lse, Tensor? bias, Tensor? mask, Tensor? seqlens_k, Tensor? alibi_slopes, Tensor? sinks, "
    f"Tensor? dropout_seed, {checks.SCHEMA_OPTIONS}, {checks.SCHEMA_NEEDS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _(grad_output, grad_lse, query, key, value, output, lse, bias, mask, seqlens_k, alibi_slopes, sinks, *rest):
    grads = [tensor.new_empty(tensor.transpose(1, 2).shape).transpose(1, 2) for tensor in (query, key, value)]
    return *grads, *checks.fake_extra_grads(query, bias, alibi_slopes, sinks, *rest[-4:])
