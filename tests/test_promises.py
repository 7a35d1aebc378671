"""Every promise of the contract is kept here, each one can be broken, and docs/numerics.md names them all."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import transfuse
from transfuse import dispatch, promises
from transfuse.cli import main, numerics_page
from transfuse.ops import attention, gelu, layer_norm, masked_softmax
from transfuse.promises import masks, trace
from transfuse.promises.cases import OPS, PARITY_CASES, selected

ROOT = Path(__file__).resolve().parent.parent
EVERY = promises.every()


@pytest.fixture(autouse=True)
def _changed_ops_are_measured_anew(request):
    if "monkeypatch" in request.fixturenames:
        promises.forget()
        request.addfinalizer(promises.forget)


def _assert_kept(promise, backend):
    outcome = promises.check(promise, backend)
    assert backend != "cpu" or outcome.status != "no kernel", f"the CPU lost a kernel: {outcome.reason}"
    if outcome.status == "no kernel":
        pytest.skip(f"no kernel: {outcome.reason}")
    assert outcome.status == "ok", f"{outcome.reason or outcome.figure}\n  repeat: {outcome.repeat}"


@pytest.mark.parametrize("promise", [pytest.param(p, id=p.id, marks=pytest.mark.slow if p.slow else ()) for p in EVERY])
def test_kept(promise):
    _assert_kept(promise, "cpu")


@pytest.mark.parametrize(
    "promise", [pytest.param(p, id=p.id) for p in EVERY if p.section == 1 and "compiled" not in p.id]
)
def test_the_reference_keeps_every_mask(promise):
    _assert_kept(promise, "reference")


@pytest.mark.slow
@pytest.mark.parametrize("promise", [pytest.param(p, id=p.id) for p in EVERY if p.section == 1 and "compiled" in p.id])
def test_the_reference_keeps_every_mask_compiled(promise):
    _assert_kept(promise, "reference")


# ---- what is declared ----


def test_ids_are_unique_and_say_section_op_and_dtype():
    assert len({promise.id for promise in EVERY}) == len(EVERY)
    for promise in EVERY:
        section, op, dtype, what = promise.id.split(".", 3)
        assert int(section) == promise.section in promises.SECTIONS and op == promise.op and what
        assert dtype == ("any" if promise.dtype is None else dispatch.dtype_name(promise.dtype))
        assert promise.statement and promise.unit and promise.bound >= 0


def test_every_op_has_promises_in_every_section():
    for op in OPS:
        assert {2, 3, 4, 5} <= {promise.section for promise in EVERY if promise.op == op}, op
    assert {promise.section for promise in EVERY} == set(promises.SECTIONS)


def test_every_rule_of_masks_has_cases():
    rules = [case["rule"] for case in masks.CASES["dense"] + masks.CASES["varlen"]]
    assert set(rules) == set(masks.RULES) and len(rules) >= 40
    assert all(case["rule"] in masks.RULES for case in masks.SOFTMAX_CASES) and len(masks.SOFTMAX_CASES) > 20


# ---- a broken op breaks its promises ----


class Kernel:
    """A stand-in for an op's compiled kernel, made from the real one."""

    def __init__(self, monkeypatch, page):
        self.real = next(i for i in page.IMPLEMENTATIONS if i.name == "cpu")
        self.monkeypatch, self.page = monkeypatch, page

    def replace(self, run):
        mutant = dispatch.Implementation("cpu", self.real.unsupported, lambda *args: run(self.real.run, *args))
        others = tuple(i for i in self.page.IMPLEMENTATIONS if i.name != "cpu")
        self.monkeypatch.setattr(self.page, "IMPLEMENTATIONS", (mutant, *others))
        self.monkeypatch.setattr(dispatch, "_choices", {})


def _flaky(real, input, *rest, calls=[0]):  # noqa: B006  one counter for all calls is the point
    calls[0] += 1
    output = real(input, *rest)
    return output + (calls[0] % 50 == 0)


def _writes_its_input(real, input, *rest):
    output = real(input, *rest)
    with torch.no_grad():
        input.detach().view(-1)[:1].add_(1)
    return output


