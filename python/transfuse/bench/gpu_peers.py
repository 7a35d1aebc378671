"""What transfuse's GPU kernels will be measured against: the peers, their shapes, and how each is called.

Sizes follow what the field quotes: 16384 tokens (or one longer sequence) and 2048 channels in every attention case
(heads = 2048 / head_dim), 16384 rows in every row kernel, bfloat16. Causal FLOPs count half; a backward counts 2.5
forwards (five products of which the forward does two). Backward is timed alone, on a graph that is kept.
"""

import itertools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import transfuse
from transfuse.bench.harness import compiled
from transfuse.promises.cases import gradients_of

TOKENS, CHANNELS, ROWS = 16384, 2048, 16384
SDPA_PEERS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
OWN_BACKENDS = {"transfuse cuda": "cuda", "transfuse triton": "triton"}
SEQLENS = (4096, 1024, 16384, 512, 2048, 8192, 32768)  # the most telling first: a deadline cuts the end
HEAD_DIMS = (128, 64, 256)
BIAS_SEQLENS = (4096, 512, 2048, 8192)
LENGTHS_AHEAD = 3  # of SEQLENS
COLUMNS = (768, 384, 1024, 4096, 2048, 8192)
# Batch and keys of one new token, grouped queries as LLaMA's; first where keys and values exceed 64 MB by far.
DECODE_SIZES = ((16, 16384), (64, 4096), (1, 65536), (8, 65536), (4, 4096), (1, 16384), (1, 4096), (64, 65536))
DECODE_HEADS, DECODE_KV_HEADS, DECODE_HEAD_DIM, DECODE_PAGE = 32, 8, 128, 64
DECODE_SPARE = 256  # rows of the cache that are not filled yet
EXACT_SEQLEN = 4096  # up to here one head is compared with float64
BACKWARD_FLOPS = 2.5


def _random(run, *shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device=run.device, dtype=dtype)


def ceilings(run):
    """What this GPU can do at most: bytes by a copy, operations by a matrix product, both on random data."""
    _copy(run, 1 << 12 if run.dry else 1 << 31)
    _matmul(run, 16 if run.dry else 8192)


def _copy(run, size, shape=None):
    source, target = _random(run, size), torch.empty(size, device=run.device, dtype=torch.bfloat16)
    moved = source.nbytes + target.nbytes
    facts = {"op": "copy", "peer": "torch", "shape": shape or {"elements": size}, "direction": "forward"}
    run.measure(lambda: lambda: target.copy_(source), moved=moved, **facts)


def _matmul(run, side):
    left, right = _random(run, side, side), _random(run, side, side)
    facts = {"op": "matmul", "peer": "torch", "shape": {"m": side, "n": side, "k": side}, "direction": "forward"}
    run.measure(lambda: lambda: left @ right, flops=2 * side**3, **facts)


def _attention_shape(run, seqlen, head_dim, gqa=False):
    if run.dry:
        return {
            "batch": 2,
            "heads": 4,
            "kv_heads": 2 if gqa else 4,
            "seqlen": seqlen // 512 + 1,
            "head_dim": head_dim // 8,
        }
    if gqa:
        return {"batch": 1, "heads": 64, "kv_heads": 8, "seqlen": seqlen, "head_dim": head_dim}
    heads = CHANNELS // head_dim
    return {"batch": max(1, TOKENS // seqlen), "heads": heads, "kv_heads": heads, "seqlen": seqlen, "head_dim": head_dim}


def _qkv(run, shape):
    batch, seqlen, head_dim = shape["batch"], shape["seqlen"], shape["head_dim"]
    return [_random(run, batch, shape[heads], seqlen, head_dim) for heads in ("heads", "kv_heads", "kv_heads")]


def _bias(run, shape, kind):
    if kind == "none":
        return None
    return _random(
        run, shape["batch"] if kind == "bias [B,H,L,L]" else 1, shape["heads"], shape["seqlen"], shape["seqlen"]
    )


def _flops(shape, causal):
    """Of one forward."""
    return 4 * shape["batch"] * shape["heads"] * shape["seqlen"] ** 2 * shape["head_dim"] * (0.5 if causal else 1)


def _rms_error(output, query, key, value, bias, causal):
    """Relative rms error of the first head against float64, or None where that head is too large to repeat."""
    if query.shape[2] > EXACT_SEQLEN:
        return None
    query, key, value = (tensor[:1, :1].double() for tensor in (query, key, value))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias[:1, :1].double()
    if causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), float("-inf"))
    exact = scores.softmax(-1) @ value
    return ((output[:1, :1].double() - exact).norm() / exact.norm()).item()


