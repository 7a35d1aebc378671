"""Dispatch: the ordered list, the override, fallbacks that are seen, and explain()."""

import os
import subprocess
import sys
import threading
from dataclasses import dataclass

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import transfuse
from transfuse import dispatch
from transfuse.dispatch import Implementation, Problem, TransfuseWarning, cpu_reasons, select, supports_all


@dataclass(frozen=True)
class DoubleProblem(Problem):
    """The problem of a toy op, y = 2x."""

    length: int


IMPLEMENTATIONS = (
    Implementation("cpu", lambda problem: cpu_reasons(problem, (torch.float32, torch.bfloat16)), lambda x: x + x),
    Implementation("torch", supports_all, lambda x: 2 * x, automatic=False),
    Implementation("reference", supports_all, lambda x: (2 * x.double()).to(x.dtype)),
)


def _problem(x):
    return DoubleProblem("double", x.device.type, x.dtype, x.requires_grad, x.numel())


def double(x):
    """y = 2x through the dispatcher."""
    return select("double", IMPLEMENTATIONS, (x.device.type, x.dtype, x.requires_grad), lambda: _problem(x)).run(x)


double.explain_problem = lambda x: ("double", IMPLEMENTATIONS, _problem(x))


def _chosen(x):
    return select("double", IMPLEMENTATIONS, (x.device.type, x.dtype, x.requires_grad), lambda: _problem(x)).name


def test_auto_takes_the_first_that_can():
    assert _chosen(torch.ones(2)) == "cpu"


def test_fallback_warns_once_per_reason_and_is_counted():
    dispatch._warned.clear()
    x = torch.ones(2, dtype=torch.float16)
    before = sum(dispatch.fallback_counts().values())
    with pytest.warns(TransfuseWarning, match="dtype is float16, the kernel takes float32, bfloat16"):
        assert _chosen(x) == "reference"
    assert _chosen(x) == "reference"  # the second time is silent: a warning would be an error here
    assert sum(dispatch.fallback_counts().values()) == before + 2


def test_use_backend_turns_fallback_off():
    with transfuse.use_backend("cpu"), pytest.raises(RuntimeError) as error:
        _chosen(torch.ones(2, dtype=torch.float16))
    assert str(error.value) == ("double: no backend can run this under use_backend('cpu'):\n"
                                "  cpu: dtype is float16, the kernel takes float32, bfloat16")
    with transfuse.use_backend("cuda"), pytest.raises(RuntimeError, match="cuda: the op has no such backend"):
        _chosen(torch.ones(2))


def test_use_backend_nests_and_restores():
    x = torch.ones(2)
    with transfuse.use_backend("reference"):
        assert _chosen(x) == "reference"
        with transfuse.use_backend("torch"):
            assert _chosen(x) == "torch"
        assert _chosen(x) == "reference"
    assert _chosen(x) == "cpu"


