"""What the Triton backend refuses, in words that name it; and what its first calls may rest on."""

import pytest
import torch

import transfuse
from transfuse.kernels.triton import gelu, launch
from transfuse.kernels.triton.gelu_tables import SEGMENTS
from transfuse.testing import draw

_OFFSETS = torch.tensor([0, 2, 5])
CALLS = {
    "layer_norm": lambda x: transfuse.layer_norm(x, (16,)),
    "add_layer_norm": lambda x: transfuse.add_layer_norm(x, x, (16,))[0],
    "rms_norm": lambda x: transfuse.rms_norm(x, (16,)),
    "add_rms_norm": lambda x: transfuse.add_rms_norm(x, x, (16,))[0],
    "gelu": transfuse.gelu,
    "masked_softmax": transfuse.masked_softmax,
    "rotary": lambda x: transfuse.rotary(x.expand(5, 16), x[:, :8], x[:, 8:]),
    "attention": lambda x: transfuse.scaled_dot_product_attention(x[None], x[None], x[None]),
    "varlen_attention": lambda x: transfuse.varlen_attention(x[:, None], x[:, None], x[:, None], _OFFSETS),
}


@pytest.mark.parametrize("op", CALLS)
def test_what_has_no_derivative_names_the_backend(op):
    x = draw(5, 16, seed=1)
    with transfuse.use_backend("triton"):
        with pytest.raises(RuntimeError, match=f"^{op}: the triton backend has no forward-mode derivative; run under"):
            torch.func.jvp(CALLS[op], (x,), (x,))
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(CALLS[op](leaf).square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=f"^{op}: the triton backend has no second derivative; run under"):
            grad.square().sum().backward()


def test_decoding_names_the_backend():
    cache, lengths = draw(1, 2, 8, 16, seed=1), torch.tensor([3])
    query = draw(1, 2, 1, 16, seed=2)
    with transfuse.use_backend("triton"), pytest.raises(RuntimeError, match="the triton backend has no forward-mode"):
        torch.func.jvp(lambda q: transfuse.decode_attention(q, cache, cache, lengths), (query,), (query,))


# The cases of tests/test_decode_attention_refusals.py, where the CPU's kernel refuses them.
def test_what_is_appended_to_is_not_what_is_read():
    cache, other = torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 16)
    new, query, lengths = torch.ones(1, 2, 1, 16), torch.ones(1, 2, 1, 16), torch.tensor([3])
    last = slice(7, 8)
    with transfuse.use_backend("triton"):
        for arguments, text in (
            ((cache, cache, new, new), "value_cache is key_cache, expected memory of its own to write new values to"),
            ((cache, other, cache[:, :, 4:5], new), "new_key lies in the memory of key_cache"),
            ((cache, other, other[:, :, last], new), "new_key lies in the memory of value_cache"),
            ((cache, other, new, cache[:, :, :1]), "new_value lies in the memory of key_cache"),
            ((cache, other, new, other[:, :, last]), "new_value lies in the memory of value_cache"),
        ):
            keys, values, new_key, new_value = arguments
            with pytest.raises(ValueError, match=f"^decode_attention: {text}"):
                transfuse.decode_attention(query, keys, values, lengths, new_key=new_key, new_value=new_value)
        assert not cache.any() and not other.any()
        both = torch.zeros(1, 2, 2, 8, 16)  # two caches in turns in one memory are apart
        transfuse.decode_attention(query, both[:, 0], both[:, 1], lengths, new_key=new, new_value=new)
        assert both[:, :, :, 3].all() and not both[:, :, :, 4:].any()
        # What lies right before and right behind a cache is not in it.
        row = torch.zeros(16 + 2 * 8 * 16 + 16)
        row[:16], row[-16:] = 1, 2
        new_key, new_value = row[:16].view(1, 1, 1, 16), row[-16:].view(1, 1, 1, 16)
        keys, values = row[16:-16].view(2, 1, 1, 8, 16)
        transfuse.decode_attention(query[:, :1], keys, values, lengths, new_key=new_key, new_value=new_value)
        assert torch.equal(keys[0, 0, 3], row[:16]) and torch.equal(values[0, 0, 3], row[-16:])


# ---- gelu's coefficients ----


@pytest.mark.parametrize("form,direction", SEGMENTS)
def test_a_kernel_writes_the_coefficients(form, direction, monkeypatch):
    monkeypatch.setattr(gelu, "_tables", {})
    cpu, which = torch.device("cpu"), (form == "tanh", direction == "backward")
    numbers = torch.tensor(SEGMENTS[form, direction], dtype=torch.float32).flatten()
    with launch.recording(launch.SM90) as recorded:
        gelu._table(*which, cpu)
    assert len(recorded.calls) == 1 and not gelu._tables, "what was only recorded is kept"
    monkeypatch.setattr(gelu, "_is_captured", lambda device: True)
    of_graph = gelu._table(*which, cpu)
    assert torch.equal(of_graph, numbers) and gelu._table(*which, cpu) is not of_graph, "a graph's memory is kept"
    monkeypatch.setattr(gelu, "_is_captured", lambda device: False)
    kept = gelu._table(*which, cpu)
    assert torch.equal(kept, numbers) and gelu._table(*which, cpu) is kept


def test_no_tensor_of_gelu_comes_from_the_host(monkeypatch):
    """A capture cannot hold a copy from memory that is not pinned: the first call makes none."""
    monkeypatch.setattr(gelu, "_tables", {})
    monkeypatch.setattr(torch, "tensor", lambda *args, **options: pytest.fail("a tensor of numbers of the host"))
    with transfuse.use_backend("triton"):
        assert transfuse.gelu(torch.ones(3)).isfinite().all()