MUTANTS = {  # promise -> (the op's page, what its kernel does instead)
    "2.gelu.float32.forward-ulp.none": (gelu, lambda real, *args: real(*args) * (1 + 2.0**-20)),
    "2.gelu.bfloat16.forward-misrounded.tanh": (gelu, lambda real, x, bias, tanh: real(x, bias, False)),
    "2.gelu.float32.agrees-backward": (
        gelu,
        lambda real, x, bias, tanh: real(x.detach() + x * 1.001 - x.detach(), bias, tanh),
    ),
    "2.layer_norm.float32.forward-ulp": (layer_norm, lambda real, x, w, b, n, eps: real(x, w, b, n, eps * 1.001)),
    "2.layer_norm.float32.constant": (layer_norm, lambda real, x, w, b, n, eps: real(x, w, b, n, eps) + 1e-7),
    "2.masked_softmax.float32.row-sum": (masked_softmax, lambda real, *args: real(*args) * 1.00001),
    "3.gelu.float32.repeats": (gelu, _flaky),
    "3.gelu.float32.batch": (gelu, lambda real, x, *args: real(x, *args) + (len(x) % 2)),
    "3.gelu.float32.threads": (gelu, lambda real, *args: real(*args) + (torch.get_num_threads() == 5)),
    "3.gelu.float32.position": (gelu, lambda real, x, *args: real(x, *args) + torch.arange(float(len(x)))[:, None]),
    "4.gelu.float32.written": (gelu, _writes_its_input),
    "4.gelu.float32.strides": (gelu, lambda real, x, *args: real(x, *args) + (not x.is_contiguous())),
}


@pytest.mark.parametrize("id", MUTANTS)
def test_a_mutant_breaks_its_promise(id, monkeypatch):
    page, run = MUTANTS[id]
    Kernel(monkeypatch, page).replace(run)
    outcome = promises.check(promises.find(id), "cpu")
    assert outcome.status == "failed" and outcome.figure.worst > outcome.promise.bound and outcome.figure.detail, (
        outcome
    )


def test_a_dropped_mask_breaks_section_1(monkeypatch):
    real = attention._forward
    monkeypatch.setattr(
        attention, "_forward", lambda *args: real(*[None if i == 4 else arg for i, arg in enumerate(args)])
    )
    outcome = promises.check(promises.find("1.attention.float32.rule-1"), "cpu")
    assert outcome.status == "failed" and "boolean mask: output" in outcome.figure.detail


@pytest.mark.parametrize("promise", ["2.attention.float32.rms.normal", "2.attention.float32.agrees-backward"])
def test_a_nan_in_one_gradient_breaks_section_2(monkeypatch, promise):
    real = attention._backward
    monkeypatch.setattr(
        attention, "_backward", lambda *args: (lambda g: (g[0], g[1] * torch.nan, *g[2:]))(real(*args))
    )
    promises.promise.forget()
    outcome = promises.check(promises.find(promise), "cpu")
    promises.promise.forget()
    assert outcome.status == "failed" and outcome.figure.worst == torch.inf


def test_a_check_left_out_breaks_section_5(monkeypatch):
    monkeypatch.setattr(gelu, "_check", lambda *args: None)
    outcome = promises.check(promises.find("5.gelu.any.bad-calls"), "cpu")
    assert outcome.status == "failed" and outcome.figure.worst >= 4


@pytest.mark.parametrize(("event", "arguments", "kind"), [
    ("socket.connect", (), "network"), ("subprocess.Popen", (), "processes"), ("os.fork", (), "processes"),
    ("open", ("x", "w", 0), "files"),
    ("open", ("x", None, 1), "files"), ("open", ("x", "r", 0), None), ("os.mkdir", ("x",), "files"),
    ("pickle.find_class", ("os", "system"), "pickle"), ("import", ("os",), None),
])  # fmt: skip
def test_what_the_watched_interpreter_reports(event, arguments, kind):
    assert trace._kind(event, arguments) == kind


# ---- the command ----


def test_verify_prints_a_failure_with_its_figure_and_how_to_repeat_it(tmp_path, capsys, monkeypatch):
    Kernel(monkeypatch, gelu).replace(lambda real, *args: real(*args) * 1.01)
    rows, junit = tmp_path / "rows.json", tmp_path / "junit.xml"
    id = "2.gelu.float32.agrees-forward"
    assert main(["verify", "--promise", id, "--backend", "cpu", "--json", str(rows), "--junit", str(junit)]) == 1
    printed = capsys.readouterr().out
    assert re.search(
        rf"FAILED {id}: [\d.e+]+ of testing.error_budget, bound 1: \w+: output has relative error 1.0e-02, allowed",
        printed,
    )
    assert f"repeat: transfuse verify --promise {id} --backend cpu --device cpu" in printed
    assert "0 of 1 promises kept, 1 failed, 0 without a kernel" in printed
    document = json.loads(rows.read_text())
    assert document["schema"] == 1 and document["command"] == "verify" and document["failed"] == 1
    assert document["rows"][0]["status"] == "failed" and document["rows"][0]["worst"] > 1
    assert set(document["environment"]) >= {"date", "commit", "machine", "threads", "cpu_isa", "torch", "python"}
    failure = ElementTree.parse(junit).getroot().find("testcase/failure")
    assert failure.text.startswith("transfuse verify --promise") and "bound 1" in failure.attrib["message"]


