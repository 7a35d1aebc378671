"""CONTRACT section 3: the same bits on every run, in every batch, place, padding and packing, on any number of threads.

A Batch says once how an op's work grows with a batch; every promise here is then the same few lines for all ops. What
is counted is always runs that differ in any bit, of results and gradients.
"""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import transfuse
from transfuse.dispatch import dtype_name
from transfuse.promises.cases import OPS
from transfuse.promises.promise import DTYPES, Figure, NoKernel, Promise
from transfuse.testing import draw

LARGEST_BATCH = 512
BATCHES_QUICK = (1, 2, 3, 7, 8, 31, 32, 33, 127, 128, 129, 511)
REPEATS_QUICK, REPEATS_FULL = 100, 1000
THREADS = (1, 2, 3, 4, 5, 6, 7, 8)
PYTHON_THREADS = 32
CHILD_SECONDS = 30  # a child that takes longer waits for threads that fork() did not copy


@dataclass(frozen=True)
class Batch:
    """One op on a batch: entry i of each result depends on entry i of the batched tensors and on the shared ones.

    Args:
        batched: sizes of one entry, per batched tensor; the batch is dimension 0.
        shared: sizes of each tensor that all entries share, such as weights.
        call: (batched, shared) -> a result or a tuple of them, each with the batch as dimension 0.
        gradients: whether it has them.
        entries: so many give several threads work.
    """

    batched: tuple[tuple[int, ...], ...]
    shared: tuple[tuple[int, ...], ...]
    call: Callable
    gradients: bool = True
    entries: int = 256


def _varlen(batched, shared):
    """Entries of equal length, packed; the results back in batches."""
    count, length = batched[0].shape[:2]
    offsets = torch.arange(count + 1, dtype=torch.int32, device=batched[0].device) * length
    packed = [t.flatten(0, 1) for t in batched]
    output, lse = transfuse.varlen_attention(*packed, offsets, max_seqlen_q=length, is_causal=True, return_lse=True)
    return output.unflatten(0, (count, length)), lse.mT.unflatten(0, (count, length))


def _decode(batched, shared):
    """Each entry's length comes from its own numbers, so that it goes where the entry goes."""
    query, keys, values = batched
    lengths = 2 + (query[:, 0, 0, 0].abs() * 100).long() % (keys.shape[2] - 1)
    return transfuse.decode_attention(query, keys, values, lengths, return_lse=True)


WIDTH = 129  # of a row: eight vectors of sixteen and a tail
BATCHES = {
    "attention": Batch(
        ((2, 33, 24), (2, 37, 24), (2, 37, 24)),
        ((2, 33, 37),),
        lambda b, s: transfuse.scaled_dot_product_attention(*b, attn_bias=s[0], is_causal=True, return_lse=True),
        entries=8,
    ),
    "varlen_attention": Batch(((33, 2, 24),) * 3, (), _varlen, entries=8),
    "masked_softmax": Batch(
        ((5, 70),), ((5, 70),), lambda b, s: transfuse.masked_softmax(b[0], s[0], scale=0.7), entries=96
    ),
    "layer_norm": Batch(((WIDTH,),), ((WIDTH,),) * 2, lambda b, s: transfuse.layer_norm(b[0], (WIDTH,), *s)),
    "add_layer_norm": Batch(((WIDTH,),) * 2, ((WIDTH,),) * 2, lambda b, s: transfuse.add_layer_norm(*b, (WIDTH,), *s)),
    "rms_norm": Batch(((WIDTH,),), ((WIDTH,),), lambda b, s: transfuse.rms_norm(b[0], (WIDTH,), s[0])),
    "add_rms_norm": Batch(((WIDTH,),) * 2, ((WIDTH,),), lambda b, s: transfuse.add_rms_norm(*b, (WIDTH,), s[0])),
    "gelu": Batch(((WIDTH,),), ((WIDTH,),), lambda b, s: transfuse.gelu(b[0], bias=s[0])),
    "rotary": Batch(((2, 9, 24),), ((9, 8),) * 2, lambda b, s: transfuse.rotary(b[0], *s)),
    "decode_attention": Batch(((4, 2, 24), (2, 300, 24), (2, 300, 24)), (), _decode, gradients=False, entries=32),
}


