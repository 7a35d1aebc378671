"""Triton kernels, one file per op; installed as transfuse.kernels.triton."""
