"""When a module's call may be left out and its arithmetic done by the module around it."""

import torch
from torch.nn.modules import module as torch_module


def unhooked(module: torch.nn.Module) -> bool:
    """True where nobody listens to this module or replaced its forward (offloading does): its call may be left out."""
    if torch_module._has_any_global_hook():
        return False
    forward = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    return not (forward or module._backward_hooks or module._backward_pre_hooks)