def test_a_pin_stays_in_its_thread():
    """Models with a backend of their own, called by eight threads at once, while another thread has none."""
    before, interval, stop, seen = dispatch.setting(), sys.getswitchinterval(), threading.Event(), set()
    pinned = set()

    def watch():
        while not stop.is_set():
            seen.add(dispatch.setting())

    def call():
        for _ in range(500):
            with dispatch.prefer_backend("reference"):
                pinned.add(dispatch.setting())

    watcher, callers = threading.Thread(target=watch), [threading.Thread(target=call) for _ in range(8)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in (watcher, *callers):
            thread.start()
        for thread in callers:
            thread.join()
    finally:
        stop.set()
        watcher.join()
        sys.setswitchinterval(interval)
    assert pinned == {"reference"} and seen <= {before} and dispatch.setting() == before


def test_use_backend_goes_before_a_pin():
    x = torch.ones(2)
    with dispatch.prefer_backend("torch"):
        assert _chosen(x) == "torch"
        with transfuse.use_backend("reference"):
            assert _chosen(x) == "reference"
        with transfuse.use_backend("auto"), dispatch.prefer_backend("reference"):
            assert _chosen(x) == "cpu"
        assert _chosen(x) == "torch"
    assert _chosen(x) == "cpu"


def test_compile_traces_a_pin():
    def pinned(x):
        with dispatch.prefer_backend("torch"):
            return double(x), dispatch.setting()

    output, name = torch.compile(pinned, fullgraph=True, backend="eager")(torch.ones(3))
    assert name == "torch" and torch.equal(output, torch.full((3,), 2.0)) and dispatch.setting() == "auto"


@pytest.mark.parametrize(("name", "kind", "text"), [
    ("gpu", ValueError, "use_backend: name is 'gpu', expected one of auto, cuda, triton, cpu, torch, reference"),
    (3, TypeError, "use_backend: name is a int, expected str"),
])
def test_use_backend_refuses(name, kind, text):
    with pytest.raises(kind) as error, transfuse.use_backend(name):
        pass
    assert str(error.value) == text


def test_explain_lists_every_reason():
    explanation = transfuse.explain(double, torch.ones(3, dtype=torch.float16))
    assert explanation.chosen == "reference"
    text = str(explanation)
    assert text.splitlines()[0] == "double(device=cpu, dtype=float16, requires_grad=False, length=3)"
    assert "cpu        dtype is float16" in text and "-> reference  runs" in text
    with transfuse.use_backend("cpu"):
        assert "use_backend('cpu') is in force" in str(transfuse.explain(double, torch.ones(3)))
    with pytest.raises(TypeError, match="explain: function is 'add', expected an op of transfuse"):
        transfuse.explain(torch.add, 1, 2)


def test_backends_name_themselves_or_a_reason():
    found = transfuse.backends()
    assert list(found) == ["cuda", "triton", "cpu", "torch", "reference"]
    assert found["cpu"] is True and found["reference"] is True
    assert all(value is True or (isinstance(value, str) and value) for value in found.values())


def _triton_problem(device="cuda", dtype=torch.float32):
    return dispatch.Problem("double", device, dtype, False)


def test_triton_names_its_reasons(monkeypatch):
    def say_capability(*capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")

    reasons = dispatch.triton_reasons
    say_capability(7, 5)
    assert reasons(_triton_problem()) == ("a GPU has compute capability 7.5, the kernels take 8.0 and newer",)
    assert dispatch.backends()["triton"] == reasons(_triton_problem())[0]
    say_capability(12, 0)
    assert reasons(_triton_problem()) == () and dispatch.backends()["triton"] is True
    assert reasons(_triton_problem("cuda:1", torch.bfloat16)) == ()
    assert "dtype is float64" in reasons(_triton_problem(dtype=torch.float64))[0]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert reasons(_triton_problem("cpu")) == ("device is cpu, the kernel takes cuda (cpu under TRITON_INTERPRET=1)",)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert reasons(_triton_problem("cpu")) == ()
    monkeypatch.setattr(dispatch.extension, "find_spec", lambda name: None)
    assert reasons(_triton_problem()) == ("triton is not installed (pip install triton)",)
    assert dispatch.backends()["triton"] == "triton is not installed (pip install triton)"


def test_what_is_automatic_on_one_device_alone():
    only_cuda = Implementation("triton", supports_all, abs, automatic="cuda")
    assert only_cuda.is_automatic_on("cuda") and not only_cuda.is_automatic_on("cpu")
    assert only_cuda.is_automatic_on(str(torch.device("cuda", 1)))  # as a tensor's device prints
    assert Implementation("cpu", supports_all, abs).is_automatic_on("cpu")
    assert not Implementation("torch", supports_all, abs, automatic=False).is_automatic_on("cpu")


def test_a_gpu_that_is_not_the_current_one_is_asked_for_itself():
    """Of every attention op: the tensors' device decides, number and all, and Triton is automatic there."""
    with FakeTensorMode():
        x = torch.zeros(1, 2, 3, 64, device="cuda:1")
        lengths = torch.zeros(1, dtype=torch.int32, device="cuda:1")
        offsets = torch.zeros(2, dtype=torch.int32, device="cuda:1")
        tokens = torch.zeros(3, 2, 64, device="cuda:1")
        problems = (
            transfuse.scaled_dot_product_attention.explain_problem(x, x, x),
            transfuse.varlen_attention.explain_problem(tokens, tokens, tokens, offsets, max_seqlen_q=3),
            transfuse.decode_attention.explain_problem(x, x, x, lengths),
        )
    for op, implementations, problem in problems:
        assert problem.device == "cuda:1", op
        automatic = [i.name for i in implementations if i.is_automatic_on(problem.device)]
        assert automatic == ["cuda", "triton", "cpu", "reference"], op


def test_compile_follows_the_setting():
    compiled = torch.compile(double, fullgraph=True, backend="eager")
    x = torch.ones(3)
    assert torch.equal(compiled(x), 2 * x)
    with transfuse.use_backend("reference"):
        assert torch.equal(compiled(x), 2 * x)
    dispatch._warned.clear()
    with pytest.warns(TransfuseWarning):
        compiled(x.half())


def _python(code, timeout=None, **env):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, **env})


