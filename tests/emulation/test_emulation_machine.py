"""The emulator itself: kernels of a few lines that show a feature, and kernels that each make one mistake."""

import ctypes

import emulator
import numpy as np
import pytest
import torch

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def cases():
    return emulator.library("machine_cases", ["tests/emulation/kernels/machine_cases.cu"])


def run(
    cases,
    name,
    values=None,
    size=64,
    n=0,
    grid=(1, 1, 1),
    block=(64, 1, 1),
    shared_bytes=0,
    cluster=1,
    seed=0,
    contents="uninitialised",
    patience=emulator.PATIENCE,
):
    """Runs one kernel of machine_cases.cu; returns what it wrote."""
    values = torch.arange(1, 1 + size, dtype=torch.int32) if values is None else values
    with emulator.Memory() as memory:
        given = memory.place("in", values, "read-only")
        taken = memory.place("out", torch.zeros(size, dtype=torch.int32), contents)
        sizes = (ctypes.c_uint * 6)(*grid, *block)
        cases.run(
            "run_case",
            name.encode(),
            given,
            taken,
            ctypes.c_int64(n),
            sizes,
            ctypes.c_int64(shared_bytes),
            cluster,
            seed=seed,
            patience=patience,
        )
        return taken.tolist()


@pytest.mark.parametrize("seed", SEEDS)
def test_every_index_of_grid_and_block_comes_once(cases, seed):
    assert run(
        cases, "indices", size=2 * 3 * 2 * 24, n=2 * 3 * 2 * 24, grid=(2, 3, 2), block=(4, 3, 2), seed=seed
    ) == list(range(288))


@pytest.mark.parametrize("seed", SEEDS)
def test_shared_memory_and_barriers(cases, seed):
    assert run(cases, "reverse_through_shared", size=1024, block=(1024, 1, 1), seed=seed) == list(range(1024, 0, -1))
    assert run(cases, "two_instances_of_a_template", seed=seed) == [3 * value for value in range(64, 0, -1)]
    assert run(cases, "early_exit", n=50, seed=seed)[:50] == list(range(1, 51))
    votes = run(cases, "votes_of_a_block", seed=seed)
    assert votes == [13 + 1000] * 64


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0, lambda lane: 300),
        (1, lambda lane: 100 * (lane - 2 if lane >= 2 else lane)),
        (2, lambda lane: 100 * (lane + 5 if lane + 5 < 32 else lane)),
        (3, lambda lane: 100 * (lane ^ 1)),
        (4, lambda lane: 100 * (lane // 8 * 8 + 3)),
        (5, lambda lane: 100 * (lane + 5 if lane % 8 + 5 < 8 else lane)),
        (6, lambda lane: 0b01001001001001001001001001001001),
        (7, lambda lane: 1),
        (8, lambda lane: 100 * 31 * 16),
        (9, lambda lane: 150 * (lane ^ 16)),
    ],
)
def test_warp_wide_words(cases, word, expected):
    for seed in SEEDS:
        assert run(cases, "shuffles", n=word, seed=seed) == [expected(thread % 32) for thread in range(64)]


