"""Kernels that ship as Python source: transfuse.kernels.triton (kernels/triton in the repository)."""

from pathlib import Path

# setup.py maps kernels/triton here; a checkout that is on PYTHONPATH without an install has it at its root.
_of_checkout = Path(__file__).resolve().parents[3] / "kernels"
if not (Path(__file__).parent / "triton").is_dir() and (_of_checkout / "triton" / "__init__.py").is_file():
    __path__.append(str(_of_checkout))
