"""The cases of `transfuse verify`, `transfuse bench --op` and bench/: one declaration gives promises, gradient and speed.

A case is one op at one shape. Its `apply` says how the op is called on the case's tensors and is given the function to
call, so that the same line serves the op, its explanation and (under use_backend) the float64 oracle.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

import transfuse
from transfuse.testing import draw, error_budget

OPS = ("attention", "varlen_attention", "decode_attention", "masked_softmax", "layer_norm", "add_layer_norm", "rms_norm",
       "add_rms_norm", "gelu", "rotary")
FUNCTIONS = {"attention": "scaled_dot_product_attention"}  # where the public name is not the stem
DTYPES = (torch.float32, torch.bfloat16)  # what models run, and `transfuse bench` times
DIRECTIONS = ("forward", "backward")
# A gradient goes through the forward's results again: the factor that testing.assert_matches_reference allows too.
GRADIENT_SLACK = 4.0


class ParityError(AssertionError):
    """What was to be timed does not compute the same thing, so there is no speed to speak of."""


@dataclass(frozen=True)
class Parity:
    """The largest error of any result, relative to that result's largest magnitude, and what was allowed."""

    largest: float
    budget: float
    what: str

    @property
    def ok(self):
        return self.largest <= self.budget


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Args:
        op, name: `transfuse verify --op OP` selects by op; op/name is unique.
        shape: the sizes in words, for tables.
        draw: (dtype) -> tensors on the CPU; floating ones get gradients.
        apply: (function, *tensors) -> the op's result; `function` stands for the public op.
        torch: (*tensors) -> the same result as torch alone computes it; None where torch has no such op.
        moved: elements that one forward must read and write once.
        flops: of one forward.
        terms: length of the longest sum behind one result.
        quick: part of `make bench QUICK=1`.
        directions: "forward" alone for an op without gradients.
        unfused: torch needs several ops for it.
        sweep: one of a row of sizes: measured, too many for a page.
        fresh: every call writes to memory not touched before, as large outputs do out of cache.
    """

    op: str
    name: str
    shape: str
    draw: Callable
    apply: Callable
    torch: Callable | None
    moved: int
    flops: int
    terms: int
    quick: bool = False
    directions: tuple[str, ...] = DIRECTIONS
    unfused: bool = False
    sweep: bool = False
    fresh: bool = False

    @property
    def function(self):
        return getattr(transfuse, FUNCTIONS.get(self.op, self.op))

    def inputs(self, dtype, device="cpu"):
        return tuple(value.to(device) for value in self.draw(dtype))

    def ours(self, *inputs):
        return first(self.apply(self.function, *inputs))

    def reference(self, *inputs):
        with transfuse.use_backend("reference"):
            return self.ours(*inputs)

    def explain(self, *inputs):
        return self.apply(partial(transfuse.explain, self.function), *inputs)

    def grad_output(self, inputs):
        """An incoming gradient whose values are exact in every dtype, so that each side gets the same one."""
        with torch.no_grad():
            like = self.ours(*inputs)
        return draw(*like.shape, dtype=torch.bfloat16, seed=7).to(like)

    def bytes(self, dtype, direction="forward"):
        """Bytes that must move: backward reads grad_output and the inputs and writes one gradient per input."""
        return self.moved * dtype.itemsize * (2 if direction == "backward" else 1)

    def parity(self, inputs, direction="forward"):
        """Compares ours with the float64 oracle on these very inputs.

        Raises: ParityError, with the two figures and the command that repeats it.
        """
        found = self.compare(inputs, direction)
        if not found.ok:
            raise ParityError(
                f"{self.op}: {self.name} {direction} misses parity: {found.what} has relative error "
                f"{found.largest:.3e}, allowed {found.budget:.3e}; repeat with: transfuse verify --op {self.op}"
            )
        return found

    def compare(self, inputs, direction="forward"):
        wide = tuple(value.double() if value.is_floating_point() else value for value in inputs)
        if direction == "forward":
            with torch.no_grad():
                pairs = [("output", self.ours(*inputs), self.reference(*wide))]
            slack = 1.0
        else:
            grad_output = self.grad_output(inputs)
            actual = gradients_of(self.ours, inputs, grad_output)()
            exact = gradients_of(self.reference, wide, grad_output.double())()
            pairs = [(f"gradient {index}", *pair) for index, pair in enumerate(zip(actual, exact, strict=True))]
            slack = GRADIENT_SLACK
        errors = [
            (relative_error(actual, exact), slack * error_budget(actual.dtype, self.terms), what)
            for what, actual, exact in pairs
        ]
        return Parity(*max(errors, key=lambda entry: entry[0] / entry[1]))


def gradients_of(call, inputs, grad_output):
    """A callable for the backward direction alone: the graph is built once and walked again by every call."""
    leaves = [value.detach().requires_grad_(value.is_floating_point()) for value in inputs]
    output = call(*leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return lambda: torch.autograd.grad(output, wanted, grad_output, retain_graph=True)


def first(result):
    """The op's main result, where it returns several."""
    return result[0] if isinstance(result, tuple) else result


