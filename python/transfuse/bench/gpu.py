"""`make gpu OUT=dir`: what this NVIDIA GPU does today, before and beside transfuse's own kernels.

    PYTHONPATH=python python3 -m transfuse.bench.gpu --out dir

Runs with any python3 that holds torch; builds nothing, downloads nothing, needs no compiled transfuse._C. Checks what
the machine has and the parity of every GPU backend of transfuse that exists, then measures the peers (gpu_peers.py).
Rows go to dir/gpu.json after every section; a short table comes last. Under 9 minutes, by deadlines.

Exit codes: 0 done, 1 a backend of ours missed parity or was wrong where it was timed, 2 there is no GPU here.
"""

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import transfuse
from transfuse import dispatch, env
from transfuse.bench import gpu_peers, gpu_rows
from transfuse.dispatch import dtype_name, use_backend
from transfuse.promises import agreement, check, every
from transfuse.promises.cases import DIRECTIONS

BUDGET_SECONDS = 490
# (section, most seconds). Together more than there are: where time gets short each section gets its share of what is
# left, so that none is cut whole; what one leaves over, the later ones may use, up to their own figure.
SECTIONS = (
    ("ceilings", 30),
    ("sdpa", 100),
    ("sdpa_bias", 90),
    ("varlen", 40),
    ("own_attention", 130),
    ("decode", 40),
    ("row_kernels", 150),
    ("small_rows", 20),
    ("flex", 140),
    ("models", 30),
)


# Ops that kernels/cuda and kernels/triton have: their promises on numerics, determinism and layout are checked too, with
# the hard families.
ROW_OPS = ("layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm", "gelu", "masked_softmax", "rotary")
HARD_SECTIONS = (2, 3, 4)
PAST_INT32 = (1 << 32) + 8  # elements: beyond every 32-bit offset


# A backend that has no kernel of an op says so in a row of its own.
ATTENTION_OPS = ("attention", "varlen_attention", "decode_attention")
# Numerics and invariance before masks and layout: Triton compiles a kernel for each set of features, and time ends.
ATTENTION_SECTIONS = (2, 3, 1, 4)


def promises_of_gpus(backend):
    """What our backends are held to: agreement with the float64 reference, every promise of the row ops, then every
    promise of attention."""
    found = list(agreement.PROMISES)
    hard = [promise for promise in every() if promise.op in ROW_OPS and promise.section in HARD_SECTIONS]
    for section in ATTENTION_SECTIONS:
        hard += [promise for promise in every() if promise.op in ATTENTION_OPS and promise.section == section]
    if backend == "triton":
        hard = [promise for promise in hard if not promise.id.endswith(".compiled")]
    return found + [promise for promise in hard if not promise.slow and promise not in found]


def check_backends(run):
    """Our own GPU backends against the contract; a backend that is not there is a row with its reason."""
    available = transfuse.backends()
    for backend in env.GPU_BACKENDS:
        if available[backend] is not True:
            run.add(op="all", peer=f"transfuse {backend}", status="skipped", reason=available[backend])
            continue
        for promise in promises_of_gpus(backend):
            if time.monotonic() > run.section_end:
                reason = "the section's time was used up"
                run.add(op=promise.op, peer=f"transfuse {backend}", variant=promise.id, status="skipped", reason=reason)
                continue
            outcome = check(promise, backend, run.device)
            run.add(
                op=promise.op,
                peer=f"transfuse {backend}",
                variant=promise.id,
                shape={"sizes": promise.statement},
                direction=promise.id.rpartition("-")[2],
                dtype=dtype_name(promise.dtype),
                status={"no kernel": "skipped"}.get(outcome.status, outcome.status),
                rms_error=outcome.figure and outcome.figure.worst,
                reason=outcome.reason or (outcome.figure.detail if outcome.status == "failed" else ""),
            )
    for backend in env.GPU_BACKENDS:
        if available[backend] is not True:
            continue
        for op in CALLS:
            check_past_int32(run, op, backend)
        for op in CALLS_ANYWHERE:
            check_circumstances(run, op, backend)


# Ops on [rows, columns] that take every row alone.
CALLS = {
    "gelu": transfuse.gelu,
    "layer_norm": lambda x: transfuse.layer_norm(x, x.shape[-1:]),
    "masked_softmax": transfuse.masked_softmax,
}


def _heads(x):
    """[rows, columns] as [1, H, L, 64], the layout of a projection."""
    return x.view(1, x.shape[0], -1, 64).transpose(1, 2)


def _attention(x):
    return transfuse.scaled_dot_product_attention(_heads(x), _heads(x), _heads(x), is_causal=True)


