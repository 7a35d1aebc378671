"""The frame of `make gpu`: a time budget with deadlines, rows that are checked, and a timer for a GPU's queue."""

import datetime
import math
import os
import signal
import statistics
import threading
import time
import warnings
from contextlib import contextmanager

import torch

from transfuse.bench.harness import write_json
from transfuse.bench.machine import git_commit, gpu_facts

# Rows that a reader can rely on: key -> type; None stands for "not measured" where the type allows it.
ROW = {
    "section": str,
    "op": str,
    "peer": str,
    "variant": str,
    "shape": dict,
    "dtype": str,
    "direction": str,
    "status": str,
    "median_us": (float, type(None)),
    "p10_us": (float, type(None)),
    "p90_us": (float, type(None)),
    "repetitions": int,
    "tflops": (float, type(None)),
    "gbps": (float, type(None)),
    "rms_error": (float, type(None)),
    "reason": str,
    "device": str,
    "date": str,
    "commit": str,
}
STATUSES = ("ok", "failed", "refused", "error", "skipped")
FLUSH_BYTES = 1 << 30  # written before each timed call: empties L2, and its 0.3 ms hide the launch of what follows
MEASURE_SECONDS = 0.12  # timed work per figure
HOST_ROUNDS, HOST_CALLS = 21, 100  # of small calls, timed with their host overhead
LARGEST_ERROR = 0.05  # relative rms error in 16 bits: ten times what rounding makes; a wrong result has no speed
ONE_FIGURE_SECONDS = 60  # a compile that takes longer than this is given up
WATCHDOG_SECONDS = 25  # after the budget, when something does not come back at all


class GaveUp(Exception):
    """A figure or its section ran out of time."""


def check_row(row):
    """Raises ValueError naming the first key of a row that is missing, unknown or of another type."""
    for key, kind in ROW.items():
        if key not in row:
            raise ValueError(f"gpu: row {row.get('op')} {row.get('peer')} lacks {key!r}")
        if not isinstance(row[key], kind):
            raise ValueError(f"gpu: row {row['op']} {row['peer']} has {key} {row[key]!r}, expected {kind}")
    if row["status"] not in STATUSES:
        raise ValueError(
            f"gpu: row {row['op']} {row['peer']} has status {row['status']!r}, expected one of {', '.join(STATUSES)}"
        )
    if row["status"] == "ok" and row["section"] != "parity" and not row["median_us"]:
        raise ValueError(f"gpu: row {row['op']} {row['peer']} is ok and has no median_us")
    if row["status"] != "ok" and not row["reason"]:
        raise ValueError(f"gpu: row {row['op']} {row['peer']} is {row['status']} without a reason")
    unknown = set(row) - set(ROW)
    if unknown:
        raise ValueError(f"gpu: row {row['op']} {row['peer']} has unknown keys {sorted(unknown)}")