class Work:
    """A Batch on LARGEST_BATCH entries of random numbers; results(rows) computes some of them."""

    def __init__(self, op, dtype, device):
        self.batch = BATCHES[op]
        self.batched = [
            draw(LARGEST_BATCH, *sizes, dtype=dtype, seed=i).to(device) for i, sizes in enumerate(self.batch.batched)
        ]
        self.shared = [draw(*sizes, dtype=dtype, seed=10 + i).to(device) for i, sizes in enumerate(self.batch.shared)]
        with torch.no_grad():
            outputs = self._outputs(self.batched, self.shared)
        self.grads = [draw(*o.shape, dtype=torch.bfloat16, seed=20 + i).to(o) for i, o in enumerate(outputs)]

    def _outputs(self, batched, shared):
        result = self.batch.call(batched, shared)
        return result if isinstance(result, tuple) else (result,)

    def prepare(self, rows=slice(None)):
        """A function that does nothing but compute these entries: (results with the batch in front, summed ones)."""
        leaves = [t.clone() for t in (*(t[rows] for t in self.batched), *self.shared)]
        grads, count = [g[rows] for g in self.grads], len(self.batched)
        if self.batch.gradients:
            leaves = [t.requires_grad_() for t in leaves]

        def compute():
            outputs = self._outputs(leaves[:count], leaves[count:])
            if not self.batch.gradients:
                return list(outputs), []
            gradients = torch.autograd.grad(outputs, leaves, grads)
            return [o.detach() for o in outputs] + list(gradients[:count]), list(gradients[count:])

        return compute

    def results(self, rows=slice(None)):
        return self.prepare(rows)()

    def everything(self):
        """Every result of as many entries as keep several threads busy."""
        return sum(self.results(slice(0, self.batch.entries)), [])