def _directions(run, forward, tensors, *, exact=None, flops, **facts):
    """Two rows: forward without a graph, and backward alone. `tensors` get gradients; `flops` are one forward's."""

    def prepare_forward():
        with torch.no_grad():
            output = forward(*tensors)
        error = exact(output) if exact else None

        def call():
            with torch.no_grad():
                forward(*tensors)

        return call, error

    def prepare_backward():
        with torch.no_grad():
            grad_output = torch.randn_like(forward(*tensors))
        return gradients_of(forward, tensors, grad_output)

    run.measure(prepare_forward, flops=flops, direction="forward", **facts)
    run.measure(prepare_backward, flops=flops * BACKWARD_FLOPS, direction="backward", **facts)


def sdpa(run):
    """torch's three fused attention kernels, without a bias."""
    for seqlen in SEQLENS:
        for head_dim in HEAD_DIMS:
            shape = _attention_shape(run, seqlen, head_dim)
            tensors = _qkv(run, shape)
            for causal in (False, True):
                for peer in SDPA_PEERS:
                    _sdpa_rows(run, peer, shape, tensors, causal, "none")
    # Grouped queries as in the published cuDNN figures: batch 1, 64 query heads, 8 key heads.
    for seqlen in (4096, 8192, 2048, 16384):
        shape = _attention_shape(run, seqlen, 128, gqa=True)
        tensors = _qkv(run, shape)
        for causal in (False, True):
            for peer in ("cudnn", "flash"):
                _sdpa_rows(run, peer, shape, tensors, causal, "none", gqa=True)


