"""Mistakes in decode_attention's kernels as they ship: each, put into a copy, is found, by a report or by results.

The narrowest kernel of bfloat16, and the appending in it: a mutant then compiles in seconds.
"""

import emulated_ops
import emulator
import kernel_mutants
import pytest
import torch
from kernel_mutants import SOON, WRONG_RESULT, KernelMutant, copied, is_killed, mode_of, side_by_side
from test_emulation_decode import in_pages

import transfuse
from transfuse import decode_attention

PARTS, TENSOR_CORES, LAUNCHERS = "attention_decode_parts.cuh", "attention_decode_mma.cuh", "attention_decode.cu"
MUTANTS = (
    KernelMutant(
        "a part ends one key early",
        PARTS,
        "static_cast<int>(clamped((static_cast<int64_t>(part) + 1) * part_keys, seen.begin, seen.end))",
        "static_cast<int>(clamped((static_cast<int64_t>(part) + 1) * part_keys - 1, seen.begin, seen.end))",
        (WRONG_RESULT,),
    ),
    KernelMutant(
        "parts are added as they are",
        PARTS,
        "return exp_of_difference(below * logit_scale);",
        "return 1.0f;",
        (WRONG_RESULT,),
    ),
    KernelMutant(
        "the first part of a window is left out",
        PARTS,
        "const int first = seen.begin < seen.end ? seen.begin / part_keys : 0;",
        "const int first = seen.begin < seen.end ? (seen.begin + part_keys - 1) / part_keys : 0;",
        (WRONG_RESULT,),
    ),
    KernelMutant(
        "32-bit offset of a key's row",
        PARTS,
        "work.task.kv_head * t.head + row * t.row;",
        "work.task.kv_head * t.head + static_cast<int>(row * t.row);",
        ("out of bounds",),
    ),
    KernelMutant(
        "keys past the length are read",
        PARTS,
        "return key >= work.keys.begin && key < work.keys.end; }",
        "return key >= work.keys.begin; }",
        ("out of bounds", WRONG_RESULT),
    ),
    KernelMutant(
        "the page after the key's own",
        PARTS,
        "const int64_t block = clamped(block_in_table(c, batch, page), 0, c.num_blocks - 1);",
        "const int64_t block = clamped(block_in_table(c, batch, page + 1), 0, c.num_blocks - 1);",
        ("out of bounds", WRONG_RESULT),
    ),
    KernelMutant(
        "block numbers are trusted",
        PARTS,
        "clamped(block_in_table(c, batch, page), 0, c.num_blocks - 1)",
        "block_in_table(c, batch, page)",
        ("out of bounds",),
    ),
    KernelMutant(
        "lengths are trusted",
        PARTS,
        "return static_cast<int>(clamped(before + c.num_new, 0, c.num_blocks > 0 ? c.capacity : 0));",
        "return static_cast<int>(before + c.num_new);",
        ("out of bounds",),
    ),
    KernelMutant(
        "the wait for keys is too short",
        TENSOR_CORES,
        "ptx::cp_async_wait<ahead>();  // keys",
        "ptx::cp_async_wait<ahead + 1>();  // keys",
        ("pending copy",),
    ),
    KernelMutant(
        "results overwrite values that are read",
        TENSOR_CORES,
        "    __syncwarp();  // no lane reads its values\n",
        "",
        ("race",),
    ),
    KernelMutant(
        "excluded values leak",
        TENSOR_CORES,
        "if (kept_alone || !d.problem.excludes ||",
        "if (true ||",
        (WRONG_RESULT,),
    ),
    KernelMutant(
        "every slice begins at the first row",
        LAUNCHERS,
        "d.slice_first = static_cast<int>(first);",
        "d.slice_first = 0;",
        (WRONG_RESULT,),
    ),
    KernelMutant(
        "the last slice is whole",
        LAUNCHERS,
        "d.slice_rows = static_cast<int>(rows - first < params.slice_rows ? rows - first : params.slice_rows);",
        "d.slice_rows = params.slice_rows;",
        ("out of bounds",),
    ),
    KernelMutant(
        "new keys go to blocks that do not exist",
        LAUNCHERS,
        "  if (block < 0 || block >= a.cache.num_blocks) return;",
        "",
        ("out of bounds",),
    ),
)
# One type and width, and so little room for partial results that every launch takes one tile of rows.
NARROWED = (
    ("attention_decode.cuh", "decode_most_scratch = int64_t{256} << 20;", "decode_most_scratch = 1;"),
    (LAUNCHERS, "      return widest <= 128 ? launch_simt<128>(d, stream) : launch_simt<decode_widest_head_dim>(d, stream);\n",
     "      return cudaErrorNotSupported;\n"),
    (LAUNCHERS, "return decode_16_bits<f16>(d, widest, stream);", "return cudaErrorNotSupported;"),
    (LAUNCHERS, "  if (widest <= 128) return launch_tensor_cores<T, 128>(d, stream);\n", ""),
    (LAUNCHERS, "  return launch_tensor_cores<T, decode_widest_head_dim>(d, stream);", "  return cudaErrorNotSupported;"),
)  # fmt: skip
NAMESPACE = f"{kernel_mutants.NAMESPACE}_decode"


