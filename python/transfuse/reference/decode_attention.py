"""Decoding against a key/value cache, the slow way: append, gather the pages, ask the dense oracle."""

import torch
from torch import Tensor

from transfuse.reference.attention import attention_reference


def decode_attention_reference(
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
    """Writes the new keys and values into the cache, then attends causally, bottom-right, over the valid keys.

    Args:
        query: [B, Hq, Lq, D].
        key_cache, value_cache: [B, Hkv, Lmax, D | Dv], or with block_table [blocks, block_size, Hkv, D | Dv].
        cache_seqlens: [B] valid keys before new_key, which is written in place from that index on.
        new_key, new_value: [B, Hkv, Lnew, D | Dv].
        block_table: [B, max_blocks]; entries beyond the valid keys are not looked at.
        attn_bias: broadcasts to [B, Hq, Lq, Lmax], indexed by key position.

    Returns:
        output [B, Hq, Lq, Dv]; with return_lse also lse [B, Hq, Lq].
    """
    seqlens = cache_seqlens.long()
    if new_key is not None:
        _append(key_cache, new_key, seqlens, block_table)
        _append(value_cache, new_value, seqlens, block_table)
        seqlens = seqlens + new_key.shape[2]
    if block_table is not None:
        key_cache, value_cache = (_gather(cache, block_table, seqlens) for cache in (key_cache, value_cache))
    return attention_reference(
        query, key_cache, value_cache, is_causal=True, causal_alignment="bottom_right", scale=scale, enable_gqa=True,
        attn_bias=attn_bias, seqlens_k=seqlens, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
        return_lse=return_lse,
    )


def _append(cache: Tensor, new: Tensor, seqlens: Tensor, block_table: Tensor | None) -> None:
    """Entry b's token t goes to position seqlens[b] + t."""
    batch, heads, length, _ = new.shape
    entry = torch.arange(batch, device=new.device).unsqueeze(-1)  # [B, 1]
    position = seqlens.unsqueeze(-1) + torch.arange(length, device=new.device)  # [B, Lnew]
    tokens = new.transpose(1, 2).to(cache.dtype)  # [B, Lnew, Hkv, D]
    if block_table is None:
        cache.transpose(1, 2)[entry, position] = tokens
    else:
        block_size = cache.shape[1]
        cache[block_table.long()[entry, position // block_size], position % block_size] = tokens


def _gather(cache: Tensor, block_table: Tensor, seqlens: Tensor) -> Tensor:
    """[B, Hkv, max_blocks * block_size, D]: the pages of each entry one after the other; what lies beyond is page 0."""
    block_size, pages = cache.shape[1], block_table.shape[1]
    used = torch.arange(pages, device=cache.device) * block_size < seqlens.unsqueeze(-1)
    table = torch.where(used, block_table.long(), 0)
    if cache.shape[0] == 0:
        return cache.new_zeros(table.shape[0], cache.shape[2], pages * block_size, cache.shape[3])
    return cache[table].flatten(1, 2).transpose(1, 2)
