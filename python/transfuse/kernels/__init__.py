"""Kernels that ship as Python source: transfuse.kernels.triton (kernels/triton in the repository)."""