def test_environment_is_checked_and_obeyed():
    run = _python("import transfuse; transfuse.backends()", TRANSFUSE_BACKEND="gpu")
    assert "environment: TRANSFUSE_BACKEND is 'gpu', expected one of auto, cuda, triton, cpu, torch, reference" in run.stderr
    run = _python("from transfuse import dispatch; print(dispatch.setting())", TRANSFUSE_BACKEND="reference")
    assert run.stdout == "reference\n"


def test_strict_forbids_the_fallback(monkeypatch):
    monkeypatch.setenv("TRANSFUSE_STRICT", "1")
    with pytest.raises(RuntimeError, match="double: TRANSFUSE_STRICT=1 and only the reference can run this"):
        _chosen(torch.ones(2, dtype=torch.float16))


def test_import_is_light():
    """No triton, no transformers, no extra thread, and subnormals alive after the import."""
    code = """
import threading, sys, torch
before, torchs_own = threading.active_count(), set(sys.modules)
import transfuse
transfuse.backends()
assert threading.active_count() == before
assert not {"triton", "transformers", "sentence_transformers", "torch._dynamo"} & (set(sys.modules) - torchs_own)
assert float(torch.tensor(2.0 ** -149)) != 0 and not torch.cuda.is_initialized()
print("light")
"""
    run = _python(code)
    assert run.stdout == "light\n", run.stderr


def test_a_forked_child_computes():
    """The OpenMP runtime does not survive fork(): a child of a process that used its threads must not wait for them."""
    run = _python("""
import os, torch, transfuse
torch.set_num_threads(4)
x = torch.randn(512, 512)
def compute():
    q = x.view(2, 4, -1, 32)
    results = (transfuse.gelu(x), transfuse.layer_norm(x, (512,)), transfuse.rms_norm(x, (512,)), transfuse.masked_softmax(x),
               transfuse.scaled_dot_product_attention(q, q, q)[0, 0], transfuse.rotary(x, x[:, :256], x[:, 256:]),
               transfuse.decode_attention(q[:, :, :2], q, q, torch.tensor([900, 1000]))[0, 0])
    return [result[0].tolist() for result in results]  # torch's own parallel loops would hang: take one row
expected = compute()
child = os.fork()
if child == 0:
    os._exit(0 if compute() == expected else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""", timeout=120, OMP_NUM_THREADS="4")
    assert run.stdout == "0\n", run.stderr


