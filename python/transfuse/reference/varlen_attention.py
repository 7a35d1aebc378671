"""Attention over packed sequences, the slow way: unpack to a padded batch, ask the dense oracle, pack again."""

import torch
from torch import Tensor

from transfuse.reference.attention import attention_reference


def varlen_attention_reference(
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
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """attention_reference on each sequence by itself.

    Args:
        query, key, value: [tokens_q, Hq, D], [tokens_k, Hkv, D], [tokens_k, Hkv, Dv].
        cu_seqlens_q, cu_seqlens_k: [N + 1] offsets; sequence n owns rows cu[n] .. cu[n + 1] - 1.
        max_seqlen_q, max_seqlen_k: at least the longest length, or None: read from the offsets.
        attn_bias: [1|N, 1|Hq, max_seqlen_q, max_seqlen_k], indexed by position inside the sequence.

    Returns:
        output [tokens_q, Hq, Dv]; with return_lse also lse [Hq, tokens_q].
    """
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.long(), cu_seqlens_k.long()
    gather_q = _padded_index(cu_seqlens_q, max_seqlen_q)
    gather_k = _padded_index(cu_seqlens_k, max_seqlen_k)
    seqlens_q, seqlens_k = cu_seqlens_q.diff(), cu_seqlens_k.diff()

    output, lse = attention_reference(
        _pad(query, gather_q),
        _pad(key, gather_k),
        _pad(value, gather_k),
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=True,
        attn_bias=attn_bias,
        seqlens_q=seqlens_q,
        seqlens_k=seqlens_k,
        causal_alignment=causal_alignment,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_seed=dropout_seed,
        return_lse=True,
    )
    tokens = torch.arange(query.shape[0], device=query.device)
    sequence = torch.searchsorted(cu_seqlens_q[1:].contiguous(), tokens, right=True)
    position = tokens - cu_seqlens_q[sequence]
    output = output[sequence, :, position]  # [tokens_q, Hq, Dv]
    return (output, lse[sequence, :, position].mT.contiguous()) if return_lse else output


def _padded_index(cu_seqlens: Tensor, max_seqlen: int | None) -> Tensor:
    """[N, max_seqlen] token of every (sequence, position); positions past the end name the sequence's first token."""
    lengths = cu_seqlens.diff()
    if max_seqlen is None:
        max_seqlen = int(lengths.max()) if lengths.numel() else 0
    positions = torch.arange(max_seqlen, device=cu_seqlens.device)
    return cu_seqlens[:-1, None] + torch.where(positions < lengths[:, None], positions, 0)


def _pad(tokens: Tensor, gather: Tensor) -> Tensor:
    """[tokens, H, D] -> [N, H, max_seqlen, D]. The padding repeats real rows; the key and query lengths exclude it."""
    if tokens.shape[0] == 0:
        return tokens.new_zeros(*gather.shape, *tokens.shape[1:]).transpose(1, 2) + 0 * tokens.sum()
    return tokens[gather.clamp(max=tokens.shape[0] - 1)].transpose(1, 2)
