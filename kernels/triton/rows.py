"""How rows are spread over programs, and views of tensors as rows.

Policy: a row that fits stays in registers from its one read to its one write, several short rows to a program; longer
rows are read again in every pass. Which of these, and with it the tree of every sum over a row, depends on the row's
length alone: its bits depend neither on the batch nor on its position in it. The compiler lays a tile out, and adds,
by what it knows of addresses; so what it is told of rows of one length is always the same (on_boundary, as_rows).
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from .launch import Architecture, Launch, architecture_of, launch, taken
from .versions import INTERPRETED, narrowed


@dataclass(frozen=True)
class RowTile:
    """A launch row: rows of up to `cols` elements, `rows` of them to a program."""

    cols: int
    rows: int
    launch: Launch


# Up to 16 elements to a thread: more would spill beside a second operand. Ops have tables of their own, of these rows
# and what was found better for them (with_rows).
TILES = (
    RowTile(16, 64, Launch(4)),
    RowTile(32, 32, Launch(4)),
    RowTile(64, 32, Launch(4)),
    RowTile(128, 16, Launch(4)),
    RowTile(256, 8, Launch(4)),
    RowTile(512, 2, Launch(4)),
    RowTile(1024, 2, Launch(4)),
    RowTile(2048, 1, Launch(4)),
    RowTile(4096, 1, Launch(8)),
    RowTile(8192, 1, Launch(16)),
)
# Longer rows go through a program in steps of so many elements.
STREAMED = RowTile(4096, 1, Launch(8))

_INTERPRETED_ELEMENTS = 1 << 16


def with_rows(*own: RowTile) -> tuple[RowTile, ...]:
    """TILES, with an op's own rows in place of those for rows of the same length."""
    by_cols = {tile.cols: tile for tile in own}
    return tuple(by_cols.get(tile.cols, tile) for tile in TILES)


def rows_at_once(rows_of_tile: int, cols: int, rows: int, architecture: Architecture) -> int:
    """Rows of a tile: the interpreter takes as long for one as for many, so there as many as there are."""
    if architecture.backend != "interpreter":
        return rows_of_tile
    return max(1, min(triton.next_power_of_2(rows), _INTERPRETED_ELEMENTS // cols))


def row_tile(cols: int, rows: int, architecture: Architecture, tiles: tuple[RowTile, ...]) -> RowTile | None:
    """The launch row for rows of `cols` elements; None for rows longer than any, which are streamed."""
    found = next((tile for tile in tiles if cols <= tile.cols), None)
    if found is None:
        return None
    found = taken(found)
    return replace(found, rows=rows_at_once(found.rows, found.cols, rows, architecture))


def tile_of_elements(tile: RowTile, cols: int, rows: int, device: torch.device) -> RowTile:
    """For ops without sums along a row: narrower rows, but as many elements to a program."""
    tile = taken(tile)
    width = min(tile.cols, max(_LEAST_COLS, triton.next_power_of_2(cols)))
    at_once = rows_at_once(max(1, tile.rows * tile.cols // width), width, rows, architecture_of(device))
    return replace(tile, cols=width, rows=at_once)


_LEAST_COLS = 16
_ALIGNED_BYTES = 16  # what the compiler asks of an address
ALIGNED_ELEMENTS = 16  # and, a plain number, of a stride


def is_aligned(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() % _ALIGNED_BYTES == 0


def on_boundary(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor, or a copy where it begins between boundaries, as parts of other tensors may."""
    return tensor if tensor is None or is_aligned(tensor) else tensor.clone()


def _known(number: int) -> tuple[bool, bool]:
    """What the compiler is told of a number."""
    return number == 1, number % ALIGNED_ELEMENTS == 0


def as_rows(tensor: torch.Tensor | None, ndim: int, cols: int) -> tuple[torch.Tensor | None, int]:
    """The tensor as rows of its last `ndim` dimensions: itself and the stride between rows, or a dense copy.

    Taken as it is where columns are adjacent and one stride leads from row to row.
    """
    if tensor is None:
        return None, 0
    stride = cols if tensor.is_contiguous() else _row_stride(tensor, ndim, cols)
    # One row of 20 elements in every 32 would be laid out otherwise than 20 in every 20.
    if stride is None or _known(stride) != _known(cols):
        tensor, stride = tensor.contiguous(), cols
    if not is_aligned(tensor):
        tensor, stride = tensor.clone(memory_format=torch.contiguous_format), cols
    return tensor, stride


def _row_stride(tensor: torch.Tensor, ndim: int, cols: int) -> int | None:
    leading = tensor.dim() - ndim
    adjacent = 1
    for d in range(tensor.dim() - 1, leading - 1, -1):
        if tensor.shape[d] != 1 and tensor.stride(d) != adjacent:
            return None
        adjacent *= tensor.shape[d]
    stride, expected = cols, None
    for d in range(leading - 1, -1, -1):
        if tensor.shape[d] == 1:
            continue
        if expected is None:
            stride = tensor.stride(d)
        elif tensor.stride(d) != expected:
            return None
        expected = tensor.stride(d) * tensor.shape[d]
    return stride


# ---- the second stage of every sum over rows ----
# Programs leave a line of partial sums each, and these are added in one order that depends on their number alone.

LINES = RowTile(64, 32, Launch(4))


@triton.jit
def _add_lines_kernel(lines, total, num_lines, cols, AT_ONCE: tl.constexpr, COLS: tl.constexpr):
    col = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    line = tl.arange(0, AT_ONCE)
    part = tl.zeros([AT_ONCE, COLS], tl.float32)
    for first in range(0, num_lines, AT_ONCE):
        at = (first + line).to(tl.int64)
        inside = (at[:, None] < num_lines) & (col[None, :] < cols)
        part += tl.load(lines + at[:, None] * cols + col[None, :], mask=inside, other=0.0)
    result = tl.sum(part, axis=0)
    tl.store(total + col, narrowed(result, total.dtype.element_ty), mask=col < cols)


def add_lines(lines: torch.Tensor, total: torch.Tensor) -> None:
    """total [cols], of any float dtype, becomes the sum of lines [num_lines, cols], float32; 0 of no lines."""
    num_lines, cols = lines.shape
    tile = taken(LINES)
    width = tile.cols if not INTERPRETED else _INTERPRETED_ELEMENTS // tile.rows
    launch(
        _add_lines_kernel, (triton.cdiv(cols, width),), tile.launch, total.device,
        lines=lines, total=total, num_lines=num_lines, cols=cols, AT_ONCE=tile.rows, COLS=width,
    )  # fmt: skip