def test_verify_outlives_an_op_that_raises(capsys, monkeypatch):
    def breaks(real, *args):
        raise RuntimeError("gelu: broken\nmore")

    Kernel(monkeypatch, gelu).replace(breaks)
    assert main(["verify", "--op", "gelu", "--dtype", "float32", "--section", "2", "--backend", "cpu"]) == 1
    assert "FAILED 2.gelu.float32.agrees-forward: RuntimeError: gelu: broken\n" in capsys.readouterr().out


def test_verify_says_what_has_no_kernel(capsys, monkeypatch):
    others = tuple(implementation for implementation in gelu.IMPLEMENTATIONS if implementation.name != "cpu")
    monkeypatch.setattr(gelu, "IMPLEMENTATIONS", others)
    assert main(["verify", "--promise", "2.gelu.float32.agrees-forward", "--backend", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "no kernel for 1 promise: the op has no such backend" in printed and "1 without a kernel" in printed


def test_verify_auto_checks_what_a_call_takes(capsys):
    id = "2.gelu.float32.agrees-forward"
    assert promises.check(promises.find(id), "auto").backend == "cpu"
    assert main(["verify", "--promise", id]) == 0 and "1 of 1 promises kept" in capsys.readouterr().out


def test_verify_on_the_reference_backend(capsys):
    assert main(["verify", "--op", "layer_norm", "--section", "2", "--dtype", "float32", "--backend", "reference"]) == 0
    assert "torch" in capsys.readouterr().out


def test_repeat_names_a_level_that_is_forced(monkeypatch):
    outcome = promises.Outcome(EVERY[0], "cpu", "cpu", "ok", promises.Figure(0), "", 0.0)
    assert outcome.repeat.startswith("transfuse verify --promise")
    monkeypatch.setenv("TRANSFUSE_CPU_ISA", "avx2")
    assert outcome.repeat.startswith("TRANSFUSE_CPU_ISA=avx2 transfuse verify --promise")


# ---- the page ----


def test_the_page_names_every_promise_of_section_2_with_its_bound():
    """The figures are a run's; the promises and bounds must be today's."""
    rows = re.findall(
        r"^\| .* \| ([^|]+) \| [^|]+ \| [^|]+ \| [^|]+ \| [^|]* \| `([^`]+)` \|$",
        (ROOT / "docs/numerics.md").read_text(),
        re.M,
    )
    promised = {
        promise.id: numerics_page.number(promise.bound)
        for promise in EVERY
        if promise.section == 2 and not promise.slow
    }
    assert {id: bound for bound, id in rows} == promised, (
        "run: transfuse verify --backend cpu --section 2 --markdown docs/numerics.md"
    )


def test_the_page_shows_figures_failures_and_what_has_no_kernel():
    good, bad, absent = EVERY[0], EVERY[1], EVERY[2]
    import dataclasses

    outcomes = [
        promises.Outcome(dataclasses.replace(p, section=2), "cpu", "cpu", status, figure, reason, 0.0)
        for p, status, figure, reason in (
            (good, "ok", promises.Figure(0.25, "at x | y", 17.0), ""),
            (bad, "failed", promises.Figure(9.0, "here"), ""),
            (absent, "no kernel", None, "not built"),
        )
    ]
    environment = dict.fromkeys(
        ("machine", "cores", "threads", "cpu_isa", "transfuse", "torch", "python", "platform", "commit", "date"), "?"
    )
    page = numerics_page.render(outcomes, environment)
    assert (
        "| 0.25 | 17 |" in page
        and "at x &#124; y" in page
        and "**9, FAILED**" in page
        and "No kernel: not built." in page
    )


def test_cases_agree_with_torch_where_torch_has_the_op():
    """The peer computes the same thing, or a ratio would compare apples with pears. 16-bit peers round in between."""
    from transfuse.promises.cases import error_budget, relative_error

    for case in PARITY_CASES:
        for dtype in (torch.float32, torch.bfloat16):
            if case.torch is not None:
                inputs = case.inputs(dtype)
                exact = case.reference(*[t.double() if t.is_floating_point() else t for t in inputs])
                assert relative_error(case.torch(*inputs), exact) <= 8 * error_budget(dtype, case.terms), case.name
    assert all(selected(PARITY_CASES, op) for op in OPS) and transfuse.promises.every() is EVERY
