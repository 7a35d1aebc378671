"""CONTRACT section 4: any strides give the same bits, nothing passed in or saved is written, offsets are 64-bit.

Everything here runs the cases of cases.py, so that an op that has a case has these promises.
"""

from functools import partial

import torch

from transfuse.dispatch import dtype_name
from transfuse.promises.cases import OPS, PARITY_CASES, first, selected
from transfuse.promises.determinism import same
from transfuse.promises.promise import DTYPES, Figure, Promise

FAR_APART = 2**31  # elements: the first offset that no int32 holds
ODD_STRIDE = 1234567  # of a dimension of size 1, where a stride means nothing


def layouts(t):
    """(words, the same or other values in other memory); the expected result is that of the contiguous copy."""
    yield "transposed", t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))
    yield "every second column", torch.stack((t, t), dim=-1)[..., 0]
    yield "unaligned", torch.cat((t.new_zeros(3), t.flatten()))[3:].view(t.shape)
    yield "expanded", t[:1].expand(t.shape)
    if t.dim() > 1:
        yield "rows of a wider tensor", torch.cat((t, t), dim=-1)[..., : t.shape[-1]]
        yield "expanded inside", t[:, :1].expand(t.shape)
    if 1 in t.shape:
        strides = [ODD_STRIDE if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)]
        yield "size 1 with any stride", t.as_strided(t.shape, strides, t.storage_offset())


def far_apart(t):
    """The same values, the last entry more than 2^31 elements behind the first; untouched memory costs nothing."""
    stride = FAR_APART // (t.shape[0] - 1) + 1
    base = torch.empty(stride * (t.shape[0] - 1) + t[0].numel(), dtype=t.dtype, device=t.device)
    spread = base.as_strided(t.shape, (stride, *t[0].contiguous().stride()))
    return spread.copy_(t)


class Call:
    """One case on tensors that a promise rearranges: results(inputs) is its output and every gradient."""

    def __init__(self, case, dtype, device):
        self.case, self.inputs = case, list(case.inputs(dtype, device))
        self.grad_output, self.gradients = case.grad_output(self.inputs), "backward" in case.directions

    def start(self, inputs):
        """(leaves, output): what a backward starts from. The leaves share the inputs' memory."""
        leaves = [t.detach().requires_grad_(t.is_floating_point() and self.gradients) for t in inputs]
        return leaves, first(self.case.apply(self.case.function, *leaves))

    def results(self, inputs, grad_output=None):
        leaves, output = self.start(inputs)
        if not output.requires_grad:
            return [output]
        wanted = [t for t in leaves if t.requires_grad]
        return [
            output.detach(),
            *torch.autograd.grad(output, wanted, self.grad_output if grad_output is None else grad_output),
        ]

    def __str__(self):
        return self.case.name


def _calls(op, dtype, device):
    return [Call(case, dtype, device) for case in selected(PARITY_CASES, op)]


def _strides(op, dtype, backend, device):
    wrong, runs = [], 0
    for call in _calls(op, dtype, device):
        names = [f"argument {index}" for index in range(len(call.inputs))]
        tensors = [t.contiguous() for t in call.inputs]
        if call.gradients:
            names, tensors = [*names, "grad_output"], [*tensors, call.grad_output.contiguous()]
        count = len(call.inputs)
        expected = call.results(tensors[:count], *tensors[count:])
        for index, tensor in enumerate(tensors):
            for words, laid_out in layouts(tensor):
                runs += 1
                dense = laid_out.contiguous().clone()
                given, dense = ([*tensors[:index], t, *tensors[index + 1 :]] for t in (laid_out, dense))
                same_values = torch.equal(dense[index], tensor)
                wanted = expected if same_values else call.results(dense[:count], *dense[count:])
                if not same(call.results(given[:count], *given[count:]), wanted):
                    wrong.append(f"{call}: {names[index]} {words}")
    return Figure(len(wrong), "; ".join(wrong[:3]) or f"of {runs} layouts")


