"""pack and unpack: a padded batch as one row of tokens without the padding, and back.

    packed, packing = pack(hidden, attention_mask)        # [B, L, ...] -> [tokens, ...]
    output = varlen_attention(q, k, v, packing.cu_seqlens, max_seqlen_q=packing.max_seqlen)
    padded = unpack(output, packing)                      # [tokens, ...] -> [B, L, ...], zeros at padded places
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from transfuse.checks import check_tensor
from transfuse.dispatch import dtype_name


@dataclass(frozen=True, eq=False)  # by identity: == of tensors is no bool, and they do not hash by value
class Packing:
    """Where each token of a packed batch stands in the padded one.

    Args:
        indices: int64 [tokens], position of each kept token in the flattened [B * L] batch, ascending.
        cu_seqlens: int32 [B + 1], sequence b owns tokens cu_seqlens[b] .. cu_seqlens[b + 1] - 1; an all-padding row
            owns none.
        max_seqlen: the longest sequence, a Python int.
        shape: the padded shape, (B, L); any number of dimensions, the last one is the sequence.
    """

    indices: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    shape: tuple[int, ...]

    def parts(self, tokens: int) -> Iterator["tuple[slice, Packing]"]:
        """Whole sequences in groups of about ``tokens`` tokens, more where one is longer: their tokens, their Packing."""
        bounds = self.cu_seqlens.tolist()
        first, last = 0, len(bounds) - 1
        while first < last:
            stop = first + 1
            while stop < last and bounds[stop + 1] - bounds[first] <= tokens:
                stop += 1
            rows = slice(bounds[first], bounds[stop])
            if (first, stop) == (0, last):
                yield rows, self
            elif rows.start < rows.stop:
                longest = max(b - a for a, b in pairwise(bounds[first : stop + 1]))
                cu_seqlens = self.cu_seqlens[first : stop + 1] - bounds[first]
                yield rows, Packing(self.indices[rows], cu_seqlens, longest, (stop - first, *self.shape[-1:]))
            first = stop


def pack(input: Tensor, attention_mask: "Tensor | Packing") -> tuple[Tensor, Packing]:
    """Keeps the tokens whose mask is set, in order, and says where they were.

    Args:
        input: [*shape, ...], any dtype; shape is the mask's.
        attention_mask: [B, L] (or any shape with the sequence last), bool or integer, nonzero = keep. Any pattern is
            packed exactly: holes, left padding, a row with nothing kept. Or the Packing of an earlier call, to pack a
            further tensor without counting again.

    Returns:
        packed [tokens, ...] and its Packing.

    Numerics: a copy, bit for bit; the gradient goes back to the kept places, zero elsewhere. Differentiable any number
        of times. One synchronisation on a GPU (the number of tokens decides the shape); none with a Packing.

    Raises:
        TypeError: input is no tensor, or attention_mask is floating point (a score mask is not a keep mask).
        ValueError: the leading shape of input is not the mask's. RuntimeError: another device.
    """
    check_tensor("pack", "input", input)
    packing = attention_mask if isinstance(attention_mask, Packing) else _packing_of(attention_mask)
    dims = len(packing.shape)
    if tuple(input.shape[:dims]) != packing.shape:
        shape = tuple(input.shape)
        raise ValueError(f"pack: input has shape {shape}, expected {packing.shape} + any (attention_mask's)")
    if input.device != packing.indices.device:
        raise RuntimeError(f"pack: input is on {input.device}, expected {packing.indices.device} (attention_mask's)")
    return input.flatten(0, dims - 1).index_select(0, packing.indices), packing


def unpack(packed: Tensor, packing: Packing) -> Tensor:
    """The padded batch of packed tokens, exactly 0 at padded places.

    Args:
        packed: [tokens, ...], any dtype.
        packing: as returned by pack.

    Returns:
        [*packing.shape, ...].

    Numerics: a copy, bit for bit; the gradient is that of the kept places. Differentiable any number of times.

    Raises:
        TypeError: packed is no tensor, packing no Packing. ValueError: another number of tokens. RuntimeError: another
        device.
    """
    check_tensor("unpack", "packed", packed)
    if not isinstance(packing, Packing):
        raise TypeError(f"unpack: packing is a {type(packing).__name__}, expected a Packing (as pack returns)")
    tokens = packing.indices.shape[0]
    if packed.dim() == 0 or packed.shape[0] != tokens:
        raise ValueError(f"unpack: packed has shape {tuple(packed.shape)}, expected ({tokens}, ...) (packing's tokens)")
    if packed.device != packing.indices.device:
        raise RuntimeError(f"unpack: packed is on {packed.device}, expected {packing.indices.device} (packing's)")
    places = 1
    for size in packing.shape:
        places = places * size
    padded = packed.new_zeros(places, *packed.shape[1:]).index_copy(0, packing.indices, packed)
    return padded.view(*packing.shape, *packed.shape[1:])


def _packing_of(mask: Tensor) -> Packing:
    check_tensor("pack", "attention_mask", mask, "a Tensor or a Packing")
    if mask.is_meta:
        raise RuntimeError("pack: attention_mask is on meta, expected a device with values (they decide the shape)")
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"pack: attention_mask has dtype {dtype_name(mask.dtype)}, expected bool or integer (nonzero = keep)")
    if mask.dim() == 0:
        raise ValueError("pack: attention_mask has shape (), expected (B, L)")
    keep = mask != 0
    lengths = keep.sum(dim=-1, dtype=torch.int32).flatten()
    cu_seqlens = torch.zeros(lengths.shape[0] + 1, dtype=torch.int32, device=mask.device)
    torch.cumsum(lengths, dim=0, dtype=torch.int32, out=cu_seqlens[1:])
    max_seqlen = int(lengths.max()) if lengths.shape[0] else 0
    return Packing(keep.flatten().nonzero().squeeze(1), cu_seqlens, max_seqlen, tuple(mask.shape))