def sdpa_bias(run):
    """The same with an additive bias that gets a gradient, full and broadcast over the batch; the padding mask too."""
    for seqlen in BIAS_SEQLENS:
        for head_dim in HEAD_DIMS:
            shape = _attention_shape(run, seqlen, head_dim)
            tensors = _qkv(run, shape)
            for kind in ("bias [1,H,L,L]", "bias [B,H,L,L]"):
                with run.guarded(op="attention", peer="sdpa", variant=kind, shape=shape):
                    biased = [*tensors, _bias(run, shape, kind)]
                    for peer in SDPA_PEERS:
                        _sdpa_rows(run, peer, shape, biased, False, kind)
                    biased = None  # gigabytes: gone before the next one is drawn
            shortest = max(1, shape["seqlen"] // 4)
            lengths = torch.linspace(shortest, shape["seqlen"], shape["batch"], device=run.device).long()
            keep = (torch.arange(shape["seqlen"], device=run.device) < lengths[:, None])[:, None, None, :]
            for peer in SDPA_PEERS:
                _sdpa_rows(run, peer, shape, tensors, False, "padding mask [B,1,1,L]", mask=keep)


def own_attention(run):
    """Ours on the same shapes: every kind and head size at one length, then at the others.

    Triton compiles each case for seconds, so CUDA is LENGTHS_AHEAD of it.
    """
    peers = _there(run, OWN_BACKENDS, op="attention")
    kinds = ((False, "none"), (True, "none"), (False, "bias [1,H,L,L]"), (False, "bias [B,H,L,L]"))
    seqlens = {kind: BIAS_SEQLENS if kind != "none" else SEQLENS for _, kind in kinds}
    turns = itertools.product(range(len(peers)), range(len(SEQLENS)))
    for place, rank in sorted(turns, key=lambda turn: turn[0] * LENGTHS_AHEAD + turn[1]):
        for head_dim in HEAD_DIMS:
            for causal, kind in kinds:
                for seqlen in seqlens[kind][rank : rank + 1]:
                    _own_rows(run, peers[place], _attention_shape(run, seqlen, head_dim), causal, kind)


def _own_rows(run, peer, shape, causal, kind):
    with run.guarded(op="attention", peer=peer, variant=kind, shape=shape):
        bias = _bias(run, shape, kind)
        tensors = _qkv(run, shape) + ([] if bias is None else [bias])
        _sdpa_rows(run, peer, shape, tensors, causal, kind)


def _own_sdpa(run, peer, query, key, value, bias, mask, causal, gqa):
    with transfuse.use_backend("auto" if run.dry else OWN_BACKENDS[peer]):
        return transfuse.scaled_dot_product_attention(
            query, key, value, mask, is_causal=causal, enable_gqa=gqa, attn_bias=bias
        )


def _sdpa_rows(run, peer, shape, tensors, causal, kind, mask=None, gqa=False):
    def forward(query, key, value, bias=None):
        if peer in OWN_BACKENDS:
            return _own_sdpa(run, peer, query, key, value, bias, mask, causal, gqa)
        if mask is not None:
            bias = mask.expand(-1, -1, query.shape[2], -1)
        elif bias is not None:
            bias = bias.expand(query.shape[0], -1, -1, -1)
        with sdpa_kernel(SDPA_PEERS[peer]):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=causal, enable_gqa=gqa)

    bias = tensors[3] if len(tensors) > 3 else None
    exact = None if mask is not None or gqa else lambda output: _rms_error(output, *tensors[:3], bias, causal)
    words = ("causal" if causal else "", "" if kind == "none" else kind, "gqa" if gqa else "")
    name = peer if peer in OWN_BACKENDS else f"sdpa {peer}"
    facts = {"op": "attention", "peer": name, "variant": ", ".join(filter(None, words)), "shape": shape}
    _directions(run, forward, tensors, exact=exact, flops=_flops(shape, causal), **facts)


