"""What a fresh interpreter does when it imports transfuse and uses every op: `python -B trace.py OUT BACKEND`.

security.py starts it, since a process that has imported torch long ago cannot show what importing does; tests run it
under strace. Python reports what it does through its audit hook, the kernel what this process holds through /proc.
torch is imported before anything is recorded: what torch does is torch's own.
"""

import json
import os
import sys

sys.path.pop(0)  # this folder: its pages are no top-level modules

import torch  # noqa: E402

# Audit events (name or prefix) by what they would mean.
WATCHED = {
    "network": ("socket.", "urllib.", "http.", "ftplib.", "smtplib.", "ssl."),
    "processes": (
        "subprocess.",  # an audit event to look for: nothing is started here
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.spawn",
        "os.fork",
        "pty.",
        "os.startfile",
    ),
    "files": (
        "os.mkdir",
        "os.rename",
        "os.remove",
        "os.rmdir",
        "os.link",
        "os.symlink",
        "os.truncate",
        "os.chmod",
        "os.chown",
        "os.utime",
        "shutil.",
        "tempfile.",
        "sqlite3.",
        "mmap.",
    ),
    "pickle": ("pickle.",),
}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

phase = ""
events = []


def _kind(event, arguments):
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        return "files" if flags & WRITES or set(mode or "") & set("wax+") else None
    return next((kind for kind, names in WATCHED.items() if event.startswith(names)), None)


def _record(event, arguments):
    if phase and (kind := _kind(event, arguments)):
        events.append([phase, kind, f"{event} {arguments!r:.200}"])


def _enter(name):
    """Starts a phase; a look for a file of that name is what strace sees of it."""
    global phase
    phase = name
    os.access(f"/transfuse phase: {name}", os.F_OK)


def _threads():
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1


def _sockets():
    found = []
    for number in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue
        if target.startswith("socket:"):
            found.append(target)
    return found


def _children():
    found = []
    for task in os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else ():
        try:
            with open(f"/proc/self/task/{task}/children") as file:
                found += file.read().split()
        except OSError:
            continue
    return found


def main(out, backend):
    sys.addaudithook(_record)
    before = {"threads": _threads(), "modules": set(sys.modules), "sockets": _sockets()}
    _enter("import")
    import transfuse

    transfuse.backends()
    for name in transfuse.__all__:
        getattr(transfuse, name)
    report = {
        "threads": _threads() - before["threads"],
        "cuda_context": torch.cuda.is_initialized(),
        "modules": sorted(set(sys.modules) - before["modules"]),
        "subnormals": [float(torch.tensor(2.0**-149) * 1.0) != 0.0, 2.0**-1074 * 1.0 != 0.0],
    }
    from transfuse.promises.cases import PARITY_CASES, gradients_of
    from transfuse.promises.promise import DTYPES, reasons_of

    work = []
    with transfuse.use_backend(backend):
        for case in PARITY_CASES:
            for dtype in DTYPES:
                inputs = case.inputs(dtype)
                if not reasons_of(case.explain(*inputs), backend):
                    work.append((case, inputs))
        _enter("use")
        for case, inputs in work:
            case.ours(*inputs)
            if "backward" in case.directions:
                gradients_of(case.ours, inputs, case.grad_output(inputs))()
    _enter("")
    report.update(
        events=events, calls=len(work), children=_children(), sockets=sorted(set(_sockets()) - set(before["sockets"]))
    )
    with open(out, "w") as file:
        json.dump(report, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