@pytest.mark.parametrize(("call", "text"), [
    (lambda x: transfuse.gelu(x), "gelu: could not allocate 2199023255552 bytes"),
    (lambda x: transfuse.layer_norm(x, (8,)), "layer_norm: could not allocate 2199023255552 bytes"),
    (lambda x: transfuse.rms_norm(x, (8,)), "rms_norm: could not allocate 2199023255552 bytes"),
    (lambda x: transfuse.masked_softmax(x), "masked_softmax: could not allocate 2199023255552 bytes"),
    (lambda x: transfuse.scaled_dot_product_attention(x, x[:1], x[:1]), "attention: could not allocate 2199023255552 bytes"),
    (lambda x: transfuse.rotary(x, x[:, :4], x[:, :4]), "rotary: could not allocate 2199023255552 bytes"),
    (lambda x: transfuse.decode_attention(x[None, None], x[None, None, :1], x[None, None, :1], torch.ones(1, dtype=torch.int64)),
     "decode_attention: could not allocate 2199023255552 bytes"),
], ids=["gelu", "layer_norm", "rms_norm", "masked_softmax", "attention", "rotary", "decode_attention"])
def test_an_allocation_that_fails_names_op_and_bytes(call, text):
    with pytest.raises(RuntimeError) as error:
        call(torch.zeros(1, 8).expand(2**36, 8))
    assert str(error.value) == text


@pytest.mark.parametrize(("call", "shape"), [
    (lambda x: transfuse.add_layer_norm(x, x, (8,))[0].square(), (8,)),
    (lambda x: transfuse.layer_norm(x, (8,), x, x).square(), (8,)),
    (lambda x: transfuse.add_rms_norm(x, x, (8,))[0].square(), (8,)),
    (lambda x: transfuse.rms_norm(x, (8,), x).square(), (8,)),
    (lambda x: transfuse.gelu(x, bias=x), (8,)),
    (lambda x: transfuse.masked_softmax(x, x).square(), (4, 8)),
    (lambda x: transfuse.scaled_dot_product_attention(x, x, x, attn_mask=x), (2, 3, 8, 8)),
    (lambda x: transfuse.varlen_attention(x, x, x, torch.tensor([0, 3, 5]), max_seqlen_q=3), (5, 2, 8)),
    (lambda x: transfuse.rotary(torch.cat((x, x), -1), x, x).square(), (5, 4)),
], ids=["add_layer_norm", "layer_norm", "add_rms_norm", "rms_norm", "gelu", "masked_softmax", "attention", "varlen_attention", "rotary"])
def test_compile_takes_one_tensor_twice(call, shape):
    torch._dynamo.reset()  # one lambda serves all ops, and Dynamo compiles a code object at most eight times
    x = torch.randn(*shape, requires_grad=True)
    (expected,) = torch.autograd.grad(call(x).sum(), x)
    (found,) = torch.autograd.grad(torch.compile(lambda x: call(x).sum(), fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(found, expected)


def _calls(x):
    """Every op on one tensor in all its roles."""
    return {
        "gelu": lambda: transfuse.gelu(x),
        "layer_norm": lambda: transfuse.layer_norm(x, (8,)),
        "add_layer_norm": lambda: transfuse.add_layer_norm(x, x, (8,)),
        "rms_norm": lambda: transfuse.rms_norm(x, (8,)),
        "add_rms_norm": lambda: transfuse.add_rms_norm(x, x, (8,)),
        "masked_softmax": lambda: transfuse.masked_softmax(x),
        "attention": lambda: transfuse.scaled_dot_product_attention(x, x, x),
        "varlen_attention": lambda: transfuse.varlen_attention(x, x, x, torch.tensor([0, 2])),
        "rotary": lambda: transfuse.rotary(x, x, x),
        "decode_attention": lambda: transfuse.decode_attention(x, x, x, torch.tensor([1, 1])),
        "pack": lambda: transfuse.pack(x, torch.ones(2, dtype=torch.bool)),
    }


@pytest.mark.parametrize(("make", "kind"), [
    (lambda: torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)]), "nested"),
    (lambda: torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)], layout=torch.jagged), "nested"),
    (lambda: torch.ones(2, 8).to_sparse(), "sparse_coo"),
    (lambda: torch.ones(2, 8).to_sparse_csr(), "sparse_csr"),
], ids=["nested", "jagged", "coo", "csr"])
@pytest.mark.filterwarnings("ignore")
def test_only_dense_tensors(make, kind):
    for op, call in _calls(make()).items():
        with pytest.raises(TypeError, match=rf"^{op}: \w+ is a {kind} tensor, expected a dense one$"):
            call()