def _mutated(mutant):
    folder = copied("decode", mutant, NARROWED)
    return emulated_ops.compiled("attention_decode", NAMESPACE, [folder / "cuda" / LAUNCHERS], [folder], SOON)


@pytest.fixture(scope="module")
def mutated():
    return side_by_side(_mutated, (None, *MUTANTS))


def _compare(mode, query, key, value, lengths, caches=None, **options):
    """With what the oracle makes of key and value; `caches`: what the kernel gets instead of them."""
    with mode:
        output, lse = decode_attention(query, *(caches or (key, value)), lengths, return_lse=True, **options)
    options.pop("block_table", None)
    with transfuse.use_backend("reference"):
        exact, exact_lse = decode_attention(
            *(t.double() for t in (query, key, value)), lengths, return_lse=True, **options
        )
    near = torch.isclose(output.double(), exact, rtol=0.02, atol=0.02, equal_nan=True).all()
    if not near or not torch.isclose(lse.double(), exact_lse, rtol=1e-5, atol=1e-4).all():
        raise emulator.KernelError(WRONG_RESULT)


def check_decode(mode):
    """Unequal parts, a window, poison beyond the length, slices of rows, pages, rows far apart, wrong tables."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).bfloat16()  # noqa: E731
    lengths = torch.tensor([700, 33])
    query, key, value = draw(2, 4, 2, 40), draw(2, 2, 705, 40), draw(2, 2, 705, 24)
    key[:, :, 256:512] *= 3
    for cache in (key, value):
        cache[0, :, 700:] = cache[1, :, 33:] = torch.nan
    _compare(mode, query, key, value, lengths)
    _compare(mode, query, key, value, lengths, window=(300, None))
    _compare(mode, query, key[:, :, :700], value[:, :, :700], lengths)
    _compare(mode, draw(2, 4, 9, 40), key, value, lengths)  # 18 rows for each key head
    (keys, table), (values, _) = (in_pages(cache, 16) for cache in (key, value))
    _compare(mode, query, key, value, lengths, (keys, values), block_table=table)
    with emulator.Memory() as memory:
        far = memory.strided("far", (1, 1, 3, 40), (0, 0, (1 << 31) + 8, 1), torch.bfloat16, "read-only")
        _compare(mode, query[:1, :2], far.copy_(key[:1, :1, :3]), value[:1, :1, :3], torch.tensor([3]))
    bias = torch.zeros(2, 705)
    bias[0, 8] = -torch.inf
    poisoned = value.clone()
    poisoned[:, :, 8] = torch.nan
    _compare(mode, query, key, poisoned, lengths, attn_bias=bias)
    _wrong_tables(mode, query, keys, values)


def _wrong_tables(mode, query, keys, values):
    table = torch.tensor([[0, 1], [len(keys), 2**30]])
    with mode:
        for lengths in ([32, 32], [2**40, 33]):
            torch.ops.transfuse.decode_attention_forward(
                query, keys, values, torch.tensor(lengths), table, None, None, None, 2, 0.2, -1, 0.0
            )
        new_key, new_value = (torch.ones(2, 2, 1, cache.shape[3]).bfloat16() for cache in (keys, values))
        torch.ops.transfuse.decode_attention_append(
            keys.clone(), values.clone(), torch.tensor([3, 3]), table, new_key, new_value
        )


@pytest.mark.filterwarnings("ignore:.*[Oo]verriding a previously registered kernel")
def test_decode_as_it_ships_passes_what_its_mutants_must_not(mutated):
    for seed in (0, 1):
        check_decode(mode_of(mutated[None], seed, NAMESPACE))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
@pytest.mark.filterwarnings("ignore:.*[Oo]verriding a previously registered kernel")
def test_mutant_of_decode_is_killed(mutated, mutant):
    is_killed(mutant, mutated[mutant], check_decode, (1, 2), NAMESPACE)
