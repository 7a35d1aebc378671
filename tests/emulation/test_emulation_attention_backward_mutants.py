"""Mistakes in attention's tensor-core backward as it ships: each, put into a copy, is found, by a report or by results.

One head dimension, one type; what the forward saves is the CPU's, so that a mutant compiles soon.
"""

import contextlib
import functools

import emulator
import pytest
import torch
from kernel_mutants import ATTENTION_HEAD_DIM as HEAD_DIM
from kernel_mutants import WRONG_RESULT, KernelMutant, is_killed, mode_of, mutated_attention, side_by_side

import transfuse
from transfuse import scaled_dot_product_attention
from transfuse.testing import draw

BACKWARD, KEYS, PAIRS, BIAS = (f"attention_backward{part}.cuh" for part in ("", "_keys", "_pairs", "_bias"))
MUTANTS = (
    KernelMutant(
        "dQ: a stage is overwritten while it is read",
        BACKWARD,
        "      __syncthreads();  // this stage is there for all, and nobody reads the other one any more\n"
        "      if (key",
        "      if (key",
        ("race", "pending copy", "uninitialised read"),
    ),
    KernelMutant(
        "dK: the wait for a stage is left out",
        KEYS,
        "ptx::cp_async_wait<0>();\n        __syncthreads();",
        "ptx::cp_async_wait<1>();\n        __syncthreads();",
        ("pending copy",),
    ),
    KernelMutant(
        "dbias: tiles are overwritten while they are read",
        BIAS,
        "    __syncthreads();  // nobody reads the tiles of the head before any more\n",
        "",
        ("race",),
    ),
    KernelMutant("dQ: the diagonal is not seen", BACKWARD, "if (this->is_edge(key))", "if (false)", (WRONG_RESULT,)),
    KernelMutant("dK: the diagonal is not seen", KEYS, "if (this->is_edge(query))", "if (false)", (WRONG_RESULT,)),
    KernelMutant(
        "dK: statistics of the next tile are this one's",
        KEYS,
        "streams.statistic[j] += queries * statistic_of(i).row;",
        "",
        (WRONG_RESULT,),
    ),
    KernelMutant("dK without its scale", KEYS, "{p.scale, p.scale}", "{1.0f, 1.0f}", (WRONG_RESULT,)),
    KernelMutant(
        "a query too many sees a key",
        KEYS,
        "at >= seen_by[half].seen.begin && at <",
        "at + 1 >= seen_by[half].seen.begin && at <",
        (WRONG_RESULT,),
    ),
    KernelMutant(
        "dropout takes the word of a neighbouring key",
        PAIRS,
        "low = key & 1 ? words.word[1] : words.word[0]",
        "low = key & 1 ? words.word[0] : words.word[1]",
        (WRONG_RESULT,),
    ),
    KernelMutant(
        "32-bit offset of a row",
        BACKWARD,
        "[&](int r) { return r * t.row; }",
        "[&](int r) { return static_cast<int>(r * t.row); }",
        ("out of bounds",),
    ),
    KernelMutant("excluded values leak", KEYS, "if (kept_alone || !p.excludes) break;", "break;", (WRONG_RESULT,)),
    KernelMutant(
        "delta of the rounded output alone",
        PAIRS,
        "const double delta = is_part ? row.delta : sum_of_products - grad_lse;",
        "const double delta = row.delta;",
        (WRONG_RESULT,),
    ),
    KernelMutant(
        "weights are not normalised",
        PAIRS,
        "weight_of<T>(p, difference) * row.normaliser",
        "weight_of<T>(p, difference)",
        (WRONG_RESULT,),
    ),
    KernelMutant("sums of columns go on from head to head", KEYS, "      key_sum[half] = 0;\n", "", (WRONG_RESULT,)),
    KernelMutant(
        "a broadcast bias's gradient from the first sequence alone",
        BIAS,
        "batch_end = all_batches ? g.problem.num_sequences : own_batch + 1;",
        "batch_end = own_batch + 1;",
        (WRONG_RESULT,),
    ),
    KernelMutant("dsink without its sign", PAIRS, "-factor * share * delta", "factor * share * delta", (WRONG_RESULT,)),
)


@pytest.fixture(scope="module")
def mutated():
    return side_by_side(functools.partial(mutated_attention, "backward"), (None, *MUTANTS))


EXTRAS = ("attn_bias", "sinks")  # what gets a gradient beside query, key and value


