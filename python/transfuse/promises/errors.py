"""CONTRACT section 5: a bad call is refused before memory is touched, naming op, argument, expected and got.

The exact words of every refusal are tested beside each op; here stands what all of them have in common.
"""

import re
from functools import partial

import torch

import transfuse
from transfuse.promises.cases import OPS
from transfuse.promises.promise import Figure, NoKernel, Promise

# "attention: key has head_dim 32, expected 64 (query's)"
FORM = r"{op}: (?P<argument>\w+)(\[\d+\])? (is|has|are) .+, expected .+"

X, ROW = torch.ones(2, 5), torch.ones(5)
Q, K, V = torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 5, 8)
LENGTHS, COS = torch.tensor([4, 5]), torch.ones(3, 4)
TOKENS, OFFSETS = torch.zeros(6, 4, 8), torch.tensor([0, 2, 6], dtype=torch.int32)
META = {"device": "meta"}


def _call(name, *args, **kwargs):
    return lambda: getattr(transfuse, name)(*args, **kwargs)


_attention = partial(_call, "scaled_dot_product_attention")
_varlen = partial(_call, "varlen_attention")
_softmax = partial(_call, "masked_softmax")
_norm = partial(_call, "layer_norm")
_add_norm = partial(_call, "add_layer_norm")
_rms = partial(_call, "rms_norm")
_add_rms = partial(_call, "add_rms_norm")
_gelu = partial(_call, "gelu")
_rotary = partial(_call, "rotary")
_decode = partial(_call, "decode_attention")

