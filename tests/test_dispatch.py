"""Dispatch: the ordered list, the override, fallbacks that are seen, and explain()."""

import os
import subprocess
import sys
import threading
from dataclasses import dataclass

import pytest
import torch

import transfuse
from transfuse import dispatch
from transfuse.dispatch import Implementation, Problem, TransfuseWarning, cpu_reasons, select, supports_all


@dataclass(frozen=True)
class DoubleProblem(Problem):
    """The problem of a toy op, y = 2x."""

    length: int


IMPLEMENTATIONS = (
    Implementation("cpu", cpu_reasons, lambda x: x + x),
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


def test_compile_follows_the_setting():
    compiled = torch.compile(double, fullgraph=True, backend="eager")
    x = torch.ones(3)
    assert torch.equal(compiled(x), 2 * x)
    with transfuse.use_backend("reference"):
        assert torch.equal(compiled(x), 2 * x)
    dispatch._warned.clear()
    with pytest.warns(TransfuseWarning):
        compiled(x.half())


def _python(code, **env):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env})


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
assert not {"triton", "transformers", "sentence_transformers"} & (set(sys.modules) - torchs_own)
assert float(torch.tensor(2.0 ** -149)) != 0 and not torch.cuda.is_initialized()
print("light")
"""
    run = _python(code)
    assert run.stdout == "light\n", run.stderr
