"""`transfuse verify`: every promise of the contract on this machine, each with its bound, our figure and torch's.

What is promised stands in transfuse.promises, one page per section of the contract; nothing is judged here. Promises
that differ in dtype alone share a line, which shows the worst of them; the JSON file has every one.
"""

import re
import time
from pathlib import Path
from xml.etree import ElementTree

import torch

import transfuse
from transfuse import env, promises
from transfuse.bench.harness import write_json
from transfuse.bench.machine import environment
from transfuse.cli import numerics_page
from transfuse.cli.output import Progress, number, table
from transfuse.dispatch import dtype_name
from transfuse.promises.cases import check_op
from transfuse.promises.promise import DTYPES, counted

DTYPE_NAMES = tuple(map(dtype_name, DTYPES))
HEADERS = ("op", "dtype", "promise", "bound", "ours", "torch", "unit", "result")


def add_arguments(parser):
    parser.add_argument("--op", help="only this op")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="only this dtype")
    parser.add_argument(
        "--section", type=int, choices=tuple(promises.SECTIONS), help="only this section of the contract"
    )
    parser.add_argument("--promise", metavar="ID", help="only this promise, as a failure prints it")
    parser.add_argument(
        "--backend", default="auto", choices=env.BACKENDS, help="check this backend; auto: what a call takes"
    )
    parser.add_argument("--device", help="cpu or cuda (default: where the backend's kernels run, else cpu)")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--quick", action="store_true", help="everything that takes seconds (default)")
    depth.add_argument("--full", action="store_true", help="also the slow ones: all 2^32 float32, 1,000 repeats")
    parser.add_argument("--json", metavar="F", help="write one row per promise there")
    parser.add_argument("--junit", metavar="F", help="write JUnit XML there")
    parser.add_argument("--markdown", metavar="F", help="write the figures of section 2 there: docs/numerics.md")
    parser.add_argument("--model", metavar="NAME", help="compare a model's outputs (not implemented yet)")


def check_device(command, device):
    """Raises ValueError, worded, when this machine has no such device."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"{command}: --device is {device!r}, expected cpu, cuda or cuda:<index>")
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"{command}: --device is {device!r}, and torch sees no GPU here")
    if ":" in device and int(device.partition(":")[2]) >= torch.cuda.device_count():
        raise ValueError(f"{command}: --device is {device!r}, and torch sees {torch.cuda.device_count()} GPU(s) here")


def _wanted(arguments):
    """The promises that the arguments select, at least one."""
    if arguments.promise:
        return [promises.find(arguments.promise)]
    if arguments.op != "all":  # what is promised of no op in particular
        check_op("verify", arguments.op)
    dtype = arguments.dtype and getattr(torch, arguments.dtype)
    found = promises.selected(arguments.op, dtype, arguments.section, slow=arguments.full)
    if not found:
        raise ValueError("--op, --dtype and --section select no promise; transfuse verify --full has them all")
    return found


def merged(outcomes):
    """Table rows: outcomes that differ in dtype alone share one, with the worst figures among them.

    What a backend has no kernel for is one row per op and reason.
    """
    lines, refused = {}, {}
    for outcome in outcomes:
        promise = outcome.promise
        if outcome.status == "no kernel":
            refused.setdefault((promise.op, outcome.reason), []).append(outcome)
        else:
            key = (promise.op, promise.statement, promise.bound, promise.unit, outcome.status)
            lines.setdefault(key, []).append(outcome)
    for (op, statement, bound, unit, status), members in lines.items():
        figures = [outcome.figure for outcome in members if outcome.figure]
        peers = [figure.peer_worst for figure in figures if figure.peer_worst is not None]
        worst = max((figure.worst for figure in figures), default=None)
        without = sum(figure.without for figure in figures)
        result = {"ok": "ok", "failed": "FAILED"}[status] + (f", {without} cases without a kernel" if without else "")
        yield (
            op,
            _dtypes(members),
            statement,
            number(bound),
            number(worst),
            number(max(peers, default=None)),
            unit,
            result,
        )
    for (op, reason), members in refused.items():
        yield op, _dtypes(members), f"no kernel for {counted(members, 'promise')}: {reason}", *"----", "no kernel"


def _dtypes(outcomes):
    return ", ".join(dict.fromkeys(dtype_name(o.promise.dtype) for o in outcomes if o.promise.dtype)) or "-"


def _print_sections(outcomes):
    for section, title in promises.SECTIONS.items():
        of_section = [outcome for outcome in outcomes if outcome.promise.section == section]
        if of_section:
            print(f"Section {section}: {title}")
            print(table(HEADERS, list(merged(of_section))), end="\n\n")


def _words(outcome):
    """What is wrong with a failed outcome: the figure against the bound, or what was raised."""
    promise, figure = outcome.promise, outcome.figure
    if figure is None:
        return outcome.reason
    return f"{number(figure.worst)} {promise.unit}, bound {number(promise.bound)}: {figure.detail}"


def _write_junit(path, outcomes, seconds):
    counts = {status: str(sum(o.status == status for o in outcomes)) for status in ("failed", "no kernel")}
    suite = ElementTree.Element(
        "testsuite",
        name="transfuse verify",
        tests=str(len(outcomes)),
        time=f"{seconds:.3f}",
        failures=counts["failed"],
        skipped=counts["no kernel"],
    )
    for outcome in outcomes:
        entry = ElementTree.SubElement(
            suite,
            "testcase",
            classname=f"transfuse.{outcome.promise.op}",
            name=outcome.promise.id,
            time=f"{outcome.seconds:.3f}",
        )
        if outcome.status == "failed":
            ElementTree.SubElement(entry, "failure", message=_words(outcome)).text = outcome.repeat
        elif outcome.status == "no kernel":
            ElementTree.SubElement(entry, "skipped", message=f"no kernel: {outcome.reason}")
    ElementTree.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)


def run(arguments):
    if arguments.model:
        raise NotImplementedError("verify: --model is not implemented yet; from Python: transfuse.verify(model, batch)")
    if arguments.device:
        check_device("verify", arguments.device)
    state = transfuse.backends().get(arguments.backend, True)
    if state is not True:
        raise ValueError(f"verify: --backend is {arguments.backend!r}, which is not available: {state}")
    device = arguments.device or ("cuda" if arguments.backend in env.GPU_BACKENDS else "cpu")
    check_device("verify", device)
    wanted = _wanted(arguments)
    start = time.perf_counter()
    outcomes = []
    with Progress(len(wanted), arguments.quiet) as progress:
        for promise in wanted:
            progress.step(promise.id)
            outcomes.append(promises.check(promise, arguments.backend, device))
    seconds = time.perf_counter() - start
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    without = sum(outcome.status == "no kernel" for outcome in outcomes)

    _print_sections(outcomes)
    for outcome in failed:
        print(f"FAILED {outcome.promise.id}: {_words(outcome)}\n  repeat: {outcome.repeat}\n")
    print(
        f"{len(outcomes) - len(failed) - without} of {len(outcomes)} promises kept, {len(failed)} failed, "
        f"{without} without a kernel, in {seconds:.1f} s."
    )
    if arguments.json:
        rows = [outcome.row() for outcome in outcomes]
        write_json(arguments.json, rows, command="verify", environment=environment(), failed=len(failed))
    if arguments.markdown:
        Path(arguments.markdown).write_text(numerics_page.render(outcomes, environment()))
    if arguments.junit:
        _write_junit(arguments.junit, outcomes, seconds)
    return 1 if failed else 0
