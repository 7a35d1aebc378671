"""CONTRACT section 6 as the kernel sees it: the run of promises/trace.py under strace, compiled code included."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from transfuse.promises import security

TRACED = "network,process,file"
# System calls that change what is outside of the process. clone with CLONE_THREAD is a thread of torch's pool.
FORBIDDEN = {
    "network": r"socket|socketpair|connect|bind|listen|accept4?|send(to|msg|mmsg)?|recv(from|msg|mmsg)?",
    "processes": r"fork|vfork|execve|execveat|kill|tkill|tgkill",
    "files": r"creat|mkdir|mkdirat|mknod|mknodat|rmdir|unlink|unlinkat|rename|renameat2?|link|linkat|symlink|symlinkat|"
    r"truncate|chmod|fchmodat2?|chown|lchown|fchownat|utime|utimes|utimensat|mount|umount2",
}
# Writable without being a file: nothing stays behind.
ALLOWED_TO_OPEN = ("/dev/null", "/dev/tty")


def _offence(line):
    """Which promise a traced call breaks, or None."""
    call = re.match(r"(?:\d+\s+)?(\w+)\((.*)", line)
    if call is None:
        return None
    name, arguments = call.groups()
    if name in ("open", "openat", "openat2"):
        writes = re.search(r"O_(WRONLY|RDWR|CREAT|TRUNC|APPEND|TMPFILE)", arguments)
        return "files" if writes and not any(f'"{path}"' in arguments for path in ALLOWED_TO_OPEN) else None
    if name in ("clone", "clone3"):
        return None if "CLONE_THREAD" in arguments else "processes"
    return next((kind for kind, names in FORBIDDEN.items() if re.fullmatch(names, name)), None)


def test_nothing_leaves_the_process(tmp_path):
    """From before `import transfuse` to after the last op, forward and backward, in every dtype that has a kernel."""
    strace = shutil.which("strace")
    if strace is None:
        message = "strace is missing: apt-get install strace"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    log, report = tmp_path / "strace.txt", tmp_path / "report.json"
    command = [
        strace,
        "-f",
        "-qq",
        "-e",
        f"trace={TRACED}",
        "-o",
        str(log),
        sys.executable,
        "-B",
        str(security.TRACE),
        str(report),
        "cpu",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if "PTRACE" in done.stderr and not report.exists():
        pytest.skip(f"this machine lets nothing be traced: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = log.read_text(errors="replace").splitlines()
    marks = [index for index, line in enumerate(lines) if '"/transfuse phase: ' in line]
    assert len(marks) == 3, "trace.py did not mark its phases"
    watched = lines[marks[0] : marks[-1]]
    assert any("openat(" in line and "transfuse/ops" in line for line in watched), "strace saw no import of ours"
    offences = [line for line in watched if _offence(line)]
    assert not offences, "\n".join(offences[:10])


@pytest.mark.parametrize(("line", "kind"), [
    ('12 socket(AF_INET, SOCK_STREAM, IPPROTO_TCP) = 3', "network"),
    ('12 execve("/bin/true", ["true"], 0x7f) = 0', "processes"),
    ('12 clone(child_stack=NULL, flags=CLONE_CHILD_CLEARTID|SIGCHLD) = 7', "processes"),
    ('12 clone3({flags=CLONE_VM|CLONE_THREAD, exit_signal=0}, 88) = 7', None),
    ('12 openat(AT_FDCWD, "/tmp/x", O_WRONLY|O_CREAT, 0666) = 3', "files"),
    ('12 openat(AT_FDCWD, "/proc/cpuinfo", O_RDONLY|O_CLOEXEC) = 3', None),
    ('12 openat(AT_FDCWD, "/dev/null", O_RDWR) = 3', None),
    ('12 unlink("/tmp/x") = 0', "files"),
    ('12 newfstatat(AT_FDCWD, "/tmp/x", 0x7f, 0) = 0', None),
    ('12 exit(0) = ?', None),
])  # fmt: skip
def test_what_counts_as_leaving(line, kind):
    assert _offence(line) == kind