def _varlen_attention(x):
    tokens, length = x.view(x.shape[0], -1, 64), x.shape[0] // 2
    offsets = torch.arange(0, 2 * length + 1, length, dtype=torch.int32, device=x.device)  # by a kernel, not a copy
    return transfuse.varlen_attention(tokens, tokens, tokens, offsets, max_seqlen_q=length)


def _decode_attention(x):
    lengths = torch.full((1,), x.shape[0] - 1, dtype=torch.int32, device=x.device)
    return transfuse.decode_attention(_heads(x)[:, :, :2], _heads(x), _heads(x), lengths)


# Those that have no rows of their own too: however they are called, they have the same bits.
CALLS_ANYWHERE = CALLS | {
    "attention": _attention,
    "varlen_attention": _varlen_attention,
    "decode_attention": _decode_attention,
}


def check_past_int32(run, op, backend):
    """An op on more than 2^32 elements: its last rows have the bits that they have alone."""
    columns, call = 1024, CALLS[op]
    rows = PAST_INT32 // columns + 1
    shape = {"rows": rows, "columns": columns}
    facts = {"op": op, "peer": f"transfuse {backend}", "variant": "numel beyond 2^32", "shape": shape}
    with run.guarded(**facts), use_backend(backend):
        x = torch.zeros(rows, columns, dtype=torch.bfloat16, device=run.device)
        last = x[-3:].normal_()
        same = torch.equal(call(x)[-3:], call(last.clone()))
        reason = "" if same else "the last rows differ from the same rows alone"
        run.add(**facts, status="ok" if same else "failed", reason=reason)
    torch.cuda.empty_cache()


def _in_a_graph(call, x):
    """Captured on other values, replayed on x. The call before, as torch asks for, loads what the capture may not."""
    graph, given = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    call(given)
    with torch.cuda.graph(graph):
        output = call(given)
    given.copy_(x)
    graph.replay()
    return output


def _on_a_side_stream(call, x):
    """Behind a long copy on the stream, whose result it reads."""
    stream, source = torch.cuda.Stream(), torch.zeros(1 << 28, dtype=torch.int8, device=x.device)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = torch.empty_like(x)
        source.clone()
        late.copy_(x)
        output = call(late)
    stream.synchronize()
    return output


def _in_a_thread(call, x):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call, x).result()


def _compiled(call, x):
    torch._dynamo.reset()
    dispatch.forget_choices()
    return torch.compile(call, fullgraph=True, backend="aot_eager")(x)


def _on_the_last_gpu(call, x):
    """Where there are several, while the first one is current."""
    return call(x.to(f"cuda:{torch.cuda.device_count() - 1}")).to(x.device)


CIRCUMSTANCES = {
    "captured in a CUDA graph": _in_a_graph,
    "on a side stream": _on_a_side_stream,
    "in a fresh thread": _in_a_thread,
    "as a compiled first call": _compiled,
    "on the last GPU": _on_the_last_gpu,
}


def check_circumstances(run, op, backend):
    """The same bits however an op is called."""
    with use_backend(backend):
        x = torch.randn(300, 768, device=run.device).bfloat16()
        shape = dict(zip(("rows", "columns"), x.shape, strict=True))
        for variant, circumstance in CIRCUMSTANCES.items():
            facts = {"op": op, "peer": f"transfuse {backend}", "variant": variant, "shape": shape}
            with run.guarded(**facts):
                call = CALLS_ANYWHERE[op]
                same = torch.equal(circumstance(call, x), call(x))
                reason = "" if same else "the bits differ from those of a plain call"
                run.add(**facts, status="ok" if same else "failed", reason=reason)


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


def is_failure(row):
    """Of ours: parity that was missed or not reached, and a wrong result anywhere."""
    broken = ("failed", "error") if row["section"] == "parity" else ("failed",)
    return row["status"] in broken and (row["section"] == "parity" or row["peer"] in gpu_peers.OWN_BACKENDS)


def run_all(run):
    """Every section in order; returns the exit code."""
    print(json.dumps({"torch": torch.__version__, **run.facts}), flush=True)
    print(
        "backends: "
        + ", ".join(f"{name}: {'yes' if state is True else state}" for name, state in transfuse.backends().items())
    )
    with run.within("parity", 170):
        check_backends(run)
    for place, (section, seconds) in enumerate(SECTIONS):
        with run.within(section, seconds, of=sum(later for _, later in SECTIONS[place:])):
            getattr(gpu_peers, section)(run)
            if not run.dry:
                torch.cuda.empty_cache()
    run.close()
    print(table(run.rows))
    bad = [row for row in run.rows if is_failure(row)]
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
