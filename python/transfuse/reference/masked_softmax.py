"""Masked softmax in float64, rounded once: the oracle of transfuse.masked_softmax and its reference backend."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_softmax_reference(input: Tensor, mask: Tensor | None = None, scale: float = 1.0, is_causal: bool = False,
                             bottom_right: bool = False) -> Tensor:
    """softmax over the last dimension of ``scale * input + mask``; an excluded key weighs 0, and so does a row of them.

    Args:
        input: [..., queries, keys], floating dtype.
        mask: bool (True keeps) or floating (added; -inf excludes), broadcastable to input.
        scale: factor of input.
        is_causal: query i sees keys j <= i (+ keys - queries where ``bottom_right``).
    """
    scores = input.double() * scale
    valid = torch.ones((), dtype=torch.bool, device=input.device)
    if mask is not None and mask.dtype == torch.bool:
        valid = mask
    elif mask is not None:
        valid = mask != -torch.inf
        scores = scores + torch.where(valid, mask, 0).double()
    if is_causal:
        queries, keys = input.shape[-2:]
        offset = keys - queries if bottom_right else 0
        valid = valid & torch.ones(queries, keys, dtype=torch.bool, device=input.device).tril(offset)
    valid = valid.expand(scores.shape)
    if scores.numel() == 0:
        return scores.to(input.dtype)
    some = valid.any(-1, keepdim=True)
    largest = torch.where(valid, scores, -torch.inf).amax(-1, keepdim=True).detach()
    shifted = torch.where(valid, scores - largest, 0)  # a select on both sides of exp: no gradient through excluded keys
    weights = torch.where(valid, shifted.exp(), 0)
    total = torch.where(some, weights.sum(-1, keepdim=True), 1)
    return torch.where(valid, weights / total, 0).to(input.dtype)