def _gradients(tensors, options, grad, mode):
    """Of the three tensors, then of a bias or sinks. The forward is outside of the mode."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    extras = {name: options[name].detach().requires_grad_() for name in EXTRAS if name in options}
    torch.manual_seed(0)
    output = scaled_dot_product_attention(*leaves, **options | extras)
    with mode:
        return torch.autograd.grad(output, [*leaves, *extras.values()], grad)


def _compare(mode, tensors, judged=slice(None), clean=None, **options):
    """`clean`: tensors that have the same gradients."""
    grad = draw(*tensors[0].shape[:3], tensors[2].shape[3], seed=9).bfloat16()
    found = _gradients(tensors, options, grad, mode)
    wide = {n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in options.items()}
    with transfuse.use_backend("reference"):
        exact = _gradients([t.double() for t in clean or tensors], wide, grad.double(), contextlib.nullcontext())
    for index, (a, e) in list(enumerate(zip(found, exact, strict=True)))[judged]:
        error = (a.double() - e).abs().max()
        if not error <= 0.02 * e.abs().max():
            raise emulator.KernelError(f"{WRONG_RESULT}: gradient {index}, {float(error):.3g}")


def check_backward(mode):
    """A diagonal, dropout, poison, rows far apart, large scores, sums that cancel, biases broadcast each way."""
    query, key, value = (draw(2, 2, length, HEAD_DIM, seed=i).bfloat16() for i, length in enumerate((70, 75, 75)))
    one = slice(0, 1)
    _compare(mode, (query, key, value), is_causal=True, sinks=draw(2, seed=4))
    _compare(mode, (query[one], key[one], value[one]), dropout_p=0.4, is_causal=True)
    for shape in ((1, 2, 70, 75), (2, 2, 1, 75), (2, 2, 70, 75)):
        bias = draw(*shape, seed=5).bfloat16()
        _compare(mode, (query, key[:, one], value[:, one]), attn_bias=bias, enable_gqa=True)
    keep = torch.rand(70, 75, generator=torch.Generator().manual_seed(6)) < 0.5
    keep[7] = keep[:, 7] = False
    poisoned = query[one].clone(), key[one], value[one].clone()
    poisoned[0][:, :, 7] = poisoned[2][:, :, 7] = torch.nan
    _compare(mode, poisoned, clean=(query[one], key[one], value[one]), attn_mask=keep)
    with emulator.Memory() as memory:
        far = memory.strided("far", (1, 1, 3, HEAD_DIM), (0, 0, (1 << 31) + 8, 1), torch.bfloat16, "read-only")
        _compare(mode, (query[one, one], far.copy_(key[one, one, :3]), value[one, one, :3]))
    _cancelling(mode, query, key, value)
    _saturated(mode)


def _cancelling(mode, query, key, value):
    """What a constant added to a row's scores changes is nothing, however output and lse were rounded."""
    bias = torch.zeros(2, 2, 70, 1)
    grad = draw(*query.shape, seed=9).bfloat16()
    *_, found = _gradients((query, key, value), {"attn_bias": bias}, grad, mode)
    if found.abs().max() > 1e-5:
        raise emulator.KernelError(f"{WRONG_RESULT}: {float(found.abs().max()):.3g} where dS sums to 0")


def _saturated(mode):
    """Logits near 2^25, where floats are 4 apart, all equal: lse says nothing of how many they are. dS is 0 but for
    rounding; dV tells the weights."""
    query, key = torch.zeros(1, 1, 16, HEAD_DIM), torch.zeros(1, 1, 64, HEAD_DIM)
    query[..., 0], key[..., 0] = 8192.0, 4096.0
    value = torch.arange(64.0).view(1, 1, 64, 1).expand(1, 1, 64, HEAD_DIM) / 32 - 1
    _compare(mode, tuple(t.bfloat16() for t in (query, key, value)), scale=1.0, judged=slice(2, 3))


@pytest.mark.filterwarnings("ignore:.*[Oo]verriding a previously registered kernel")
def test_the_backward_as_it_ships_passes_what_its_mutants_must_not(mutated):
    for seed in (0, 1):
        check_backward(mode_of(mutated[None], seed))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
@pytest.mark.filterwarnings("ignore:.*[Oo]verriding a previously registered kernel")
def test_mutant_of_the_backward_is_killed(mutated, mutant):
    is_killed(mutant, mutated[mutant], check_backward, seeds=(1,))
