"""Triton kernels, one file per op; installed as transfuse.kernels.triton.

<op>.py: @triton.jit kernels, and one function per raw op (python/transfuse/raw_ops.py) that allocates and launches.
launch.py: architectures, launch rows, the one place that launches. versions.py: what differs between Triton's versions.
"""
