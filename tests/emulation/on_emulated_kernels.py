"""pytest -p on_emulated_kernels: every test's raw ops run on the emulated CUDA kernels, where these take the dtype."""

import emulated_ops
import pytest
import torch

calls = 0


class TakenDtypes(emulated_ops.EmulatedKernels):
    """float64, and what is not in this machine's memory, goes where it always does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [argument for argument in args if isinstance(argument, torch.Tensor)]
        plain = all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)
        if "decode_attention" in function.name():
            tensors = tensors[:1]  # its slopes and sinks are float64 beside every query
        if not plain or any(tensor.dtype == torch.float64 or tensor.device.type != "cpu" for tensor in tensors):
            return function(*args, **(kwargs or {}))
        return super().__torch_dispatch__(function, types, args, kwargs)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call():
    global calls
    with TakenDtypes() as mode:
        yield
    calls += mode.calls


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"{calls} calls of emulated kernels")
