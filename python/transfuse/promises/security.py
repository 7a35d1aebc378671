"""CONTRACT section 6: what importing transfuse and using every op does to a machine, watched in a fresh interpreter.

That interpreter, and the forked child of determinism.py, are the only processes that this package ever starts, and only
when these promises are checked (trace.py says what is watched). The same run under strace, which sees what compiled code does, is tests/test_security.py.
"""

import json
import os
import sys
import tempfile
from functools import cache, partial
from pathlib import Path

from transfuse import env
from transfuse.promises.promise import Figure, Promise

TRACE = Path(__file__).with_name("trace.py")
# Modules that importing must not add to torch's own.
HEAVY = {
    "triton",
    "transformers",
    "sentence_transformers",
    "torch._dynamo",
    "torch._inductor",
    "subprocess",  # a name that must not appear in sys.modules: nothing here imports it
    "socket",
    "ssl",
    "urllib.request",
    "http.client",
    "pickle",
    "multiprocessing",
}


@cache
def _report(backend):
    """What trace.py saw, of one run per backend."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "report.json")
        status = os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-B", str(TRACE), str(out), backend])
        if status != 0:
            raise RuntimeError(f"the interpreter that was to be watched ended with {status}")
        return json.loads(out.read_text())


def _events(kind, backend, device):
    report = _report(backend)
    seen = [f"at {phase}: {words}" for phase, of_kind, words in report["events"] if of_kind == kind]
    seen += {"network": report["sockets"], "processes": report["children"]}.get(kind, [])
    return Figure(len(seen), "; ".join(seen[:2]) or f"of {report['calls']} calls")


def _threads(backend, device):
    return Figure(_report(backend)["threads"])


def _cuda_context(backend, device):
    return Figure(int(_report(backend)["cuda_context"]))


def _modules(backend, device):
    heavy = HEAVY & set(_report(backend)["modules"])
    return Figure(len(heavy), ", ".join(sorted(heavy)))


def _subnormals(backend, device):
    return Figure(_report(backend)["subnormals"].count(False), "of torch's float32 and Python's float")


def _variables(backend, device):
    """A flag or a choice cannot name a file, a library or code."""
    wrong = [variable.name for variable in env.VARIABLES if variable.kind not in ("flag", "choice")]
    return Figure(len(wrong), ", ".join(wrong) or f"of {len(env.VARIABLES)}")


ROWS = (
    ("network", "importing and using every op opens no connection", "events", partial(_events, "network")),
    ("processes", "importing and using every op starts no process", "events", partial(_events, "processes")),
    ("files", "importing and using every op writes no file", "events", partial(_events, "files")),
    ("pickle", "importing and using every op unpickles nothing", "events", partial(_events, "pickle")),
    ("threads", "importing starts no thread", "threads", _threads),
    ("cuda-context", "importing opens no CUDA context", "contexts", _cuda_context),
    ("modules", "importing adds no module that compiles, reaches the network or starts processes", "modules", _modules),
    ("subnormals", "importing leaves subnormal numbers alive", "kinds lost", _subnormals),
    ("variables", "no environment variable names code: each is a flag or a choice", "variables", _variables),
)

PROMISES = tuple(
    Promise(f"6.all.any.{what}", 6, "all", None, statement, 0, unit, measure) for what, statement, unit, measure in ROWS
)
