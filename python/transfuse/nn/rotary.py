"""RotaryEmbedding: the angles of rotary position embedding, and queries and keys rotated by them."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse.ops.rotary import rotary

_SMALLEST_TABLE = 256  # positions: below this, growing the table step by step would cost more than it saves


class RotaryEmbedding(torch.nn.Module):
    """Rotates pair i of the token at position p by the angle ``p * base ** (-2 * i / dim)``.

        rope = transfuse.nn.RotaryEmbedding(128, base=500000.0)          # LLaMA 3; interleaved=True for GPT-J
        query, key = rope(query, key)                                    # positions 0, 1, 2, ...
        query, key = rope(query, key, positions)                         # decoding, packed or left-padded input

    Args:
        dim: columns that are rotated, even, at most head_dim; the others are copied.
        base: wavelength of the slowest pair, in units of 2 pi positions.
        interleaved: pairs are columns (2i, 2i + 1), as in GPT-J; else (i, i + dim/2), as in LLaMA and GPT-NeoX.

    There are no parameters and no buffers: nothing enters state_dict, and ``.half()`` cannot coarsen the frequencies.
    Frequencies and angles are float64 and the tables are rounded once, so position 1,000,000 is as exact as position 1.
    Tables for positions 0, 1, 2, ... are kept and grow on demand; those for given positions are computed by each call
    (``tables`` computes them once for all layers).
    """

    def __init__(self, dim: int, base: float = 10000.0, *, interleaved: bool = False):
        super().__init__()
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"RotaryEmbedding: dim is a {type(dim).__name__}, expected int")
        if dim < 2 or dim % 2:
            raise ValueError(f"RotaryEmbedding: dim is {dim}, expected an even number of at least 2")
        if not base > 0:
            raise ValueError(f"RotaryEmbedding: base is {base}, expected a positive number")
        self.dim, self.base, self.interleaved = dim, float(base), interleaved
        self._kept: tuple[Tensor, Tensor] | None = None

    def forward(self, query: Tensor, key: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        Args:
            query, key: [..., L, D], usually [B, H, L, D], with the same L; their numbers of heads may differ.
            positions: whole numbers, [L], or [B, L] where B is query's first dimension or 1; None is 0 .. L - 1.
        Returns:
            Rotated query and key. Numerics, Raises: as transfuse.rotary.
        """
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        if positions is None:
            cos, sin = self._leading(query.shape[-2], query.device, dtype)
        else:
            cos, sin = self.tables(positions, dtype)
        rotated = (rotary(tensor, cos, sin, interleaved=self.interleaved) for tensor in (query, key))
        return tuple(rotated)

    def tables(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """cos and sin of [..., dim/2] for positions [...], as transfuse.rotary takes them."""
        if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
            name = str(positions.dtype).removeprefix("torch.")
            raise TypeError(f"RotaryEmbedding: positions has dtype {name}, expected whole numbers")
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float64, device=positions.device) / self.dim
        angles = positions.double().unsqueeze(-1) * self.base**-exponents
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _leading(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Tables of positions 0 .. length - 1. Under torch.compile they are part of the graph, and nothing is kept."""
        if torch.compiler.is_compiling():
            return self.tables(torch.arange(length, device=device), dtype)
        kept = self._kept
        if kept is None or kept[0].shape[0] < length or kept[0].device != device or kept[0].dtype != dtype:
            rows = max(_SMALLEST_TABLE, 1 << (length - 1).bit_length())
            with torch.inference_mode(False), torch.no_grad():  # kept tables serve training calls too
                kept = self.tables(torch.arange(rows, device=device), dtype)
            if type(kept[0]) is Tensor and not torch._C._are_functorch_transforms_active():
                self._kept = kept  # not a fake tensor, nor one of a transform that ends
        return kept[0][:length], kept[1][:length]

    def __getstate__(self):
        return {**self.__dict__, "_kept": None}

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base}, interleaved={self.interleaved}"