# op -> (argument that the message names, exception, call)
BAD_CALLS = {
    "attention": (
        ("query", TypeError, _attention([1], K, V)),
        ("query", TypeError, _attention(Q.long(), K, V)),
        ("query", TypeError, _attention(Q.to_sparse(), K, V)),
        ("query", ValueError, _attention(Q[0, 0, 0], K, V)),
        ("query", ValueError, _attention(Q[..., :0], K[..., :0], V)),
        ("key", TypeError, _attention(Q, K.bfloat16(), V)),
        ("key", ValueError, _attention(Q, K[..., :7], V)),
        ("key", ValueError, _attention(Q, K[:, :3], V[:, :3])),
        ("key", ValueError, _attention(Q, K[:, :3], V[:, :3], enable_gqa=True)),
        ("key", RuntimeError, _attention(Q, K.to(**META), V)),
        ("value", ValueError, _attention(Q, K, V[:, :, :4])),
        ("attn_mask", TypeError, _attention(Q, K, V, torch.ones(3, 5).long())),
        ("attn_mask", ValueError, _attention(Q, K, V, torch.ones(5, 3))),
        ("attn_mask", RuntimeError, _attention(Q, K, V, torch.ones(3, 5, **META))),
        ("attn_bias", TypeError, _attention(Q, K, V, attn_bias=torch.ones(3, 5) > 0)),
        ("dropout_p", ValueError, _attention(Q, K, V, dropout_p=1.5)),
        ("dropout_p", TypeError, _attention(Q, K, V, dropout_p="0.1")),
        ("is_causal", TypeError, _attention(Q, K, V, is_causal=torch.tensor(True))),
        ("scale", ValueError, _attention(Q, K, V, scale=float("nan"))),
        ("scale", TypeError, _attention(Q, K, V, scale=torch.tensor(1.0))),
        ("enable_gqa", TypeError, _attention(Q, K, V, enable_gqa=1)),
        ("causal_alignment", ValueError, _attention(Q, K, V, causal_alignment="left")),
        ("seqlens_k", TypeError, _attention(Q, K, V, seqlens_k=[1, 2])),
        ("seqlens_k", ValueError, _attention(Q, K, V, seqlens_k=torch.tensor([1, 2, 3]))),
        ("seqlens_k", ValueError, _attention(Q, K, V, seqlens_k=torch.tensor([5, 6]))),
        ("window", TypeError, _attention(Q, K, V, window=3)),
        ("window", ValueError, _attention(Q, K, V, window=(-1, 0))),
        ("softcap", ValueError, _attention(Q, K, V, softcap=0.0)),
        ("alibi_slopes", ValueError, _attention(Q, K, V, alibi_slopes=torch.ones(2))),
        ("sinks", TypeError, _attention(Q, K, V, sinks=1.0)),
    ),
    "varlen_attention": (
        ("query", TypeError, _varlen(1, TOKENS, TOKENS, OFFSETS)),
        ("query", ValueError, _varlen(TOKENS[0], TOKENS, TOKENS, OFFSETS)),
        ("key", ValueError, _varlen(TOKENS, TOKENS[..., :7], TOKENS, OFFSETS)),
        ("key", TypeError, _varlen(TOKENS, TOKENS.double(), TOKENS, OFFSETS)),
        ("value", ValueError, _varlen(TOKENS, TOKENS, TOKENS[:5], OFFSETS)),
        ("cu_seqlens_q", TypeError, _varlen(TOKENS, TOKENS, TOKENS, OFFSETS.float())),
        ("cu_seqlens_q", ValueError, _varlen(TOKENS, TOKENS, TOKENS, OFFSETS[None])),
        ("cu_seqlens_q", ValueError, _varlen(TOKENS, TOKENS, TOKENS, OFFSETS + 1)),
        ("cu_seqlens_q", ValueError, _varlen(TOKENS, TOKENS, TOKENS, OFFSETS.flip(0))),
        ("scale", ValueError, _varlen(TOKENS, TOKENS, TOKENS, OFFSETS, scale=float("inf"))),
        ("causal_alignment", ValueError, _varlen(TOKENS, TOKENS, TOKENS, OFFSETS, causal_alignment="left")),
    ),
    "masked_softmax": (
        ("input", TypeError, _softmax([1.0])),
        ("input", TypeError, _softmax(X.long())),
        ("input", ValueError, _softmax(torch.tensor(1.0))),
        ("input", ValueError, _softmax(ROW, is_causal=True)),
        ("dim", ValueError, _softmax(X, dim=2)),
        ("dim", TypeError, _softmax(X, dim=1.0)),
        ("scale", TypeError, _softmax(X, scale="1")),
        ("scale", ValueError, _softmax(X, scale=float("inf"))),
        ("causal_alignment", ValueError, _softmax(X, causal_alignment="left")),
        ("mask", TypeError, _softmax(X, [True])),
        ("mask", TypeError, _softmax(X, X.long())),
        ("mask", ValueError, _softmax(X, torch.ones(2) > 0)),
        ("mask", RuntimeError, _softmax(X, torch.ones(5, **META) > 0)),
    ),
    "layer_norm": (
        ("input", TypeError, _norm([1.0], (1,))),
        ("input", TypeError, _norm(X.long(), (5,))),
        ("input", ValueError, _norm(X, (4,))),
        ("normalized_shape", TypeError, _norm(X, 5)),
        ("normalized_shape", ValueError, _norm(X, ())),
        ("eps", TypeError, _norm(X, (5,), eps="small")),
        ("eps", ValueError, _norm(X, (5,), eps=-1.0)),
        ("weight", TypeError, _norm(X, (5,), 1.0)),
        ("weight", TypeError, _norm(X, (5,), ROW.bfloat16())),
        ("weight", ValueError, _norm(X, (5,), ROW[:4])),
        ("weight", RuntimeError, _norm(X, (5,), ROW.to(**META))),
        ("bias", ValueError, _norm(X, (5,), ROW, X)),
    ),
    "add_layer_norm": (
        ("residual", TypeError, _add_norm(X, None, (5,))),
        ("residual", TypeError, _add_norm(X, X.long(), (5,))),
        ("residual", ValueError, _add_norm(X, ROW, (5,))),
        ("residual", RuntimeError, _add_norm(X, X.to(**META), (5,))),
        ("dropout_p", ValueError, _add_norm(X, X, (5,), dropout_p=1.5)),
    ),
    "rms_norm": (
        ("input", TypeError, _rms([1.0], (1,))),
        ("input", TypeError, _rms(X.long(), (5,))),
        ("input", ValueError, _rms(X, (4,))),
        ("normalized_shape", TypeError, _rms(X, 5)),
        ("normalized_shape", ValueError, _rms(X, ())),
        ("eps", TypeError, _rms(X, (5,), eps="small")),
        ("eps", ValueError, _rms(X, (5,), eps=-1.0)),
        ("weight", TypeError, _rms(X, (5,), 1.0)),
        ("weight", ValueError, _rms(X, (5,), ROW[:4])),
        ("weight", RuntimeError, _rms(X, (5,), ROW.to(**META))),
    ),
    "add_rms_norm": (
        ("residual", TypeError, _add_rms(X, None, (5,))),
        ("residual", TypeError, _add_rms(X, X.long(), (5,))),
        ("residual", ValueError, _add_rms(X, ROW, (5,))),
        ("residual", RuntimeError, _add_rms(X, X.to(**META), (5,))),
        ("dropout_p", ValueError, _add_rms(X, X, (5,), dropout_p=1.5)),
    ),
    "gelu": (
        ("input", TypeError, _gelu([1.0])),
        ("input", TypeError, _gelu(X.long())),
        ("approximate", ValueError, _gelu(X, "erf")),
        ("bias", TypeError, _gelu(X, bias=1.0)),
        ("bias", TypeError, _gelu(X, bias=ROW.bfloat16())),
        ("bias", ValueError, _gelu(X, bias=X)),
        ("bias", RuntimeError, _gelu(X, bias=ROW.to(**META))),
    ),
    "rotary": (
        ("input", TypeError, _rotary([1.0], COS, COS)),
        ("input", TypeError, _rotary(Q.long(), COS, COS)),
        ("input", ValueError, _rotary(ROW, COS, COS)),
        ("cos", TypeError, _rotary(Q, COS.double(), COS)),
        ("cos", ValueError, _rotary(Q, COS[:2], COS)),
        ("sin", TypeError, _rotary(Q, COS, COS.double())),
        ("sin", ValueError, _rotary(Q, COS, COS[:, :3])),
        ("sin", RuntimeError, _rotary(Q, COS, COS.to(**META))),
        ("interleaved", TypeError, _rotary(Q, COS, COS, interleaved=1)),
    ),
    "decode_attention": (
        ("query", TypeError, _decode([1], K, V, LENGTHS)),
        ("query", ValueError, _decode(Q[0], K, V, LENGTHS)),
        ("key_cache", TypeError, _decode(Q, K.double(), V, LENGTHS)),
        ("key_cache", ValueError, _decode(Q, K[..., :7], V, LENGTHS)),
        ("value_cache", ValueError, _decode(Q, K, V[:, :, :4], LENGTHS)),
        ("cache_seqlens", TypeError, _decode(Q, K, V, LENGTHS.float())),
        ("cache_seqlens", ValueError, _decode(Q, K, V, LENGTHS[:1])),
        ("cache_seqlens", ValueError, _decode(Q, K, V, LENGTHS + 1)),
        ("new_value", ValueError, _decode(Q, K, V, LENGTHS - 3, new_key=K[:, :, :1], new_value=V[:, :, :2])),
        (
            "block_table",
            TypeError,
            _decode(Q, K.transpose(1, 2), V.transpose(1, 2), LENGTHS, block_table=torch.zeros(2, 1)),
        ),
        ("window", ValueError, _decode(Q, K, V, LENGTHS, window=(-1, 0))),
        ("softcap", ValueError, _decode(Q, K, V, LENGTHS, softcap=0.0)),
        ("scale", ValueError, _decode(Q, K, V, LENGTHS, scale=float("nan"))),
    ),
}