@pytest.mark.parametrize("seed", SEEDS)
def test_parts_of_a_block_synchronise_alone(cases, seed):
    assert run(cases, "halves_of_a_warp", size=32, block=(32, 1, 1), seed=seed) == [
        i ^ (1 if i < 16 else 2) for i in range(32)
    ]
    assert run(cases, "warp_barriers", size=256, block=(256, 1, 1), seed=seed) == [1 + (i ^ 1) for i in range(256)]
    assert run(cases, "named_barriers", size=192, block=(96, 1, 1), seed=seed) == [1 + i // 64 for i in range(192)]


@pytest.mark.parametrize("seed", SEEDS)
def test_atomics(cases, seed):
    assert run(cases, "atomics", size=2, grid=(5, 1, 1), seed=seed, contents="initialised") == [5 * 64 * 2, 5 * 64 - 1]


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_of_a_cluster_write_each_others_shared_memory(cases, seed):
    found = run(cases, "clusters", size=8, grid=(8, 1, 1), block=(32, 1, 1), cluster=4, shared_bytes=16, seed=seed)
    assert found == [11 * (block // 4 * 4 + (block - 1) % 4) for block in range(8)]


def test_conversions_of_the_16_bit_types(cases):
    """All of them widened; floats around every value and every tie rounded. NaN is 0x7fff, as on the device."""
    every = torch.arange(1 << 16, dtype=torch.int32)
    words = every.short()
    grid = ((1 << 16) // 1024, 1, 1)
    wide = torch.tensor(run(cases, "widenings", every, 1 << 17, 1 << 16, grid, (1024, 1, 1)), dtype=torch.int32)
    as_half, as_bfloat = wide.view(torch.float32).view(-1, 2).unbind(1)
    assert torch.equal(as_half.nan_to_num(7.0), words.view(torch.float16).float().nan_to_num(7.0))
    assert torch.equal(as_bfloat.nan_to_num(7.0), words.view(torch.bfloat16).float().nan_to_num(7.0))

    half = words.view(torch.float16).double()
    ties = ((half + half.roll(1)) / 2).float().view(torch.int32)  # neighbours in the order of their bits
    floats = torch.cat([every << 16, (every << 16) + 0x8000, half.float().view(torch.int32), ties])
    floats = torch.cat([floats - 1, floats, floats + 1])
    size = floats.numel()
    found = torch.tensor(run(cases, "roundings", floats, size, size, (size // 1024, 1, 1), (1024, 1, 1)))
    value = floats.view(torch.float32)
    for shift, dtype in ((0, torch.float16), (16, torch.bfloat16)):
        expected = value.to(dtype).view(torch.int16).int() & 0xFFFF
        assert torch.equal(found >> shift & 0xFFFF, torch.where(value.isnan(), 0x7FFF, expected)), dtype

    # The doubles next to these floats, on either side: to half as numpy rounds; to bfloat16 as the next float goes,
    # which lies on the same side of every tie, unless it is one.
    beside = floats[value.isfinite() & (value != 0)][: 1 << 18]
    found = torch.tensor(run(cases, "roundings_of_doubles", beside, 1 << 19, 1 << 18, (1 << 8, 1, 1), (1024, 1, 1)))
    bits = beside.view(torch.float32).double().view(torch.int64)
    doubles = torch.stack([bits + 1, bits - 1], 1).flatten().view(torch.float64).numpy()
    with np.errstate(over="ignore"):
        assert (doubles.astype(np.float16).view(np.uint16) == (found & 0xFFFF).numpy()).all()
    nexts = torch.stack([beside + 1, beside - 1], 1).flatten()
    expected = nexts.view(torch.float32).bfloat16().view(torch.int16).int() & 0xFFFF
    is_tie = nexts & 0xFFFF == 0x8000
    assert ((found >> 16 & 0xFFFF == expected) | is_tie | nexts.view(torch.float32).isnan()).all()


MISTAKES = (
    # kernel, words of the report, options
    ("race_in_shared", "race: ", "4 bytes of shared memory, values +", {}),
    ("race_after_read", "race: ", "which thread", {}),
    ("race_between_warps", "race: ", "no barrier between", {}),
    ("race_between_blocks", "race: ", "which another block wrote", {"grid": (2, 1, 1)}),
    ("shuffle_is_no_barrier", "race: ", "no barrier between", {"block": (32, 1, 1), "size": 32}),
    ("arrive_orders_only_what_is_before", "race: ", "no barrier between", {"n": 1, "seed": 0}),
    ("uninitialised_shared", "uninitialised read: ", "thread (0, 0, 0)", {}),
    ("missing_barrier", "uninitialised read: ", "which nothing has written yet", {}),
    ("left_by_another_block", "uninitialised read: ", "block (1, 0, 0)", {"grid": (2, 1, 1), "size": 128}),
    ("uninitialised_global", "uninitialised read: ", "out + 0 bytes", {}),
    ("beyond_global", "out of bounds: ", "in, 0 bytes behind its end", {"n": 1}),
    ("beyond_global", "out of bounds: ", "in, 4 bytes before its start", {"n": -1}),
    ("beyond_shared_array", "out of bounds: ", "indexes an array beyond its end", {"n": 1, "block": (32, 1, 1)}),
    ("beyond_dynamic_shared", "out of bounds: ", "dynamic shared memory", {"n": 1, "shared_bytes": 256}),
    ("writes_its_input", "written input: ", "in + 0 bytes", {}),
    ("misaligned_vector", "misaligned access: ", "not aligned", {"n": 1}),
    ("divergent_barriers", "divergent barrier: ", "__syncthreads()", {}),
    ("deadlock", "deadlock: ", "and 31 more wait at a named barrier", {}),
    ("mask_without_the_caller", "wrong lane mask: ", "leaves out its own lane", {}),
    ("mask_with_an_absent_lane", "wrong lane mask: ", "has exited", {"seed": 1, "block": (32, 1, 1)}),
    ("source_outside_the_mask", "wrong lane mask: ", "from lane 16", {"block": (32, 1, 1)}),
    ("masks_that_differ", "wrong lane mask: ", "0xffffffff", {"block": (32, 1, 1)}),
    ("integer_overflow", "integer overflow: ", "multiplies", {"n": 1 << 22}),
    ("copy_without_wait", "pending copy: ", "has not waited for", {"block": (32, 1, 1)}),
    ("copy_without_barrier", "race: ", "no barrier between", {"block": (32, 1, 1)}),
    ("copy_into_a_target_in_flight", "pending copy: ", "it writes", {"block": (32, 1, 1)}),
    ("another_threads_stack", "out of bounds: ", "another thread's local memory", {}),
    ("loops_in_registers", "endless loop: ", "thread (0, 0, 0)", {"patience": 0.1}),
    ("loops_until_another_writes", "endless loop: ", "thread (0, 0, 0)", {"patience": 0.1}),
    ("loops_over_shuffles", "endless loop: ", "of its block at machine_cases.cu:", {"patience": 0.1}),
    ("stops_itself", "trap: ", "machine_cases.cu", {}),
)


@pytest.mark.parametrize(
    ("name", "kind", "words", "options"), MISTAKES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_mistake_is_found(cases, name, kind, words, options):
    with pytest.raises(emulator.KernelError) as found:
        run(cases, name, **options)
    report = str(found.value)
    assert report.startswith(kind) and words in report, report
    # Deadlocks belong to no one line; every other report names its own.
    assert "machine_cases.cu:" in report and name in report, report


def test_after_a_mistake_the_next_launch_is_clean(cases):
    with pytest.raises(emulator.KernelError):
        run(cases, "race_in_shared")
    assert run(cases, "reverse_through_shared") == list(range(64, 0, -1))


def test_what_was_arrived_for_is_ordered(cases):
    assert run(cases, "arrive_orders_only_what_is_before", n=0, size=32) == [1] * 32


def test_impossible_launches_are_refused_as_by_the_runtime(cases):
    for options in (
        {"block": (1025, 1, 1)},
        {"grid": (1, 65536, 1)},
        {"shared_bytes": 1 << 20},
        {"grid": (3, 1, 1), "cluster": 2},
    ):
        with pytest.raises(RuntimeError, match="cudaError_t 9"):
            run(cases, "indices", **options)
