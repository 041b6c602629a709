"""Whether torch.func's transforms (grad, vjp, vmap, jvp) or forward-mode derivatives are at work: the operators have no rules for
most of them."""

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether a transform or a level of forward-mode differentiation is entered, beside what torch.compile traces."""
    if torch.compiler.is_compiling():
        return False
    # Private; torch's own `autograd.Function` asks so, and there is no other way.
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
