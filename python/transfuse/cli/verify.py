"""`transfuse verify`: every op against its float64 reference on this machine, with the figures.

An error is the largest difference of any element of any result, over that result's largest magnitude; what is allowed
stands in transfuse.testing.error_budget. Gradients of every input are compared as well.
"""

import re
import time
from xml.etree import ElementTree

import torch

import transfuse
from transfuse import env
from transfuse.bench.cases import DTYPES, PARITY_CASES, check_op, selected
from transfuse.bench.harness import write_json
from transfuse.bench.machine import environment
from transfuse.bench.parity import verify_case
from transfuse.cli.output import Progress, table
from transfuse.dispatch import dtype_name

DTYPE_NAMES = tuple(map(dtype_name, DTYPES))


def add_arguments(parser):
    parser.add_argument("--op", help="only this op")
    parser.add_argument("--case", help="only the case of this name")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="only this dtype")
    parser.add_argument(
        "--backend", default="auto", choices=env.BACKENDS, help="run this backend or fail; auto: what a call takes"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--quick", action="store_true", help="the parity cases (default)")
    depth.add_argument(
        "--full", action="store_true", help="adds exhaustive sweeps, fuzzing and mutants (not implemented yet)"
    )
    parser.add_argument("--json", metavar="F", help="write the rows there")
    parser.add_argument("--junit", metavar="F", help="write JUnit XML there")
    parser.add_argument("--model", metavar="NAME", help="compare a model's outputs (not implemented yet)")


def check_device(command, device):
    """Raises ValueError, worded, when this machine has no such device."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"{command}: --device is {device!r}, expected cpu, cuda or cuda:<index>")
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"{command}: --device is {device!r}, and torch sees no GPU here")
    if ":" in device and int(device.partition(":")[2]) >= torch.cuda.device_count():
        raise ValueError(f"{command}: --device is {device!r}, and torch sees {torch.cuda.device_count()} GPU(s) here")


def _summary(rows):
    """One line per op, dtype and direction: the case that comes nearest to its limit."""
    groups = {}
    for row in rows:
        groups.setdefault((row["op"], row["dtype"], row["direction"]), []).append(row)
    for (op, dtype, direction), members in groups.items():
        measured = [row for row in members if row["error"] is not None]
        worst = max(measured, key=lambda row: row["error"] / row["allowed"], default=None)
        bad = sum(row["status"] != "ok" for row in members)
        yield (
            op,
            dtype,
            direction,
            "/".join(sorted({row["backend"] for row in members})),
            len(members),
            f"{worst['error']:.1e}" if worst else "-",
            f"{worst['allowed']:.1e}" if worst else "-",
            f"{worst['case']}: {worst['worst']}" if worst else "-",
            f"{bad} FAILED" if bad else "ok",
        )


def _write_junit(path, rows, seconds):
    suite = ElementTree.Element(
        "testsuite",
        name="transfuse verify",
        tests=str(len(rows)),
        time=f"{seconds:.3f}",
        failures=str(sum(row["status"] == "failed" for row in rows)),
        errors=str(sum(row["status"] == "error" for row in rows)),
    )
    for row in rows:
        entry = ElementTree.SubElement(
            suite,
            "testcase",
            classname=f"transfuse.{row['op']}",
            name=f"{row['case']}-{row['dtype']}-{row['direction']}-{row['backend']}",
        )
        if row["status"] != "ok":
            message = row["reason"] or f"{row['worst']} has error {row['error']:.3e}, allowed {row['allowed']:.3e}"
            ElementTree.SubElement(
                entry, {"failed": "failure", "error": "error"}[row["status"]], message=message
            ).text = row["repeat"]
    ElementTree.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)


def run(arguments):
    if arguments.model:
        raise NotImplementedError("verify: --model is not implemented yet; from Python: transfuse.verify(model, batch)")
    if arguments.full:
        raise NotImplementedError(
            "verify: --full is not implemented yet; it will add exhaustive sweeps, fuzzing and mutants"
        )
    check_op("verify", arguments.op)
    check_device("verify", arguments.device)
    state = transfuse.backends().get(arguments.backend, True)
    if state is not True:
        raise ValueError(f"verify: --backend is {arguments.backend!r}, which is not available: {state}")
    cases = selected(PARITY_CASES, arguments.op)
    if arguments.case:
        names = sorted({case.name for case in cases})
        cases = [case for case in cases if case.name == arguments.case]
        if not cases:
            raise ValueError(f"verify: --case is {arguments.case!r}, expected one of {', '.join(names)}")
    dtypes = [getattr(torch, arguments.dtype)] if arguments.dtype else DTYPES

    start = time.perf_counter()
    work = [(case, dtype, direction) for case in cases for dtype in dtypes for direction in case.directions]
    rows = []
    with Progress(len(work), arguments.quiet) as progress:
        for case, dtype, direction in work:
            progress.step(f"{case.op} {case.name} {direction}")
            rows.append(verify_case(case, dtype, direction, arguments.backend, arguments.device))
    seconds = time.perf_counter() - start
    bad = [row for row in rows if row["status"] != "ok"]

    print(
        table(
            ["op", "dtype", "direction", "backend", "cases", "error", "allowed", "nearest to its limit", "result"],
            list(_summary(rows)),
        )
    )
    for row in bad:
        figures = row["reason"] or f"{row['worst']} has relative error {row['error']:.3e}, allowed {row['allowed']:.3e}"
        print(
            f"\nFAILED {row['op']} {row['case']} {row['dtype']} {row['direction']}: {figures}\n"
            f"  repeat: {row['repeat']}"
        )
    print(f"\n{len(rows) - len(bad)} of {len(rows)} comparisons with the float64 reference hold, in {seconds:.1f} s.")
    if arguments.json:
        write_json(arguments.json, rows, command="verify", environment=environment(), failed=len(bad))
    if arguments.junit:
        _write_junit(arguments.junit, rows, seconds)
    return 1 if bad else 0