def _far_apart(op, dtype, backend, device):
    wrong, runs = [], 0
    for call in _calls(op, dtype, device):
        expected = call.results(call.inputs)
        for index, tensor in enumerate(call.inputs):
            if tensor.dim() == 0 or tensor.shape[0] < 2:
                continue
            runs += 1
            if not same(call.results([*call.inputs[:index], far_apart(tensor), *call.inputs[index + 1 :]]), expected):
                wrong.append(f"{call}: argument {index}")
        if call.gradients and call.grad_output.shape[0] > 1:
            runs += 1
            if not same(call.results(call.inputs, far_apart(call.grad_output)), expected):
                wrong.append(f"{call}: grad_output")
    return Figure(len(wrong), "; ".join(wrong[:3]) or f"of {runs} tensors")


def _never_written(op, dtype, backend, device):
    """Inputs, grad_output, output and everything saved for the backward keep their bits."""
    wrong, kept_count = [], 0
    for call in _calls(op, dtype, device):
        saved = []

        def remember(tensor, saved=saved):
            saved.append(tensor)
            return tensor

        kept = [(f"argument {i}", t, t.clone()) for i, t in enumerate(call.inputs)]
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            leaves, output = call.start(call.inputs)
        kept += [("a saved tensor", t, t.detach().clone()) for t in saved]
        kept += [
            ("output", output, output.detach().clone()),
            ("grad_output", call.grad_output, call.grad_output.clone()),
        ]
        if output.requires_grad:
            torch.autograd.grad(output, [t for t in leaves if t.requires_grad], call.grad_output)
        wrong += [f"{call}: {words}" for words, t, before in kept if not _same_bits(t, before)]
        kept_count += len(kept)
    return Figure(len(wrong), "; ".join(wrong[:3]) or f"of {kept_count} tensors")


def _same_bits(a, b):
    a, b = (t.detach().contiguous().view(torch.uint8) if t.dim() else t.detach() for t in (a, b))
    return torch.equal(a, b)


def _backward_twice(op, dtype, backend, device):
    wrong = []
    calls = _calls(op, dtype, device)
    for call in calls:
        leaves, output = call.start(call.inputs)
        if output.requires_grad:
            wanted = [t for t in leaves if t.requires_grad]
            pair = [torch.autograd.grad(output, wanted, call.grad_output, retain_graph=True) for _ in range(2)]
            if not same(*pair):
                wrong.append(str(call))
    return Figure(len(wrong), "; ".join(wrong[:3]) or f"of {len(calls)} cases")


def _gradcheck(op, dtype, backend, device):
    """torch's comparison of gradients with finite differences, along random directions."""
    wrong = []
    calls = _calls(op, dtype, device)
    for call in calls:
        leaves, output = call.start(call.inputs)
        if not output.requires_grad:
            continue
        try:
            torch.autograd.gradcheck(call.case.ours, leaves, fast_mode=True)
        except Exception as error:
            wrong.append(f"{call}: {str(error).splitlines()[0]}")
    return Figure(len(wrong), "; ".join(wrong[:3]) or f"of {len(calls)} cases")


OF_GRADIENTS = ("backward-twice", "gradcheck")
ROWS = (  # (id, statement, unit, measure, dtypes, slow)
    (
        "strides",
        "any strides of any argument and of grad_output give the same bits",
        "layouts differ",
        _strides,
        DTYPES,
        False,
    ),
    (
        "far-apart",
        "entries 2^31 elements apart give the same bits",
        "tensors differ",
        _far_apart,
        (torch.bfloat16, torch.float16),
        False,
    ),
    (
        "far-apart-full",
        "entries 2^31 elements apart give the same bits",
        "tensors differ",
        _far_apart,
        (torch.float32, torch.float64),
        True,
    ),
    (
        "written",
        "inputs, outputs and saved tensors are never written",
        "tensors written",
        _never_written,
        DTYPES,
        False,
    ),
    ("backward-twice", "a second backward gives the same bits", "cases differ", _backward_twice, DTYPES, False),
    ("gradcheck", "gradients agree with finite differences", "cases wrong", _gradcheck, (torch.float64,), False),
)

PROMISES = tuple(
    Promise(
        f"4.{op}.{dtype_name(dtype)}.{what}", 4, op, dtype, statement, 0, unit, partial(measure, op, dtype), slow=slow
    )
    for op in OPS
    for what, statement, unit, measure, dtypes, slow in ROWS
    for dtype in dtypes
    if what not in OF_GRADIENTS or any("backward" in case.directions for case in selected(PARITY_CASES, op))
)
