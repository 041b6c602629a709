"""Parameter groups, the learning rate's course, and the running average of the weights."""

import math

import torch
from torch import Tensor, nn

from refsam.training.settings import OptimiserSettings


def build_optimiser(model: nn.Module, settings: OptimiserSettings) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; vectors, tokens and position tables are not decayed."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_table = "rel_pos" in name or "pos_embed" in name or "token" in name
            (free if parameter.ndim <= 1 or is_table else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)


def learning_rate(step: int, steps: int, settings: OptimiserSettings) -> float:
    """The learning rate at a step: linear warm-up, then half a cosine."""
    if step < settings.warm_up_steps:
        return settings.learning_rate * (step + 1) / settings.warm_up_steps
    progress = (step - settings.warm_up_steps) / max(1, steps - settings.warm_up_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return settings.learning_rate * (settings.final_rate + (1 - settings.final_rate) * cosine)


@torch.no_grad()
def update_average(
    average: dict[str, Tensor], state: dict[str, Tensor], decay: float, step: int
) -> None:
    """Move the running average towards the state, in place; faster at the start."""
    decay = min(decay, (1 + step) / (10 + step))
    moving = [name for name, value in state.items() if value.is_floating_point()]
    torch._foreach_lerp_([average[n] for n in moving], [state[n] for n in moving], 1 - decay)
    for name in state.keys() - set(moving):
        average[name].copy_(state[name])