class Run:
    """The rows of one run, its clock and its device. `dry` runs everything tiny on the CPU, to test the script."""

    def __init__(self, out, budget_s, dry=False, commit=None):
        self.out, self.dry, self.rows = out, dry, []
        self.device = "cpu" if dry else "cuda"
        self.facts = gpu_facts()
        self.name = "dry run on the CPU" if dry else torch.cuda.get_device_name()
        self.end = time.monotonic() + budget_s
        self.section, self.section_end = "", self.end
        self.date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
        self.commit = commit or git_commit()
        self.flush = None if dry else torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        watchdog = threading.Timer(budget_s + WATCHDOG_SECONDS, self._give_up_whole_run)
        watchdog.daemon = True
        watchdog.start()
        self._watchdog = watchdog

    def _give_up_whole_run(self):
        self.save()
        print("gpu: over the budget and a call does not come back; the rows so far are saved", flush=True)
        os._exit(1)

    def save(self):
        write_json(self.out / "gpu.json", list(self.rows), command="make gpu", facts=self.facts, dry_run=self.dry)

    def close(self):
        self._watchdog.cancel()
        self.save()

    @contextmanager
    def within(self, section, seconds, of=0):
        """Runs a section that must end by its own deadline; its rows are on disk when it ends, however it ends.

        Args:
            of: what this section and all later ones ask for together; where that is not left, each gets its share.
        """
        start = time.monotonic()
        if of > max(0.0, self.end - start):
            seconds *= max(0.0, self.end - start) / of
        self.section, self.section_end = section, min(self.end, start + seconds)
        print(f"-- {section} (at most {max(0.0, self.section_end - start):.0f} s)", flush=True)
        try:
            yield
        except Exception as error:  # a section that breaks must not take the others with it
            self.add(op=section, peer="-", status="error", reason=_one_line(error))
        self.save()
        print(
            f"   {time.monotonic() - start:.1f} s, {sum(row['section'] == section for row in self.rows)} rows",
            flush=True,
        )

    @contextmanager
    def guarded(self, **facts):
        """What goes wrong while a case is set up becomes its row, and the next case goes on."""
        try:
            yield
        except Exception as error:
            self.add(**facts, **self._refusal(error, ()))

    def add(self, **facts):
        row = {
            "section": self.section,
            "variant": "",
            "shape": {},
            "dtype": "bfloat16",
            "direction": "",
            "status": "ok",
            "median_us": None,
            "p10_us": None,
            "p90_us": None,
            "repetitions": 0,
            "tflops": None,
            "gbps": None,
            "rms_error": None,
            "reason": "",
            "device": self.name,
            "date": self.date,
            "commit": self.commit,
            **facts,
        }
        check_row(row)
        self.rows.append(row)
        return row

    def measure(self, prepare, *, flops=None, moved=None, timer=None, **facts):
        """One row. `prepare()` returns the call to be timed (and may compile, allocate, or refuse); errors become rows.

        Args:
            prepare: () -> call, or () -> (call, rms_error).
            timer: self.time (default) or self.time_with_host.
            flops, moved: of one call, for tflops and gbps (bytes read plus bytes written).
        """
        if time.monotonic() > self.section_end:
            return self.add(**facts, status="skipped", reason="the section's time was used up")
        limit = min(ONE_FIGURE_SECONDS, self.end - time.monotonic())
        call = rms_error = None
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                with alarm(limit):
                    call = prepare()
                    call, rms_error = call if isinstance(call, tuple) else (call, None)
                    if rms_error is not None and not rms_error <= LARGEST_ERROR:
                        reason = f"relative rms error {rms_error:.1e}, allowed {LARGEST_ERROR}"
                        return self.add(**facts, rms_error=rms_error, status="failed", reason=reason)
                    figures = (timer or self.time)(call)
            except Exception as error:
                del call
                return self.add(**facts, **self._refusal(error, said))
        seconds = figures["median_us"] / 1e6
        return self.add(
            **facts,
            **figures,
            rms_error=rms_error,
            tflops=flops / seconds / 1e12 if flops else None,
            gbps=moved / seconds / 1e9 if moved else None,
        )

    def _refusal(self, error, said):
        if not self.dry:
            torch.cuda.empty_cache()
        if isinstance(error, GaveUp):
            return {"status": "skipped", "reason": _one_line(error)}
        if "No available kernel" in str(error) or "No viable backend" in str(error):
            # torch gives the reasons as warnings, one per backend that it passed over.
            reasons = [_one_line(warning.message) for warning in said]
            reasons = [text for text in dict.fromkeys(reasons) if not text.endswith(("because:", "runtime disabled."))]
            return {"status": "refused", "reason": "; ".join(reasons) or _one_line(error)}
        return {"status": "error", "reason": _one_line(error)}

    def time(self, call):
        """Median, 10th and 90th percentile in microseconds; L2 is emptied before every repetition."""
        if self.dry:
            start = time.perf_counter()
            call()
            elapsed = max((time.perf_counter() - start) * 1e6, 1e-3)
            return {"median_us": elapsed, "p10_us": elapsed, "p90_us": elapsed, "repetitions": 1}
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        count = max(7, min(100, math.ceil(MEASURE_SECONDS / (time.perf_counter() - start))))
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for before, after in events:
            self.flush.zero_()
            before.record()
            call()
            after.record()
        torch.cuda.synchronize()
        times = sorted(before.elapsed_time(after) * 1e3 for before, after in events)
        return {
            "median_us": statistics.median(times),
            "p10_us": times[count // 10],
            "p90_us": times[-1 - count // 10],
            "repetitions": count,
        }

    def time_with_host(self, call):
        """The same of what a user waits for: calls one after another on the wall clock, Python and launch included."""
        if self.dry:
            return self.time(call)
        for _ in range(HOST_CALLS):
            call()
        times = []
        for _ in range(HOST_ROUNDS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(HOST_CALLS):
                call()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start) * 1e6 / HOST_CALLS)
        times.sort()
        return {
            "median_us": statistics.median(times),
            "p10_us": times[HOST_ROUNDS // 10],
            "p90_us": times[-1 - HOST_ROUNDS // 10],
            "repetitions": HOST_ROUNDS * HOST_CALLS,
        }


@contextmanager
def alarm(seconds):
    """Raises GaveUp when the body takes longer; does nothing outside the main thread, where no alarm can be."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_):
        raise GaveUp(f"gave up after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _one_line(error):
    text = " ".join(str(error).split())
    text = text.split(" (Triggered internally")[0]
    return (
        f"{type(error).__name__}: " if isinstance(error, Exception) and not isinstance(error, (Warning, GaveUp)) else ""
    ) + text[:300]
