"""Mistakes in attention's tensor-core kernel as it ships: each, put into a copy, is found, by a report or by results.

One head dimension, one type, forward: a mutant then compiles in seconds.
"""

import functools

import emulator
import pytest
import torch
from kernel_mutants import ATTENTION_HEAD_DIM as HEAD_DIM
from kernel_mutants import WRONG_RESULT, KernelMutant, is_killed, mode_of, mutated_attention, side_by_side

import transfuse
from transfuse import scaled_dot_product_attention

MUTANTS = (
    KernelMutant(
        "a stage is overwritten while it is read",
        "attention_forward.cuh",
        "      __syncthreads();  // this stage is there for all, and nobody reads the other one any more\n",
        "",
        ("race", "pending copy", "uninitialised read"),
    ),
    KernelMutant(
        "the wait for a stage is left out",
        "attention_forward.cuh",
        "      ptx::cp_async_wait<0>();\n      __syncthreads();",
        "      ptx::cp_async_wait<1>();\n      __syncthreads();",
        ("pending copy",),
    ),
    KernelMutant(
        "outputs take the queries' place too early",
        "attention_forward.cuh",
        "    __syncwarp();  // no lane reads the warp's queries any more\n",
        "",
        ("race",),
    ),
    KernelMutant(
        "rows are read past the last key",
        "attention_tile.cuh",
        "row < rows ? min(max(columns",
        "row <= rows ? min(max(columns",
        ("out of bounds", WRONG_RESULT),
    ),
    KernelMutant(
        "32-bit offset of a key's row",
        "attention_forward.cuh",
        "return row * t.row;",
        "return static_cast<int>(row * t.row);",
        ("out of bounds",),
    ),
    KernelMutant(
        "a whole tile goes on a row too early",
        "attention_tile.cuh",
        "from += Tile::rows * row_stride;",
        "from += (Tile::rows - 1) * row_stride;",
        (WRONG_RESULT,),
    ),
    KernelMutant(
        "odd rows taken as whole vectors",
        "attention_alignment.cuh",
        "whole(t.head) &&\n      whole(t.row)",
        "whole(t.head)",
        ("misaligned access",),
    ),
    KernelMutant(
        "one key too many below the diagonal",
        "attention_scores.cuh",
        "at >= end)",
        "at > end)",
        (WRONG_RESULT,),
    ),
    KernelMutant(
        "earlier sums keep the old maximum",
        "attention_forward.cuh",
        "output[t][n][e] *= factors[e / 2]",
        "output[t][n][e] *= factors[0]",
        (WRONG_RESULT,),
    ),
    KernelMutant(
        "excluded values leak",
        "attention_forward.cuh",
        "p.excludes && __syncthreads_or(!block.is_finite())",
        "false",
        (WRONG_RESULT,),
    ),
    KernelMutant(
        "saturated rows are not refined",
        "attention_scores.cuh",
        "saturated_logit = 128.0f",
        "saturated_logit = 1e30f",
        (WRONG_RESULT,),
    ),
    KernelMutant(
        "no exact walk for saturated rows",
        "attention_forward.cuh",
        "__syncthreads_or(block.saturated)",
        "false",
        (WRONG_RESULT,),
    ),
    KernelMutant(
        "dropout draws for another query",
        "attention_dropout.cuh",
        "odd ? rows[1].query : rows[0].query",
        "odd ? rows[0].query : rows[1].query",
        (WRONG_RESULT,),
    ),
)


@pytest.fixture(scope="module")
def mutated():
    return side_by_side(functools.partial(mutated_attention, "forward"), (None, *MUTANTS))


def _compare(mode, tensors, **options):
    torch.manual_seed(0)
    with mode:
        output, lse = scaled_dot_product_attention(*tensors, return_lse=True, **options)
    torch.manual_seed(0)
    with transfuse.use_backend("reference"):
        exact, exact_lse = scaled_dot_product_attention(*(t.double() for t in tensors), return_lse=True, **options)
    near = torch.isclose(output.double(), exact, rtol=0.02, atol=0.02, equal_nan=True).all()
    if not near or not torch.isclose(lse.double(), exact_lse, rtol=1e-6, atol=1e-5).all():
        raise emulator.KernelError(WRONG_RESULT)


def check_attention(mode):
    """Ragged tiles, odd rows, rows far apart, a diagonal, poison where nothing is kept, large scores, dropout."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).bfloat16()  # noqa: E731
    query, key, value = draw(1, 1, 33, HEAD_DIM), draw(1, 1, 150, HEAD_DIM), draw(1, 1, 150, HEAD_DIM)
    _compare(mode, (query, key, value))
    _compare(mode, (query, key, value), is_causal=True, causal_alignment="bottom_right")
    _compare(mode, (query, draw(1, 1, 160, HEAD_DIM + 1)[:, :, :150, :-1], value))  # its rows alone are odd
    with emulator.Memory() as memory:
        far = memory.strided("far", (1, 1, 3, HEAD_DIM), (0, 0, (1 << 31) + 8, 1), torch.bfloat16, "read-only")
        _compare(mode, (query, far.copy_(key[:, :, :3]), value[:, :, :3]))
    keep = torch.rand(33, 150, generator=generator) < 0.5
    keep[:, 7] = False
    poisoned = value.clone()
    poisoned[:, :, 7] = torch.nan
    _compare(mode, (query, key, poisoned), attn_mask=keep)
    _saturated(mode)
    _dropout(mode, query, key)


def _saturated(mode):
    """Logits near 2^25, where floats are 4 apart, that differ by eighths."""
    query, key = torch.zeros(1, 1, 16, HEAD_DIM), torch.zeros(1, 1, 64, HEAD_DIM)
    query[..., 0], query[..., 16] = 8192.0, 0.125
    key[..., 0], key[..., 16] = 4096.0, torch.arange(64.0)
    value = torch.arange(64.0).view(1, 1, 64, 1).expand(1, 1, 64, HEAD_DIM) / 32 - 1
    _compare(mode, tuple(t.bfloat16() for t in (query, key, value)), scale=1.0)


def _dropout(mode, query, key):
    """Unit vectors as values tell which weights were kept."""
    value = torch.eye(HEAD_DIM).bfloat16()[None, None]
    _compare(mode, (query, key[:, :, :HEAD_DIM], value), dropout_p=0.5)


@pytest.mark.filterwarnings("ignore:.*[Oo]verriding a previously registered kernel")
def test_attention_as_it_ships_passes_what_its_mutants_must_not(mutated):
    for seed in (0, 1):
        check_attention(mode_of(mutated[None], seed))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
@pytest.mark.filterwarnings("ignore:.*[Oo]verriding a previously registered kernel")
def test_mutant_of_attention_is_killed(mutated, mutant):
    is_killed(mutant, mutated[mutant], check_attention, seeds=(1, 2))