def varlen(run):
    """Packed sequences of mixed lengths (1/16 to all of the longest): ours, torch's own, and flash on them padded."""
    peers = _there(run, OWN_BACKENDS, op="varlen_attention")
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        varlen_attn = None
        run.add(op="varlen_attention", peer="torch varlen_attn", status="refused", reason=str(error))
    for longest in (512, 4096):
        for head_dim in (64, 128):
            _varlen_rows(run, peers, varlen_attn, *((8, 2) if run.dry else (longest, CHANNELS // head_dim)), head_dim)


def _varlen_rows(run, peers, varlen_attn, longest, heads, head_dim):
    shares = (0.06, 0.5, 0.25, 1.0, 0.12, 0.37, 0.75, 0.18)  # of the longest; repeated until about TOKENS are there
    repeats = 1 if run.dry else max(1, round(TOKENS / (longest * sum(shares))))
    lengths = [max(1, int(longest * share)) for share in shares * repeats]
    offsets = torch.tensor([0, *lengths], device=run.device).cumsum(0).int()
    shape = {
        "sequences": len(lengths),
        "tokens": sum(lengths),
        "longest": longest,
        "heads": heads,
        "head_dim": head_dim,
    }

    def torchs(query, key, value):
        return varlen_attn(query, key, value, offsets, offsets, longest, longest)

    def ours(peer):
        def forward(query, key, value):
            with transfuse.use_backend("auto" if run.dry else OWN_BACKENDS[peer]):
                return transfuse.varlen_attention(query, key, value, offsets, max_seqlen_q=longest)

        return forward

    def padded(query, key, value):
        with sdpa_kernel(SDPA_PEERS["flash"]):
            return F.scaled_dot_product_attention(query, key, value)

    flops = sum(length * length for length in lengths) * heads * 4 * head_dim  # of what is asked for: no padding
    facts = {"op": "varlen_attention", "shape": shape, "flops": flops}
    tensors = [_random(run, sum(lengths), heads, head_dim) for _ in range(3)]
    for peer in peers[:1]:
        _directions(run, ours(peer), tensors, peer=peer, **facts)
    if varlen_attn is not None:
        _directions(run, torchs, tensors, peer="torch varlen_attn", **facts)
    whole = [_random(run, len(lengths), longest, heads, head_dim).transpose(1, 2) for _ in range(3)]
    _directions(run, padded, whole, peer="sdpa flash", variant="padded", **facts)
    for peer in peers[1:]:  # Triton compiles: last
        _directions(run, ours(peer), tensors, peer=peer, **facts)


def decode(run):
    """One new token of each entry against its cache: ours, contiguous and in pages, and torch on the filled slice."""
    own = _there(run, OWN_BACKENDS, op="decode_attention")
    for batch, keys in DECODE_SIZES:
        shape = {"batch": batch, "heads": DECODE_HEADS, "kv_heads": DECODE_KV_HEADS, "keys": keys,
                 "head_dim": DECODE_HEAD_DIM}  # fmt: skip
        if run.dry:
            shape = {"batch": 2, "heads": 4, "kv_heads": 2, "keys": keys // 64, "head_dim": 16}
        with run.guarded(op="decode_attention", peer="all", shape=shape):
            _decode_rows(run, own, shape)


def _decode_rows(run, own, shape):
    batch, keys, kv_heads, head_dim = (shape[name] for name in ("batch", "keys", "kv_heads", "head_dim"))
    page = 4 if run.dry else DECODE_PAGE
    capacity = keys + (page if run.dry else DECODE_SPARE)
    query = _random(run, batch, shape["heads"], 1, head_dim)
    caches = [_random(run, batch, kv_heads, capacity, head_dim) for _ in range(2)]
    lengths = torch.full((batch,), keys, dtype=torch.int32, device=run.device)
    table = torch.randperm(batch * (capacity // page), device=run.device).int().view(batch, -1)
    facts = {"op": "decode_attention", "direction": "forward", "shape": shape}
    facts["moved"] = sum(cache[:, :, :keys].numel() * cache.element_size() for cache in caches)

    def stock():
        key, value = (cache[:, :, :keys] for cache in caches)
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    def ours(peer, caches, block_table):
        def call():
            with transfuse.use_backend("auto" if run.dry else OWN_BACKENDS[peer]):
                return transfuse.decode_attention(query, *caches, lengths, block_table=block_table)

        return call

    def judged(call, caches=caches, table=None):
        """With the relative rms error of the first entry's first head against float64."""
        if table is not None:
            caches = [pages[table[0].long()].flatten(0, 1).transpose(0, 1)[None] for pages in caches]
        key, value = (cache[:1, :1, :keys].double() for cache in caches)
        exact = (query[:1, :1].double() @ key.mT * head_dim**-0.5).softmax(-1) @ value
        return call, ((call()[:1, :1].double() - exact).norm() / exact.norm()).item()

    with torch.no_grad():
        for peer in own:
            run.measure(lambda peer=peer: judged(ours(peer, caches, None)), peer=peer, **facts)
        run.measure(lambda: judged(stock), peer="sdpa gqa", **facts)
        pages = [_random(run, table.numel(), page, kv_heads, head_dim) for _ in range(2)]
        for peer in own:
            call = ours(peer, pages, table)
            run.measure(lambda call=call: judged(call, pages, table), peer=peer, variant=f"pages of {page}", **facts)


def flex(run):
    """FlexAttention, compiled per shape: plain, causal, and with a bias that gets a gradient."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    cases = [
        (kind, seqlen, head_dim)
        for seqlen in ((4096,) if run.dry else (4096, 1024, 8192))
        for head_dim in (64, 128)
        for kind in ("none", "causal", "bias [1,H,L,L]", "bias [B,H,L,L]")
    ]
    for kind, seqlen, head_dim in cases:
        shape = _attention_shape(run, seqlen, head_dim)
        facts = {"op": "attention", "peer": "flex compiled", "variant": "" if kind == "none" else kind, "shape": shape}
        with run.guarded(**facts):
            torch._dynamo.reset()  # past the recompile limit dynamo would run the unfused form without a word
            attend = flex_attention if run.dry else compiled(flex_attention)
            _flex_rows(run, attend, create_block_mask, kind, facts)


def _flex_rows(run, attend, create_block_mask, kind, facts):
    shape, causal, full = facts["shape"], kind == "causal", kind == "bias [B,H,L,L]"
    bias = _bias(run, shape, "none" if causal else kind)
    tensors = _qkv(run, shape) + ([] if bias is None else [bias])
    blocks = None
    if causal:
        length = shape["seqlen"]
        blocks = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=run.device)

    def forward(query, key, value, bias=None):
        if bias is None:
            return attend(query, key, value, block_mask=blocks)

        def add_bias(score, b, h, q, k):
            return score + (bias[b, h, q, k] if full else bias[0, h, q, k])

        return attend(query, key, value, score_mod=add_bias)

    def exact(output):
        return _rms_error(output, *tensors[:3], bias, causal)

    _directions(run, forward, tensors, exact=exact, flops=_flops(shape, causal), **facts)


def _add_layer_norm(input, residual, weight, bias):
    return F.layer_norm(input + residual, input.shape[-1:], weight, bias)


ROTARY_DIM = 64  # of every head, all of it rotated; of a narrower row, all
SMALL_SIZES = ((1, 384), (32, 384), (128, 768), (4096, 768))  # rows, columns


def _by_heads(rotate):
    """rotate(x [1, H, L, D], cos, sin) as a call on [L, H * D], the layout of a projection."""

    def call(x, table):
        cos, sin = table.chunk(2, -1)
        heads = x.view(1, x.shape[0], -1, table.shape[1]).transpose(1, 2)
        return rotate(heads, cos, sin).transpose(1, 2).reshape(x.shape)

    return call


@_by_heads
def _rotary(x, cos, sin):
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


# op -> (call, row inputs, weights, elements that forward and backward move per element of the row)
ROW_OPS = {
    "layer_norm": (lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b), 1, 2, 2, 3),
    "rms_norm": (lambda x, w: F.rms_norm(x, x.shape[-1:], w), 1, 1, 2, 3),
    "softmax": (lambda x: torch.softmax(x, -1), 1, 0, 2, 3),
    "gelu": (lambda x: F.gelu(x), 1, 0, 2, 3),
    "add_layer_norm": (_add_layer_norm, 2, 2, 3, 3),
    "bias_gelu": (lambda x, b: F.gelu(x + b), 1, 1, 2, 3),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), 1, 0, 2, 3),
    "rotary": (_rotary, 1, 0, 2, 2),
}


# The same calls in transfuse.
OWN_ROW_OPS = {
    "layer_norm": lambda x, w, b: transfuse.layer_norm(x, x.shape[-1:], w, b),
    "rms_norm": lambda x, w: transfuse.rms_norm(x, x.shape[-1:], w),
    "softmax": lambda x: transfuse.masked_softmax(x),
    "gelu": lambda x: transfuse.gelu(x),
    "add_layer_norm": lambda x, y, w, b: transfuse.add_layer_norm(x, y, x.shape[-1:], w, b)[0],
    "bias_gelu": lambda x, b: transfuse.gelu(x, bias=b),
    "gelu_tanh": lambda x: transfuse.gelu(x, approximate="tanh"),
    "rotary": _by_heads(lambda x, cos, sin: transfuse.rotary(x, cos, sin)),
}


def row_kernels(run):
    """Ours and torch's own kernels, then those that compile first, ours and torch.compile's: a deadline cuts these."""
    sizes = [(8, columns // 64) if run.dry else (ROWS, columns) for columns in COLUMNS]
    for rows, columns in sizes:  # what a kernel on as many bytes can reach: a small one pays for its start and end
        _copy(run, rows * columns, {"rows": rows, "columns": columns})
    for peer in _there(run, ("transfuse cuda", "torch eager", "transfuse triton", "torch.compile")):
        for rows, columns in sizes:
            for op in ROW_OPS:
                _row_rows(run, op, peer, rows, columns)


def small_rows(run):
    """Sizes at which the host decides: what a call costs with Python and launch, ours beside torch's."""
    peers = _there(run, ("transfuse cuda", "transfuse triton", "torch eager"))
    for rows, columns in SMALL_SIZES:
        for op in ROW_OPS:
            for peer in peers:
                _row_rows(run, op, peer, *((2, 6) if run.dry else (rows, columns)), timer=run.time_with_host)


def _there(run, peers, op="all"):
    """The peers that this machine has; a backend of ours that it has not is a row with its reason."""
    available, there = transfuse.backends(), []
    for peer in peers:
        state = available[OWN_BACKENDS[peer]] if peer in OWN_BACKENDS and not run.dry else True
        if state is True:
            there.append(peer)
        else:
            run.add(op=op, peer=peer, status="skipped", reason=state)
    return there


def _row_rows(run, op, peer, rows, columns, timer=None):
    function, row_inputs, weights, *moves = ROW_OPS[op]
    function = OWN_ROW_OPS[op] if peer in OWN_BACKENDS else function
    tensors = [_random(run, rows, columns) for _ in range(row_inputs)] + [_random(run, columns) for _ in range(weights)]
    if op == "rotary":
        tensors.append(_random(run, rows, min(ROTARY_DIM, columns)))  # the angles, sine and cosine side by side
    if peer == "torch.compile":
        torch._dynamo.reset()
    call = compiled(function) if peer == "torch.compile" and not run.dry else function

    def forward():
        with torch.no_grad():
            return call(*tensors)

    prepare = {
        "forward": lambda: forward,
        "backward": lambda: gradients_of(call, tensors, torch.randn_like(tensors[0])),
    }
    with transfuse.use_backend("auto" if run.dry else OWN_BACKENDS.get(peer, "auto")):
        for direction, moved in zip(("forward", "backward"), moves, strict=True):
            run.measure(
                prepare[direction],
                moved=moved * rows * columns * 2,
                timer=timer,
                op=op,
                peer=peer,
                direction=direction,
                shape={"rows": rows, "columns": columns},
            )


def models(run):
    """A stock BERT-base encoder with padding, forward, as transformers runs it: what a user of a GPU has today."""
    try:
        from transformers import BertConfig, BertModel
    except ImportError as error:
        run.add(op="bert_base", peer="transformers sdpa", status="refused", reason=str(error))
        return
    sizes = (
        {
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "vocab_size": 100,
        }
        if run.dry
        else {}
    )
    model = BertModel(BertConfig(**sizes), add_pooling_layer=False).to(run.device, torch.bfloat16).eval()
    for batch, seqlen in ((128, 128), (32, 512)):
        batch, seqlen = (2, 8) if run.dry else (batch, seqlen)
        lengths = torch.linspace(max(1, seqlen // 8), seqlen, batch, device=run.device).long()
        keep = (torch.arange(seqlen, device=run.device) < lengths[:, None]).long()
        tokens = torch.randint(1, 90, (batch, seqlen), device=run.device)

        def forward(tokens=tokens, keep=keep):
            with torch.no_grad():
                return model(input_ids=tokens, attention_mask=keep).last_hidden_state

        run.measure(
            lambda: forward,
            op="bert_base",
            peer="transformers sdpa",
            direction="forward",
            variant=f"fill {keep.float().mean().item():.2f}",
            shape={"batch": batch, "seqlen": seqlen},
        )
