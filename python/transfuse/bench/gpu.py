"""`make gpu OUT=dir`: what this NVIDIA GPU does today, before and beside transfuse's own kernels.

    PYTHONPATH=python python3 -m transfuse.bench.gpu --out dir

Runs with any python3 that holds torch; builds nothing, downloads nothing, needs no compiled transfuse._C. Checks what
the machine has and the parity of every GPU backend of transfuse that exists, then measures the peers (gpu_peers.py).
Rows go to dir/gpu.json after every section; a short table comes last. Under 9 minutes, by deadlines.

Exit codes: 0 done, 1 a backend of ours missed parity, 2 there is no GPU here.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

import transfuse
from transfuse.bench import gpu_peers, gpu_rows, parity
from transfuse.bench.cases import DIRECTIONS, DTYPES, PARITY_CASES

BUDGET_SECONDS = 490
GPU_BACKENDS = ("cuda", "triton")
# (section, most seconds): what a section leaves over, the later ones may use, up to their own figure.
SECTIONS = (
    ("ceilings", 30),
    ("sdpa", 110),
    ("sdpa_bias", 90),
    ("varlen", 15),
    ("row_kernels", 120),
    ("flex", 140),
    ("models", 30),
)


def check_backends(run):
    """Parity of our own GPU backends; a backend that is not there is a row with its reason."""
    available = transfuse.backends()
    for backend in GPU_BACKENDS:
        if available[backend] is not True:
            run.add(op="all", peer=f"transfuse {backend}", status="skipped", reason=available[backend])
            continue
        for case in PARITY_CASES:
            for dtype in DTYPES:
                for direction in case.directions:
                    found = parity.verify_case(case, dtype, direction, backend, run.device)
                    status = {"ok": "ok", "failed": "failed", "error": "error"}[found["status"]]
                    reason = found["reason"] or (
                        f"{found['worst']}: error {found['error']:.3e}, allowed {found['allowed']:.3e}"
                        if status != "ok"
                        else ""
                    )
                    run.add(
                        op=case.op,
                        peer=f"transfuse {backend}",
                        variant=case.name,
                        shape={"sizes": case.shape},
                        direction=direction,
                        dtype=found["dtype"],
                        status=status,
                        rms_error=found["error"],
                        reason=reason,
                    )


def table(rows):
    """One line per kind of work, sizes side by side, forward/backward; then what was not measured, each reason once."""
    groups, refusals = {}, {}
    for row in rows:
        shape = row["shape"]
        if row["status"] == "ok" and row["median_us"]:
            unit = "TFLOP/s" if row["tflops"] else "GB/s" if row["gbps"] else "us"
            figure = row["tflops"] or row["gbps"] or row["median_us"]
            words = (row["op"], f"d{shape['head_dim']}" if "head_dim" in shape else "", row["variant"])
            what = " ".join(word for word in words if word) + f" | {row['peer']}"
            size = shape.get("seqlen") or shape.get("columns") or shape.get("longest") or 0
            groups.setdefault((what, unit), {}).setdefault(size, {})[row["direction"]] = f"{figure:.0f}"
        elif row["status"] != "ok":
            refusals.setdefault((row["op"], row["peer"], row["status"], row["reason"][:110]), []).append(row)
    lines = []
    for (what, unit), sizes in groups.items():
        figures = [
            (f"{size}: " if size else "") + "/".join(found.get(direction, "-") for direction in DIRECTIONS)
            for size, found in sorted(sizes.items())
        ]
        lines.append(f"{what}  {'  '.join(figures)}  {unit}")
    for (op, peer, status, reason), members in refusals.items():
        lines.append(f"{op} | {peer}: {status} in {len(members)} rows: {reason}")
    return "size: forward/backward\n" + "\n".join(lines)


def run_all(run):
    """Every section in order; returns the exit code."""
    print(json.dumps({"torch": torch.__version__, **run.facts}), flush=True)
    print(
        "backends: "
        + ", ".join(f"{name}: {'yes' if state is True else state}" for name, state in transfuse.backends().items())
    )
    with run.within("parity", 60):
        check_backends(run)
    for section, seconds in SECTIONS:
        with run.within(section, seconds):
            getattr(gpu_peers, section)(run)
            if not run.dry:
                torch.cuda.empty_cache()
    run.close()
    print(table(run.rows))
    bad = [row for row in run.rows if row["section"] == "parity" and row["status"] in ("failed", "error")]
    print(f"\n{len(run.rows)} rows in {run.out / 'gpu.json'}; parity failures of transfuse: {len(bad)}")
    return 1 if bad else 0


def main(argv=None):
    """Parses the options, refuses a machine with no GPU with exit code 2, runs the sections."""
    parser = argparse.ArgumentParser(
        prog="make gpu", description="Measures this GPU's peers of transfuse; JSON rows and a short table."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json")
    parser.add_argument(
        "--budget", type=float, default=BUDGET_SECONDS, help=f"seconds for everything (default {BUDGET_SECONDS})"
    )
    parser.add_argument("--commit", help="the commit to write into the rows, where the checkout has no .git")
    parser.add_argument(
        "--dry-run", action="store_true", help="walk every case with tiny shapes on the CPU, to test this script"
    )
    options = parser.parse_args(argv)
    if not options.dry_run and not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no GPU"
        print(f"make gpu: needs an NVIDIA GPU, and {reason} (torch {torch.__version__})", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    return run_all(gpu_rows.Run(options.out, options.budget, options.dry_run, options.commit))


if __name__ == "__main__":
    sys.exit(main())
