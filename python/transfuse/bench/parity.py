"""One comparison of one op with its float64 reference, as a row: shared by `transfuse verify` and `make gpu`."""

import transfuse


def verify_case(case, dtype, direction, backend, device):
    """One row of the table: {'op', 'case', ..., 'status': 'ok' | 'failed' | 'error', 'error', 'allowed', 'repeat'}."""
    name = str(dtype).removeprefix("torch.")
    row = {
        "op": case.op,
        "case": case.name,
        "shape": case.shape,
        "dtype": name,
        "direction": direction,
        "device": device,
        "backend": backend,
        "error": None,
        "allowed": None,
        "worst": "",
        "reason": "",
        "repeat": f"transfuse verify --op {case.op} --case {case.name} --dtype {name} --backend {backend} "
        f"--device {device}",
    }
    try:
        inputs = case.inputs(dtype, device)
        with transfuse.use_backend(backend):
            row["backend"] = case.explain(*inputs).chosen or backend
            found = case.compare(inputs, direction)
    except Exception as error:  # one broken op must not hide the figures of the others
        lines = str(error).splitlines()
        return {**row, "status": "error", "reason": f"{type(error).__name__}: {lines[0] if lines else ''}"}
    return {
        **row,
        "status": "ok" if found.ok else "failed",
        "error": found.largest,
        "allowed": found.budget,
        "worst": found.what,
    }