def relative_error(actual, exact):
    """Largest difference over the largest magnitude (or 1 where all is 0); inf where shapes or NaN do not agree."""
    if actual.shape != exact.shape or not torch.equal(actual.isnan(), exact.isnan()):
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    difference = (actual.double() - exact.double()).abs().max().item()
    return difference / (exact.abs().max().item() or 1.0)  # one column normalised has gradient 0 from terms of size 1


def _attention(
    name, batch, heads, queries, keys, head_dim, *, kv_heads=None, causal=False, mask=None, quick=False, sweep=False
):
    """mask: None, 'boolean' [B,1,1,Lk] (padding, True = keep) or 'bias' [1,H,Lq,Lk] (additive, with a gradient)."""
    kv_heads = kv_heads or heads
    gqa = kv_heads != heads

    def make(dtype):
        tensors = [
            draw(batch, heads, queries, head_dim, dtype=dtype, seed=1),
            draw(batch, kv_heads, keys, head_dim, dtype=dtype, seed=2),
            draw(batch, kv_heads, keys, head_dim, dtype=dtype, seed=3),
        ]
        if mask == "boolean":
            lengths = torch.linspace(max(1, keys // 4), keys, batch).long()
            tensors.append((torch.arange(keys) < lengths[:, None])[:, None, None, :])
        elif mask == "bias":
            tensors.append(draw(1, heads, queries, keys, dtype=dtype, seed=4))
        return tensors

    def call(function, query, key, value, attn_mask=None):
        return function(query, key, value, attn_mask, is_causal=causal, enable_gqa=gqa)

    pairs = batch * heads * queries * keys // (2 if causal else 1)
    moved = 2 * batch * head_dim * (heads * queries + kv_heads * keys) + (
        heads * queries * keys if mask == "bias" else 0
    )
    shape = f"B{batch} H{heads}{f'/{kv_heads}' if gqa else ''} Lq{queries} Lk{keys} D{head_dim}"
    torch_call = None if causal and mask else partial(call, F.scaled_dot_product_attention)
    return Case(
        "attention",
        name,
        shape,
        make,
        call,
        torch_call,
        moved,
        4 * pairs * head_dim,
        max(keys, queries, head_dim),
        quick,
        sweep=sweep,
    )


def _varlen(name, lengths, heads, head_dim, *, causal=False, quick=False):
    """The peer is what torch offers on the CPU: pad, attend under a mask, and take the padding out again."""
    tokens, longest = sum(lengths), max(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    keep = torch.arange(longest) < torch.tensor(lengths)[:, None]

    def make(dtype):
        return [draw(tokens, heads, head_dim, dtype=dtype, seed=seed) for seed in (1, 2, 3)]

    def call(function, query, key, value):
        return function(query, key, value, offsets.to(query.device), max_seqlen_q=longest, is_causal=causal)

    def padded(query, key, value):
        where = keep.to(query.device)
        grids = []
        for packed in (query, key, value):
            grid = packed.new_zeros(len(lengths), longest, heads, head_dim)
            grid[where] = packed
            grids.append(grid.transpose(1, 2))
        mask = where[:, None, None, :]
        if causal:
            mask = mask & torch.ones(longest, longest, dtype=torch.bool, device=query.device).tril()
        return F.scaled_dot_product_attention(*grids, attn_mask=mask).transpose(1, 2)[where]

    pairs = sum(length * length for length in lengths) * heads // (2 if causal else 1)
    shape = f"{len(lengths)} sequences of {min(lengths)}..{longest}, {tokens} tokens, H{heads} D{head_dim}"
    return Case(
        "varlen_attention",
        name,
        shape,
        make,
        call,
        padded,
        4 * tokens * heads * head_dim,
        4 * pairs * head_dim,
        longest,
        quick,
    )


def _masked_softmax(name, batch, heads, queries, keys, *, causal=False, mask=True, scale=0.125, **kind):
    def make(dtype):
        scores = draw(batch, heads, queries, keys, dtype=dtype, seed=1, scale=3.0)
        lengths = torch.linspace(max(1, keys // 4), keys, batch).long()
        return [scores, (torch.arange(keys) < lengths[:, None])[:, None, None, :]] if mask else [scores]

    def call(function, scores, keep=None):
        return function(scores, keep, scale=scale, is_causal=causal)

    def stock(scores, keep=None):
        if scale != 1.0:
            scores = scores * scale
        if causal:
            square = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril()
            keep = square if keep is None else keep & square
        return torch.softmax(scores if keep is None else scores.masked_fill(~keep, float("-inf")), -1)

    size = batch * heads * queries * keys
    return Case(
        "masked_softmax",
        name,
        f"[{batch}, {heads}, {queries}, {keys}]",
        make,
        call,
        stock,
        2 * size,
        5 * size,
        keys,
        unfused=causal or mask or scale != 1.0,
        **kind,
    )


def _norm(op, name, rows, columns, **kind):
    """op: layer_norm (with a bias), rms_norm (without), or one of them behind an addition."""
    stem, add = op.removeprefix("add_"), op.startswith("add_")
    stock_norm, parameters = getattr(F, stem), 2 if stem == "layer_norm" else 1
    eps = 1e-5 if rows > 100 else 0.3  # the small cases show a wrong eps; the large ones are what models run

    def make(dtype):
        weights = [draw(columns, dtype=dtype, seed=2, shift=1.0), draw(columns, dtype=dtype, seed=3)][:parameters]
        return [draw(rows, columns, dtype=dtype, seed=seed, shift=0.5) for seed in ((1, 4) if add else (1,))] + weights

    def call(function, *tensors):
        return function(*tensors[:-parameters], (columns,), *tensors[-parameters:], eps)

    def stock(*tensors):
        summed = tensors[0] + tensors[1] if add else tensors[0]
        return stock_norm(summed, (columns,), *tensors[-parameters:], eps)

    size = rows * columns
    return Case(
        op,
        name,
        f"[{rows}, {columns}]",
        make,
        call,
        stock,
        (4 if add else 2) * size,
        8 * size,
        max(rows, columns),
        unfused=add,
        **kind,
    )


def _gelu(name, rows, columns, *, approximate="none", bias=False, **kind):
    def make(dtype):
        return [draw(rows, columns, dtype=dtype, seed=1, scale=2.0)] + (
            [draw(columns, dtype=dtype, seed=2)] if bias else []
        )

    def call(function, input, bias=None):
        return function(input, approximate, bias=bias)

    def stock(input, bias=None):
        return F.gelu(input if bias is None else input + bias, approximate=approximate)

    size = rows * columns
    return Case(
        "gelu",
        name,
        f"[{rows}, {columns}]",
        make,
        call,
        stock,
        2 * size,
        30 * size,
        rows if bias else 1,
        unfused=bias,
        **kind,
    )


def _rotary(name, batch, heads, length, head_dim, *, columns=None, interleaved=False, quick=False):
    """Heads as a projection leaves them, a view of [B, L, H, D]. The peer is what transformers' models write out."""
    half = (columns or head_dim) // 2

    def make(dtype):
        tables = [draw(length, half, dtype=dtype, seed=seed) for seed in (2, 3)]
        return [draw(batch, length, heads, head_dim, dtype=dtype, seed=1).transpose(1, 2), *tables]

    def call(function, input, cos, sin):
        return function(input, cos, sin, interleaved=interleaved)

    def stock(input, cos, sin):
        rotated, rest = input[..., : 2 * half], input[..., 2 * half :]
        if interleaved:
            cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
            turned = torch.stack((-rotated[..., 1::2], rotated[..., ::2]), -1).flatten(-2)
        else:
            cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
            turned = torch.cat((-rotated[..., half:], rotated[..., :half]), -1)
        rotated = rotated * cos + turned * sin
        return torch.cat((rotated, rest), -1) if rest.shape[-1] else rotated

    size = batch * heads * length * head_dim
    shape = f"B{batch} H{heads} L{length} D{head_dim}" + (f" R{columns}" if columns else "")
    return Case("rotary", name, shape, make, call, stock, 2 * size, 3 * size, batch * heads, quick)


def _decode(name, lengths, heads, kv_heads, head_dim, *, queries=1, block_size=None, quick=False):
    """The peer attends over the whole cache under a mask; out of pages it gathers first."""
    batch, longest = len(lengths), max(lengths)
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    pages = -(-longest // block_size) if block_size else 0
    table = torch.arange(batch * pages).flip(0).view(batch, pages) if block_size else None

    def make(dtype):
        cache = (batch * pages, block_size, kv_heads, head_dim) if block_size else (batch, kv_heads, longest, head_dim)
        query = draw(batch, heads, queries, head_dim, dtype=dtype, seed=1)
        return [query, *(draw(*cache, dtype=dtype, seed=seed) for seed in (2, 3))]

    def call(function, query, key, value):
        block_table = None if table is None else table.to(query.device)
        return function(query, key, value, seqlens.to(query.device), block_table=block_table)

    def stock(query, key, value):
        if table is not None:
            key, value = (t[table.to(t.device)].flatten(1, 2).transpose(1, 2) for t in (key, value))
        last = seqlens.to(query.device)[:, None] - queries + torch.arange(queries, device=query.device)  # [B, Lq]
        keep = torch.arange(key.shape[2], device=query.device) <= last[:, None, :, None]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=keep, enable_gqa=True)

    keys = sum(lengths)
    size = 2 * head_dim * (keys * kv_heads + batch * queries * heads)
    shape = f"B{batch} H{heads}/{kv_heads} Lq{queries} Lk{min(lengths)}..{longest} D{head_dim}"
    flops = 4 * keys * queries * heads * head_dim
    shape += f" pages of {block_size}" if block_size else ""
    return Case("decode_attention", name, shape, make, call, stock, size, flops, longest, quick, ("forward",))


SWEEP_TOKENS, SWEEP_SEQLENS, SWEEP_HEAD_DIMS = 2048, (64, 128, 256, 512, 1024, 2048), (32, 64)

# Shapes that models run: MiniLM (12 heads of 32, 384 wide), BERT-base (12 of 64, 768), GPT-2 (causal), LLaMA (GQA).
BENCH_CASES = (
    _attention("minilm", 32, 12, 64, 64, 32, mask="boolean", quick=True),
    _attention("bert_128", 8, 12, 128, 128, 64, mask="boolean"),
    _attention("bert_512", 2, 12, 512, 512, 64),
    _attention("gpt2_causal_1024", 1, 12, 1024, 1024, 64, causal=True),
    _attention("t5_bias_256", 4, 8, 256, 256, 64, mask="bias"),
    _attention("gqa_causal_512", 1, 16, 512, 512, 128, kv_heads=4, causal=True),
    *(
        _attention(f"s{length}_d{head_dim}", SWEEP_TOKENS // length, 12, length, length, head_dim, sweep=True)
        for length in SWEEP_SEQLENS
        for head_dim in SWEEP_HEAD_DIMS
    ),
    _varlen("minilm_arrival", [6, 180, 24, 50, 33, 12, 97, 44, 20, 143, 28, 79, 16, 58, 38, 68], 12, 32, quick=True),
    _varlen("bert_arrival", [6, 180, 24, 50, 33, 12, 97, 44, 20, 512, 28, 79, 16, 58, 38, 256], 12, 64),
    _masked_softmax("bert_128", 8, 12, 128, 128, quick=True),
    _masked_softmax("gpt2_causal_512", 1, 12, 512, 512, causal=True, mask=False),
    _masked_softmax("plain", 8, 12, 128, 128, mask=False, scale=1.0, sweep=True),
    _masked_softmax("large", 32, 12, 256, 256, sweep=True, fresh=True),
    _norm("layer_norm", "minilm", 4096, 384, quick=True),
    _norm("layer_norm", "bert", 4096, 768),
    _norm("layer_norm", "wide", 1024, 4096),
    _norm("layer_norm", "large", 65536, 384, sweep=True, fresh=True),
    _norm("add_layer_norm", "minilm", 4096, 384, quick=True),
    _norm("add_layer_norm", "bert", 4096, 768),
    _norm("add_layer_norm", "large", 65536, 384, sweep=True, fresh=True),
    _norm("rms_norm", "t5", 4096, 768, quick=True),
    _norm("rms_norm", "llama", 1024, 4096),
    _norm("add_rms_norm", "t5", 4096, 768, quick=True),
    _norm("add_rms_norm", "llama", 1024, 4096),
    _gelu("minilm_erf_bias", 2048, 1536, bias=True, quick=True),
    _gelu("bert_erf", 2048, 3072),
    _gelu("gpt2_tanh", 2048, 3072, approximate="tanh"),
    _gelu("gpt2_tanh_bias", 2048, 3072, approximate="tanh", bias=True, sweep=True),
    _gelu("large", 16384, 1536, sweep=True, fresh=True),
    _gelu("large_bias", 16384, 1536, bias=True, sweep=True, fresh=True),
    _rotary("llama_512", 1, 32, 512, 128, quick=True),
    _rotary("gptj_512", 1, 16, 512, 256, columns=64, interleaved=True),
    _decode("llama_2048", [2048], 32, 8, 128, quick=True),
    _decode("gpt2_batch", [129, 512, 77, 300, 1024, 45, 260, 640], 12, 12, 64),
    _decode("llama_pages", [1900, 700, 65, 1300], 32, 8, 128, block_size=16),
)

# Small and awkward: ragged tails, more queries than keys and the other way round, one row, one column, odd head sizes.
PARITY_CASES = (
    _attention("plain", 2, 3, 17, 17, 32),
    _attention("more_keys", 1, 2, 5, 129, 64),
    _attention("more_queries", 1, 2, 65, 33, 24),
    _attention("one_query", 2, 2, 1, 63, 80),
    _attention("causal", 1, 2, 127, 127, 64, causal=True),
    _attention("padding", 3, 2, 31, 31, 32, mask="boolean"),
    _attention("bias", 2, 2, 19, 33, 32, mask="bias"),
    _attention("gqa", 1, 6, 33, 33, 32, kv_heads=2, causal=True),
    _varlen("ragged", [7, 1, 33, 16], 2, 32),
    _varlen("causal", [5, 64, 3], 3, 40, causal=True),
    _masked_softmax("padding", 2, 2, 9, 129),
    _masked_softmax("causal", 1, 2, 33, 33, causal=True),
    _masked_softmax("one_key", 2, 1, 5, 1, mask=False),
    _norm("layer_norm", "ragged", 7, 129),
    _norm("layer_norm", "one_row", 1, 768),
    _norm("layer_norm", "one_column", 5, 1),
    _norm("add_layer_norm", "ragged", 7, 129),
    _norm("rms_norm", "ragged", 7, 129),
    _norm("rms_norm", "one_row", 1, 768),
    _norm("rms_norm", "one_column", 5, 1),
    _norm("add_rms_norm", "ragged", 7, 129),
    _gelu("erf", 5, 67),
    _gelu("tanh", 5, 67, approximate="tanh"),
    _gelu("erf_bias", 9, 33, bias=True),
    _rotary("halves", 2, 3, 7, 40, columns=34),
    _rotary("interleaved", 2, 3, 7, 40, interleaved=True),
    _rotary("one_token", 3, 2, 1, 64),
    _decode("ragged", [257, 3, 64], 4, 2, 40, queries=2),
    _decode("one_head", [300], 1, 1, 64),
    _decode("pages", [33, 100, 2], 6, 3, 32, block_size=16),
)


def check_op(command, op):
    """Raises ValueError when `op` is none of OPS, in the words of every other refusal."""
    if op is not None and op not in OPS:
        raise ValueError(f"{command}: --op is {op!r}, expected one of {', '.join(OPS)}")


def selected(cases, op):
    return [case for case in cases if op in (None, case.op)]