def _refused_badly(op, argument, kind, call):
    """What is wrong with how a bad call is refused; empty where it is right."""
    try:
        call()
    except Exception as error:
        words = str(error)
        form = re.fullmatch(FORM.format(op=op), words, re.S)
        if type(error) is not kind:
            return f"{argument}: {type(error).__name__}, expected {kind.__name__}: {words}"
        if form is None or form["argument"] != argument:
            return f"{argument}: said {words!r}"
        return ""
    return f"{argument}: accepted"


def _count(op, backend, device):
    wrong = [words for bad in BAD_CALLS[op] if (words := _refused_badly(op, *bad))]
    return Figure(len(wrong), "; ".join(wrong[:3]) or f"of {len(BAD_CALLS[op])} calls")


def _allocation(op, call, backend, device):
    """2^36 rows of one row's memory: the result cannot be had, and the message says how much was asked for."""
    if backend == "reference":
        raise NoKernel("torch allocates for the reference, and words its own failures")
    rows = torch.zeros(1, 8, device=device).expand(2**36, 8)
    try:
        call(rows)
    except RuntimeError as error:
        said = str(error)
    else:
        return Figure(1, "accepted")
    return Figure(int(re.match(rf"{op}: could not allocate {2**36 * 8 * 4} bytes", said) is None), said.splitlines()[0])


TOO_LARGE = {
    "attention": lambda x: transfuse.scaled_dot_product_attention(x, x[:1], x[:1]),
    "masked_softmax": lambda x: transfuse.masked_softmax(x),
    "layer_norm": lambda x: transfuse.layer_norm(x, (8,)),
    "rms_norm": lambda x: transfuse.rms_norm(x, (8,)),
    "gelu": lambda x: transfuse.gelu(x),
}

PROMISES = (
    *(
        Promise(
            f"5.{op}.any.bad-calls",
            5,
            op,
            None,
            f"{len(BAD_CALLS[op])} bad calls are refused in words",
            0,
            "calls refused badly",
            partial(_count, op),
        )
        for op in OPS
    ),
    *(
        Promise(
            f"5.{op}.any.allocation",
            5,
            op,
            None,
            "a failed allocation names op and bytes",
            0,
            "messages wrong",
            partial(_allocation, op, call),
        )
        for op, call in TOO_LARGE.items()
    ),
)