def same(first, second):
    """Whether two lists of tensors hold the same bits."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _count(differing, runs):
    """The figure of a list of runs, each named by what differed in it."""
    return Figure(len(differing), f"differs: {', '.join(map(str, differing[:3]))}" if differing else f"of {runs} runs")


def _repeats(work, repeats):
    first = work.everything()
    return _count([i for i in range(repeats) if not same(first, work.everything())], repeats)


def _threads(work):
    before, results = torch.get_num_threads(), []
    try:
        for threads in THREADS:
            torch.set_num_threads(threads)
            results.append(work.everything())
    finally:
        torch.set_num_threads(before)
    return _count([t for t, result in zip(THREADS, results, strict=True) if not same(results[0], result)], len(THREADS))


def _batch_sizes(work, sizes):
    whole, _ = work.results()
    sizes = [n for n in sizes if n <= LARGEST_BATCH]
    differing = [n for n in sizes if not same(work.results(slice(0, n))[0], [t[:n] for t in whole])]
    return _count(differing, len(sizes))


def _positions(work):
    whole, _ = work.results()
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(LARGEST_BATCH, generator=generator) for _ in range(3)]
    last = LARGEST_BATCH - 1
    orders += [torch.tensor([last]), torch.tensor([last * 3 // 5, 7]), torch.arange(last // 4, last // 4 + 13)]
    differing = [order.tolist()[:4] for order in orders if not same(work.results(order)[0], [t[order] for t in whole])]
    return _count(differing, len(orders))


def _forked_child(work):
    """A child of a process that used its threads computes the same, on its own thread.

    torch's own parallel loops would hang there, so that the child calls nothing but the op on large tensors.
    """
    compute = work.prepare(slice(0, work.batch.entries))

    def ends():
        return [end for t in sum(compute(), []) for end in (t[:1], t[-1:])]

    expected = ends()
    child = os.fork()
    if child == 0:
        status = 2
        try:
            status = 0 if same(expected, ends()) else 1
        finally:
            os._exit(status)
    deadline = time.monotonic() + CHILD_SECONDS
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return Figure(int(code != 0), {0: "of 1 child", 1: "other bits"}.get(code, f"the child ended with {code}"))
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return Figure(1, f"the child hung for {CHILD_SECONDS} s")
        time.sleep(0.001)


def _python_threads(work):
    """Half a batch each, so that they come at the same time and not one after the other."""
    rows, results = slice(0, work.batch.entries // 2), [None] * PYTHON_THREADS
    expected, ready = sum(work.results(rows), []), threading.Barrier(PYTHON_THREADS)

    def compute(index):
        function = work.prepare(rows)
        ready.wait()
        results[index] = sum(function(), [])

    threads = [threading.Thread(target=compute, args=(index,)) for index in range(PYTHON_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    differing = [i for i, result in enumerate(results) if result is None or not same(expected, result)]
    return _count(differing, PYTHON_THREADS)


# ---- padding and packing: what only some ops have ----

PADDINGS = (1, 5, 27, 38, 100)


def _results(function, leaves, grad):
    leaves = [t.clone().requires_grad_() for t in leaves]
    output = function(*leaves)
    extra = list(output[1:]) if isinstance(output, tuple) else []
    output = output[0] if isinstance(output, tuple) else output
    return [output.detach(), *(t.detach() for t in extra), *torch.autograd.grad(output, leaves, grad)]


def _attention_padding(dtype, device):
    """More keys and queries at the end, left out by lengths or by a mask."""
    attention = partial(transfuse.scaled_dot_product_attention, return_lse=True)
    length, longest = 45, 45 + max(PADDINGS)
    tensors = [draw(2, 2, longest, 24, dtype=dtype, seed=i).to(device) for i in range(4)]
    short = _results(attention, [t[:, :, :length] for t in tensors[:3]], tensors[3][:, :, :length])
    differing = []
    for padding in PADDINGS:
        *inputs, grad = (t[:, :, : length + padding].clone() for t in tensors)
        grad[:, :, length:] = 0
        keep = torch.arange(length + padding, device=device) < length
        for words, options in (
            ("lengths", {"seqlens_k": torch.tensor([length] * 2, device=device)}),
            ("mask", {"attn_mask": keep}),
        ):
            padded = _results(partial(attention, **options), inputs, grad)
            if not same(short, [t[:, :, :length] for t in padded]):
                differing.append(f"{padding} more by {words}")
    return _count(differing, 2 * len(PADDINGS))


def _softmax_padding(dtype, device):
    """More keys at the end, excluded and NaN."""
    x, grad = (draw(3, 5, 90, dtype=dtype, seed=i, scale=5).to(device) for i in range(2))
    short, differing = _results(transfuse.masked_softmax, [x], grad), []
    for padding in PADDINGS:
        poison = torch.full((3, 5, padding), torch.nan, dtype=dtype, device=device)
        keep = torch.arange(90 + padding, device=device) < 90
        padded = _results(
            lambda t, keep=keep: transfuse.masked_softmax(t, keep),
            [torch.cat((x, poison), -1)],
            torch.cat((grad, poison), -1),
        )
        if not same(short, [t[..., :90] for t in padded]):
            differing.append(f"{padding} more keys")
    return _count(differing, len(PADDINGS))


LENGTHS = (5, 0, 33, 1, 64, 17, 0)


def _varlen_packing(dtype, device):
    """Any order of the sequences, and each of them alone through attention."""
    tensors = [draw(sum(LENGTHS), 2, 24, dtype=dtype, seed=i).to(device) for i in range(4)]
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)

    def run(order):
        rows = torch.cat([torch.arange(int(bounds[i]), int(bounds[i + 1])) for i in order])
        offsets = torch.tensor([0, *(LENGTHS[i] for i in order)]).cumsum(0).int().to(device)
        function = partial(transfuse.varlen_attention, cu_seqlens_q=offsets, max_seqlen_q=max(LENGTHS), is_causal=True)
        return rows, _results(function, [t[rows] for t in tensors[:3]], tensors[3][rows])

    orders = [(4, 2, 0, 6, 5, 3, 1), (6, 5, 4, 3, 2, 1, 0), (2,), (3, 4), (0, 1, 2, 3)]
    _, whole = run(range(len(LENGTHS)))
    differing = []
    for order in orders:
        rows, results = run(order)
        if not same(results, [t[rows] for t in whole]):
            differing.append(f"order {order}")
    alone = partial(transfuse.scaled_dot_product_attention, is_causal=True, causal_alignment="bottom_right")
    for i, length in enumerate(LENGTHS):
        sequence = slice(int(bounds[i]), int(bounds[i]) + length)
        inputs = [t[sequence].transpose(0, 1)[None] for t in tensors]
        expected = [t[0].transpose(0, 1) for t in _results(alone, inputs[:3], inputs[3])]
        if not same(expected, [t[sequence] for t in whole]):
            differing.append(f"sequence {i} alone")
    return _count(differing, len(orders) + len(LENGTHS))


# ---- the promises ----

FOR_EVERY_OP = (  # (id, statement, unit, work -> figure, slow)
    (
        "repeats",
        f"{REPEATS_QUICK} repeats give the same bits",
        "runs differ",
        partial(_repeats, repeats=REPEATS_QUICK),
        False,
    ),
    (
        "repeats-full",
        f"{REPEATS_FULL:,} repeats give the same bits",
        "runs differ",
        partial(_repeats, repeats=REPEATS_FULL),
        True,
    ),
    ("threads", "1 to 8 threads give the same bits", "runs differ", _threads, False),
    (
        "batch",
        f"an entry alone and in {len(BATCHES_QUICK)} batches of 1 to 512",
        "runs differ",
        partial(_batch_sizes, sizes=BATCHES_QUICK),
        False,
    ),
    (
        "batch-full",
        "an entry in every batch of 1 to 512",
        "runs differ",
        partial(_batch_sizes, sizes=range(1, LARGEST_BATCH + 1)),
        True,
    ),
    ("position", "an entry at any place, in any order", "runs differ", _positions, False),
    ("fork", "a forked child computes the same after use", "runs differ", _forked_child, False),
    ("python-threads", f"{PYTHON_THREADS} Python threads at once", "runs differ", _python_threads, False),
)
FOR_ONE_OP = (  # (op, id, statement, (dtype, device) -> figure)
    ("attention", "padding", f"{len(PADDINGS)} amounts of padding, by lengths and by mask", _attention_padding),
    ("masked_softmax", "padding", f"{len(PADDINGS)} amounts of excluded keys", _softmax_padding),
    ("varlen_attention", "packing", "any packing order, and each sequence alone through attention", _varlen_packing),
)


def _measure(op, dtype, figure_of, backend, device):
    if figure_of is _forked_child and device != "cpu":
        raise NoKernel("CUDA does not survive fork()")
    return figure_of(Work(op, dtype, device))


def _measure_alone(figure_of, dtype, backend, device):
    return figure_of(dtype, device)


def _promises():
    for op in OPS:
        for dtype in DTYPES:
            name = dtype_name(dtype)
            for what, statement, unit, figure_of, slow in FOR_EVERY_OP:
                measure = partial(_measure, op, dtype, figure_of)
                yield Promise(f"3.{op}.{name}.{what}", 3, op, dtype, statement, 0, unit, measure, slow=slow)
            for only, what, statement, figure_of in FOR_ONE_OP:
                if only == op:
                    measure = partial(_measure_alone, figure_of, dtype)
                    yield Promise(f"3.{op}.{name}.{what}", 3, op, dtype, statement, 0, "runs differ", measure)


PROMISES = tuple(_promises())
