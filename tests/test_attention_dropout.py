"""Dropout in attention: Philox's known answers, its counter's layout, one mask on every backend, gradients, replay."""

import pytest
import test_attention as suite
import torch
from torch.utils.checkpoint import checkpoint

from transfuse import scaled_dot_product_attention, use_backend, varlen_attention
from transfuse.ops import attention_checks
from transfuse.reference.attention import dropout_keep_mask, philox
from transfuse.testing import assert_matches_reference, draw, nan_filled_empty

in_every_dtype = suite.in_every_dtype
SEED = torch.tensor([-(2**62) - 12345, 2**40 + 7])  # both words of the seed and the low one of the offset matter


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors: waking a second thread costs more than the work. Tests about threads set their own count."""
    torch.set_num_threads(1)


@pytest.fixture
def one_seed(monkeypatch):
    """Every call draws the same seed, so that two backends can be compared."""
    monkeypatch.setattr(attention_checks, "dropout_seed", lambda device: SEED.to(device))


PHILOX = (  # known answers of Philox4x32-10: Random123, kat_vectors
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize("counter, key, words", PHILOX)
def test_philox_known_answers(counter, key, words):
    assert tuple(map(int, philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key]))) == words


def test_dropout_mask_follows_the_counter_layout():
    """Counter (key // 4, query, batch * H + head, offset), word key % 4, one scalar Philox call per weight."""
    mask = dropout_keep_mask(SEED, 0.25, (2, 3, 5, 9))
    low, high = int(SEED[0]) & 0xFFFFFFFF, (int(SEED[0]) >> 32) & 0xFFFFFFFF
    for batch, head, query, key in ((0, 0, 0, 0), (1, 2, 4, 8), (0, 1, 3, 6), (1, 0, 2, 5), (1, 1, 0, 3)):
        counter = [torch.tensor(c) for c in (key // 4, query, batch * 3 + head, 7)]
        word = int(philox(counter, [torch.tensor(low), torch.tensor(high)])[key % 4])
        assert bool(mask[batch, head, query, key]) == (word >= 0.25 * 2**32)


def kept_weights(dtype, dropout_p, batch=2, heads=3, len_q=21, len_k=150, **options):
    """Where a weight survives: all weights are equal, and the values are the identity."""
    query, key = torch.zeros(batch, heads, len_q, 8, dtype=dtype), torch.zeros(batch, heads, len_k, 8, dtype=dtype)
    value = torch.eye(len_k, dtype=dtype).expand(batch, heads, len_k, len_k)
    return scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, **options)


# Kept (1) and dropped (0) weights of [2, 2, 3, 9] under SEED at p = 0.5, keys in a row: a golden vector.
GOLDEN = (
    "110111100",
    "111010111",
    "110111001",
    "111100010",
    "101100101",
    "000100100",
    "011011001",
    "101111011",
    "101010110",
    "010101011",
    "101010001",
    "100100101",
)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_golden_mask(backend, one_seed):
    with use_backend(backend):
        kept = kept_weights(torch.float32, 0.5, heads=2, len_q=3, len_k=9) != 0
    assert tuple("".join("01"[int(k)] for k in row) for row in kept.flatten(0, -2)) == GOLDEN


@in_every_dtype
@pytest.mark.parametrize("dropout_p", (0.001, 0.1, 0.5, 0.9, 1 - 2**-20))
def test_the_kernels_mask_is_the_references(dropout_p, dtype, one_seed):
    expected = dropout_keep_mask(SEED, dropout_p, (2, 3, 21, 150))
    output = kept_weights(dtype, dropout_p)
    assert torch.equal(output != 0, expected)
    share = torch.tensor(1 / (150 * (1 - dropout_p)), dtype=torch.float64)
    torch.testing.assert_close(
        output[expected].double(), share.expand(int(expected.sum())), rtol=2 * torch.finfo(dtype).eps, atol=0
    )


@in_every_dtype
def test_the_mask_does_not_depend_on_windows_lengths_or_threads(dtype, one_seed):
    """A draw belongs to (entry, head, query, key), whatever is skipped or excluded around it."""
    expected = dropout_keep_mask(SEED, 0.4, (2, 3, 40, 300))
    distance = torch.arange(300) - torch.arange(40).view(-1, 1) - 260
    band = (distance >= -50) & (distance <= 9)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        kept = kept_weights(dtype, 0.4, len_q=40, len_k=300, window=(50, 9), causal_alignment="bottom_right") != 0
        assert torch.equal(kept, expected & band)


OPTIONS = {
    "plain": lambda: {},
    "causal": lambda: {"is_causal": True, "causal_alignment": "bottom_right"},
    "boolean": lambda: {"attn_mask": suite.keep_mask(suite.BATCH, 1, suite.LEN_Q, suite.LEN_K)},
    "lengths": lambda: {"seqlens_k": torch.tensor([0, 31])},
    "all": lambda: {
        "window": (30, 5),
        "softcap": 3.0,
        "alibi_slopes": draw(suite.HEADS, seed=1, requires_grad=True),
        "sinks": draw(suite.HEADS, seed=2, requires_grad=True),
        "attn_bias": suite.bias(suite.HEADS, suite.LEN_Q, suite.LEN_K),
        "causal_alignment": "bottom_right",
    },
}


@in_every_dtype
@pytest.mark.parametrize("dropout_p", (0.3, 1.0))
@pytest.mark.parametrize("name", OPTIONS)
def test_matches_reference(name, dropout_p, dtype, one_seed):
    with nan_filled_empty():
        assert_matches_reference(
            scaled_dot_product_attention,
            *suite.inputs(dtype, kv_heads=2),
            dropout_p=dropout_p,
            enable_gqa=True,
            return_lse=True,
            **OPTIONS[name](),
        )


CU_SEQLENS, CU_SEQLENS_K = torch.tensor([0, 5, 5, 38, 39]), torch.tensor([0, 9, 13, 150, 150])


@in_every_dtype
@pytest.mark.parametrize("dropout_p", (0.3, 1.0))
def test_varlen_matches_reference(dropout_p, dtype, one_seed):
    """Batch is the number of the sequence, query and key count within it."""
    tensors = [draw(tokens, 4, 16, dtype=dtype, seed=i, requires_grad=True) for i, tokens in enumerate((39, 150, 150))]
    assert_matches_reference(
        varlen_attention,
        *tensors,
        CU_SEQLENS,
        CU_SEQLENS_K,
        dropout_p=dropout_p,
        is_causal=True,
        return_lse=True,
        sinks=draw(4, seed=9, requires_grad=True),
    )


def test_a_sequence_draws_what_a_padded_batch_draws(one_seed):
    tensors = [draw(3, 4, length, 16, seed=i) for i, length in enumerate((20, 20, 20))]
    padded = scaled_dot_product_attention(*tensors, dropout_p=0.5, seqlens_k=torch.tensor([20, 7, 13]))
    rows = torch.cat([torch.arange(length) + 20 * n for n, length in enumerate((20, 7, 13))])
    packed = [t.transpose(1, 2).flatten(0, 1)[rows] for t in tensors]
    output = varlen_attention(*packed, torch.tensor([0, 20, 27, 40]), dropout_p=0.5)
    assert torch.equal(output, padded.transpose(1, 2).flatten(0, 1)[rows])


def test_gradcheck(one_seed):
    tensors = suite.inputs(torch.float64, batch=1, heads=2, len_q=3, len_k=5, head_dim=2, value_dim=3)

    def run(*t):
        return scaled_dot_product_attention(*t, dropout_p=0.4, softcap=2.0, return_lse=True)

    with use_backend("cpu"):
        assert torch.autograd.gradcheck(run, tensors)


@in_every_dtype
def test_follows_torchs_generator_and_keeps_the_mean(dtype):
    query, key, value = suite.inputs(dtype, batch=4, len_q=64, len_k=64, requires_grad=False)

    def run(seed, dropout_p=0.3):
        torch.manual_seed(seed)
        return scaled_dot_product_attention(query, key, torch.ones_like(value), dropout_p=dropout_p)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    assert abs(float(run(1).double().mean()) - 1.0) < 0.02  # 65,536 weights: the mean's own deviation is below 0.006
    assert torch.equal(run(1, 1.0), torch.zeros_like(run(1)))
    assert torch.equal(
        scaled_dot_product_attention(query, key, value, dropout_p=0.0), scaled_dot_product_attention(query, key, value)
    )


@pytest.mark.parametrize("dropout_p", (0.05, 0.5, 0.95))
def test_the_rate_of_kept_weights(dropout_p):
    """Of 240,000 draws, five standard deviations; and no draw resembles its neighbour."""
    torch.manual_seed(0)
    kept = (kept_weights(torch.float32, dropout_p, heads=8, len_q=100, len_k=150) != 0).double()
    deviation = (dropout_p * (1 - dropout_p)) ** 0.5
    assert abs(float(kept.mean()) - (1 - dropout_p)) < 5 * deviation / kept.numel() ** 0.5
    centred = (kept - kept.mean()) / deviation
    for dim in range(4):
        neighbours = centred.narrow(dim, 1, kept.shape[dim] - 1) * centred.narrow(dim, 0, kept.shape[dim] - 1)
        assert abs(float(neighbours.mean())) < 5 / neighbours.numel() ** 0.5


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_checkpoint_replays(use_reentrant):
    def gradients(function):
        leaves = [t.detach().requires_grad_() for t in suite.inputs()]
        torch.manual_seed(3)
        output = function(*leaves)
        output.square().sum().backward()
        return [output, *(leaf.grad for leaf in leaves)]

    def function(*t):
        return scaled_dot_product_attention(*t, dropout_p=0.5)

    again = gradients(lambda *t: checkpoint(function, *t, use_reentrant=use_reentrant))
    assert all(torch.equal(a, e) for a, e in zip(again, gradients(function)))


def test_compile_fullgraph_with_gradients():
    leaves = suite.inputs()
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *t: scaled_dot_product_attention(*t, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    output = compiled(*leaves)
    grads = torch.autograd.grad(output, leaves, torch.ones_like(output))
    # dV is the kept weights of each key, summed over rows: the backward of the same draws
    ones = scaled_dot_product_attention(*(t.detach() for t in leaves))
    assert output.shape == ones.shape and not torch.equal(output, ones)
    assert abs(float(grads[2].sum()) - float(torch.ones_like(output).sum())) < 0.1 * output.numel()


def test_backward_draws_nothing():
    """The seed is saved: a backward after other random calls uses the forward's mask, twice the same."""
    leaves = suite.inputs()
    output = scaled_dot_product_attention(*leaves, dropout_p=0.5)
    grad = draw(*output.shape, seed=70)
    first = torch.autograd.grad(output, leaves, grad, retain_graph=True)
    torch.rand(17)
    second = torch.autograd.grad(output, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
