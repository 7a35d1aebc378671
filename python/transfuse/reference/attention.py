"""Attention as the formula says it, in float64: the oracle of the tests, and the `reference` backend.

    score  = softcap(scale * query @ key^T) + bias          softcap(s) = cap * tanh(s / cap)
    weight = softmax(score over the keys that take part)
    output = dropout(weight) @ value,     lse = log(sum(exp(score)))

Which keys take part is decided by predicates before any arithmetic (CONTRACT 1). Two small autograd Functions carry
those predicates through the two matrix products, forward and backward, because 0 * NaN is NaN: an excluded key, value
or output gradient may hold anything. All else is plain PyTorch under torch's own autograd, so every argument that is a
tensor of floats has a gradient, of any order.
"""

import torch
from torch import Tensor

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Philox4x32: Salmon et al., "Parallel random numbers", SC 2011
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10
_WORD = 0xFFFFFFFF


def attention_reference(
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
    seqlens_q: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query @ key^T + bias) @ value over the keys that take part.

    Args:
        query, key, value: [..., Hq, Lq, D], [..., Hkv, Lk, D], [..., Hkv, Lk, Dv], any float dtype, any strides.
        attn_mask: bool (True = keep) or additive float; attn_bias: additive. Both broadcast to [..., Hq, Lq, Lk].
        seqlens_q, seqlens_k: valid queries and keys of each batch entry; the rest of the rows and keys are excluded,
            and "bottom_right" aligns the last valid query with the last valid key.
        window: (left, right) keys either side of the aligned position, inclusive; None is unbounded.
        alibi_slopes: [Hq] or [B, Hq]. sinks: [Hq], one more logit in the softmax sum, with no value.
        dropout_seed: int64 [2], (seed, offset) of Philox; needed when dropout_p > 0.

    Returns:
        output [..., Hq, Lq, Dv] in query's dtype; with return_lse also lse [..., Hq, Lq], float32 (float64 for
        float64).

    Numerics: float64 throughout, one rounding at the end. A row with no key: output 0, lse -inf, all gradients 0.
    """
    dtype, lse_dtype = query.dtype, torch.float64 if query.dtype == torch.float64 else torch.float32
    if scale is None:
        scale = query.shape[-1] ** -0.5
    query, key, value = (tensor.double() for tensor in (query, key, value))
    if query.dim() > 2:
        heads = query.shape[-3]
        if enable_gqa and key.shape[-3] != heads:
            group = heads // key.shape[-3]
            key, value = key.repeat_interleave(group, dim=-3), value.repeat_interleave(group, dim=-3)
        batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        query, key, value = (tensor.expand(*batch, *tensor.shape[-2:]) for tensor in (query, key, value))

    batch, len_q, len_k = query.shape[:-2], query.shape[-2], key.shape[-2]
    rows = torch.arange(len_q, device=query.device).unsqueeze(-1)  # [Lq, 1]
    columns = torch.arange(len_k, device=query.device)  # [Lk]
    lengths_q = len_q if seqlens_q is None else _per_batch(seqlens_q, batch)
    lengths_k = len_k if seqlens_k is None else _per_batch(seqlens_k, batch)
    offset = lengths_k - lengths_q if causal_alignment == "bottom_right" else 0
    distance = columns - (rows + offset)  # how far the key lies after the aligned position of its query

    keep = torch.ones(len_q, len_k, dtype=torch.bool, device=query.device)
    if seqlens_q is not None:
        keep = keep & (rows < lengths_q)
    if seqlens_k is not None:
        keep = keep & (columns < lengths_k)
    if is_causal:
        keep = keep & (distance <= 0)
    if window is not None:
        left, right = window
        if left is not None:
            keep = keep & (distance >= -left)
        if right is not None:
            keep = keep & (distance <= right)
    biases = [attn_bias]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        keep = keep & attn_mask
    else:
        biases.append(attn_mask)
    biases = [bias.double() for bias in biases if bias is not None]
    for bias in biases:
        keep = keep & (bias != -torch.inf)

    scores = _KeptScores.apply(query, key, keep) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    for bias in biases:
        scores = scores + bias
    if alibi_slopes is not None:
        slopes = alibi_slopes.double()
        slopes = slopes.reshape(*(batch if slopes.dim() > 1 else batch[-1:]), 1, 1)
        scores = scores - slopes * distance.abs()
    sink = None if sinks is None else sinks.double().view(-1, 1, 1)
    weights, lse = _softmax(scores, keep, sink)
    if dropout_p > 0:
        kept_draws = dropout_keep_mask(dropout_seed, dropout_p, (*batch, len_q, len_k))
        weights = torch.where(kept_draws, weights / (1.0 - dropout_p), 0.0) if dropout_p < 1 else weights * 0.0
    output = _KeptSum.apply(weights, value, keep).to(dtype)
    return (output, lse.to(lse_dtype)) if return_lse else output


def dropout_keep_mask(seed: Tensor, dropout_p: float, shape: tuple[int, ...]) -> Tensor:
    """True where a weight of [..., H, Lq, Lk] survives: Philox4x32-10, one word per weight (CONTRACT 3).

    The counter is (key // 4, query, batch * H + head, offset), the Philox key is the seed, and key % 4 picks the word;
    a weight is kept if its word >= dropout_p * 2**32. `seed` is an int64 tensor (seed, offset), never read on the host.
    """
    *batch, len_q, len_k = shape
    device = seed.device
    heads = 1
    for size in batch:
        heads = heads * size
    groups = (len_k + 3) // 4
    counter = [
        torch.arange(groups, device=device).view(1, 1, -1),
        torch.arange(len_q, device=device).view(1, -1, 1),
        torch.arange(heads, device=device).view(-1, 1, 1),
        seed[1] & _WORD,
    ]
    words = philox(counter, [seed[0] & _WORD, (seed[0] >> 32) & _WORD])
    words = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(-2)[..., :len_k]  # [H, Lq, Lk]
    return (words >= dropout_p * 2.0**32).view(shape)


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Four random words (int64 holding 32 bits) from a counter of four words and a key of two: Philox4x32-10."""
    for _ in range(_PHILOX_ROUNDS):
        # int64 products wrap, but their 64 bits are those of the unsigned product
        product0, product1 = counter[0] * _PHILOX_MULTIPLIERS[0], counter[2] * _PHILOX_MULTIPLIERS[1]
        counter = [
            ((product1 >> 32) & _WORD) ^ counter[1] ^ key[0],
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ counter[3] ^ key[1],
            product0 & _WORD,
        ]
        key = [(word + weyl) & _WORD for word, weyl in zip(key, _PHILOX_WEYL)]
    return counter


def _per_batch(seqlens: Tensor, batch: torch.Size) -> Tensor:
    """[B] lengths as [..., 1, 1, 1], to broadcast against scores of batch shape [..., H]."""
    return seqlens.reshape(*batch[:-1], 1, 1, 1)


def _softmax(scores: Tensor, keep: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights and log-sum-exp over the last dimension of the kept scores; a row with none has weights 0, lse -inf."""
    scores = torch.where(keep, scores, -torch.inf)
    if scores.shape[-1] == 0:
        maximum = scores.new_full((*scores.shape[:-1], 1), -torch.inf)
    else:
        maximum = scores.detach().amax(dim=-1, keepdim=True)
    if sink is not None:
        maximum = torch.maximum(maximum, sink.detach())
    maximum = torch.where(maximum == -torch.inf, 0.0, maximum)
    exps = torch.where(keep, torch.exp(scores - maximum), 0.0)
    total = exps.sum(dim=-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - maximum)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -torch.inf, torch.log(total) + maximum).squeeze(-1)
    return exps / total, lse


def _kept_sum(weights: Tensor, values: Tensor, keep: Tensor) -> Tensor:
    """sum over kept j of weights[i, j] * values[j]: what IEEE says for kept terms, and nothing from the others."""
    weights = torch.where(keep, weights, 0.0)
    finite = torch.isfinite(values)
    total = weights @ torch.where(finite, values, 0.0)
    if _may_read(finite) and bool(finite.all()):
        return total
    keep = keep.expand(weights.shape)

    def meets(one: Tensor, other: Tensor) -> Tensor:
        return one.double() @ other.double() > 0

    up = meets(weights > 0, values == torch.inf) | meets(weights < 0, values == -torch.inf)
    down = meets(weights > 0, values == -torch.inf) | meets(weights < 0, values == torch.inf)
    bad = meets(keep & ~((weights > 0) | (weights < 0)), ~finite) | meets(keep, values.isnan()) | (up & down)
    total = torch.where(up, torch.inf, torch.where(down, -torch.inf, total))
    return torch.where(bad, torch.nan, total)


def _may_read(tensor: Tensor) -> bool:
    """A plain tensor with values, outside of tracing; elsewhere the general formula is used, with equal results."""
    return type(tensor) is Tensor and not tensor.is_meta and not torch.compiler.is_compiling()


class _KeptScores(torch.autograd.Function):
    """query @ key^T where kept, 0 elsewhere; its gradients sum over kept pairs only."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, keep: Tensor) -> Tensor:
        return torch.where(keep, query @ key.mT, 0.0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        query, key, keep = ctx.saved_tensors
        return _KeptSum.apply(grad, key, keep), _KeptSum.apply(grad.mT, query, keep.mT), None


class _KeptSum(torch.autograd.Function):
    """weights @ values over kept pairs; its gradients are kept scores and kept sums again."""

    @staticmethod
    def forward(weights: Tensor, values: Tensor, keep: Tensor) -> Tensor:
        return _kept_sum(weights, values, keep)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        weights, values, keep = ctx.saved_tensors
        return _KeptScores.apply(grad, values, keep), _KeptSum.apply(weights.mT, grad, keep.mT), None