@pytest.mark.filterwarnings("ignore::transfuse.TransfuseWarning")
def test_meta_tensors():
    x = torch.empty(2, 8, device="meta")
    for op in ("gelu", "layer_norm", "rms_norm", "masked_softmax", "attention"):
        output = _calls(x)[op]()
        assert output.is_meta and output.shape == x.shape
    tokens, offsets = torch.empty(4, 2, 8, device="meta"), torch.empty(3, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match="max_seqlen_q is None, expected an int where the offsets are on meta"):
        transfuse.varlen_attention(tokens, tokens, tokens, offsets)
    with pytest.raises(RuntimeError, match="pack: attention_mask is on meta, expected a device with values"):
        transfuse.pack(x, torch.empty(2, 8, dtype=torch.bool, device="meta"))


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda x: transfuse.add_layer_norm(x, x, (8,), dropout_p="a"), TypeError, "add_layer_norm: dropout_p is a str, expected float"),
    (lambda x: transfuse.add_layer_norm(x, x, (8,), dropout_p=None), TypeError, "add_layer_norm: dropout_p is a NoneType, expected float"),
    (lambda x: transfuse.scaled_dot_product_attention(x, x, x, dropout_p=torch.zeros(2)), TypeError,
     "attention: dropout_p is a Tensor, expected float"),
    (lambda x: transfuse.masked_softmax(x, is_causal="no"), TypeError, "masked_softmax: is_causal is a str, expected bool"),
    (lambda x: transfuse.masked_softmax(x, scale=1e39), ValueError,
     "masked_softmax: scale is 1e+39, expected a finite float32"),
    (lambda x: transfuse.scaled_dot_product_attention(x, x, x, scale=-1e39), ValueError,
     "attention: scale is -1e+39, expected a finite float32"),
    (lambda x: transfuse.layer_norm(x, (8,), eps=-1.0), ValueError, "layer_norm: eps is -1.0, expected a finite number of at least 0"),
    (lambda x: transfuse.layer_norm(x, (8,), eps=float("nan")), ValueError,
     "layer_norm: eps is nan, expected a finite number of at least 0"),
    (lambda x: transfuse.varlen_attention(x[None], x[None], x[None], torch.tensor([0, 1]), max_seqlen_q=2**63), ValueError,
     "varlen_attention: max_seqlen_q is 9223372036854775808, expected an int64"),
])
def test_refusals_that_all_ops_share(call, error, text):
    with pytest.raises(error) as raised:
        call(torch.randn(2, 8))
    assert str(raised.value) == text


@pytest.mark.parametrize("call", [
    lambda x: transfuse.scaled_dot_product_attention(x, x, x, scale=x.shape[-1] ** -0.5),
    lambda x: transfuse.masked_softmax(x, scale=x.shape[-1] ** -0.5),
], ids=["attention", "masked_softmax"])
def test_a_symbolic_scale_compiles(call):
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (8, 12):
        x = torch.randn(2, 3, size, size)
        assert torch.equal(compiled(x), call(x))


def test_explain_leaves_the_generator_alone():
    x, state = torch.randn(1, 1, 4, 8), torch.get_rng_state()
    assert transfuse.explain(transfuse.scaled_dot_product_attention, x, x, x, dropout_p=0.5).chosen == "cpu"
    assert torch.equal(torch.get_rng_state(), state)
    transfuse.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
    assert not torch.equal(torch.get_rng_state(), state)
