"""The parent's end of a contender's process: asks, waits, and turns every kind of ending into a reason."""

import json
import os
import selectors
import subprocess
import time
from pathlib import Path

from transfuse.bench.turns import ContenderLost

ROOT = Path(__file__).resolve().parent.parent.parent
ANSWER_SECONDS = 240  # no command takes longer on a machine on which it is worth waiting for


class Worker:
    """One process with one contender in it.

    Args:
        python: the interpreter.
        threads: for OpenMP, before any library is loaded.
        log: file for what it prints; its last line explains a crash.
        command: another command line, for tests.
    """

    def __init__(self, python, threads, log, command=None):
        self.log = Path(log)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT / "bench")]),
            "OMP_NUM_THREADS": str(threads),
            # Intel's OpenMP spins for 200 ms after its work by default, into the next contender's turn; GNU's for
            # about 10 ms, which the pause before each turn covers (SETTLE_SECONDS in bench_models.py).
            "KMP_BLOCKTIME": "1",
            "HF_HUB_OFFLINE": "1",
        }
        with self.log.open("wb") as stderr:
            self.process = subprocess.Popen(
                command or [str(python), "-m", "peers.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
                bufsize=0,  # nothing is left unsent in a pipe whose reader is gone
            )
        self.buffer = b""

    def send(self, **message):
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
        except OSError:
            raise ContenderLost(self._ending()) from None

    def answer(self, seconds=ANSWER_SECONDS):
        """The answer to the oldest message sent. Raises ContenderLost for an error, a crash or silence."""
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.buffer:
                if not selector.select(max(0, deadline - time.monotonic())):
                    self.stop()
                    raise ContenderLost(f"gave no answer in {seconds:.0f} s")
                chunk = os.read(self.process.stdout.fileno(), 65536)
                if not chunk:
                    raise ContenderLost(self._ending())
                self.buffer += chunk
        line, _, self.buffer = self.buffer.partition(b"\n")
        found = json.loads(line)
        if "error" in found:
            raise ContenderLost(found["error"])
        return found

    def ask(self, seconds=ANSWER_SECONDS, **message):
        self.send(**message)
        return self.answer(seconds)

    def _ending(self):
        code = self.process.wait(10)
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"crashed with exit code {code}" + (f": {lines[-1][:200]}" if lines else "")

    def stop(self):
        """Ends the process, whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
