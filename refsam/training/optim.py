"""Parameter groups, the learning rate's course, clipping, and the running average of the weights."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from refsam.errors import UserError
from refsam.training.distributed import local, whole
from refsam.training.settings import OptimiserSettings, TrainingSettings


def build_optimisers(model: nn.Module, settings: OptimiserSettings) -> list[torch.optim.Optimizer]:
    """AdamW over the trainable parameters; with `muon`, Muon over the weights of linear layers.

    Vectors, tokens and position tables are not decayed, unless `decay_norms` is set. The `scale` of a group is its learning
    rate as a multiple of the settings' rate; sharded and whole parameters are in different groups. Raises UserError for a
    rate of a part that is frozen or not in the model.
    """
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    adamw: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    muon: dict[float, list[nn.Parameter]] = {}
    trained = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = _parts(name)
        trained.update(parts)
        rates = [settings.lr_overrides[part] for part in parts if part in settings.lr_overrides]
        scale = rates[-1] / settings.learning_rate if rates else 1.0
        if settings.muon and id(parameter) in linear:
            muon.setdefault(scale, []).append(parameter)
            continue
        is_vector = parameter.ndim <= 1
        is_table = any(k in name for k in ("rel_pos", "pos_embed", "token"))
        free = (is_vector or is_table) and not settings.decay_norms
        adamw.setdefault((scale, free, isinstance(parameter, DTensor)), []).append(parameter)
    if unknown := sorted(set(settings.lr_overrides) - trained):
        raise UserError(
            f"optimiser.lr_overrides: nothing to train in {', '.join(unknown)}, want some of "
            f"{', '.join(sorted(part for part in trained if '.' not in part))}, or parts of them such as trunk.network"
        )
    decay, rate = settings.weight_decay, settings.learning_rate
    groups = [
        {"params": adamw[key], "weight_decay": 0.0 if key[1] else decay, "scale": key[0]}
        for key in sorted(adamw)
    ]
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=rate, betas=settings.betas, fused=True)
    ]
    if muon:
        groups = [{"params": muon[scale], "scale": scale} for scale in sorted(muon)]
        optimisers.append(
            torch.optim.Muon(groups, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        )
    return optimisers


def _parts(name: str) -> list[str]:
    """Names of the parts that hold a parameter, the largest first: trunk, trunk.network, and so on."""
    words = name.split(".")[1:]
    return [".".join(words[:count]) for count in range(1, len(words) + 1)]


def learning_rate(
    step: int, steps: int, settings: OptimiserSettings, clips: int | None = None
) -> float:
    """The learning rate at a step: linear warm-up, then half a cosine. With `lr_batch` it is scaled to the step's `clips`."""
    top = _peak(settings, clips)
    if step < settings.warm_up_steps:
        return top * (step + 1) / settings.warm_up_steps
    progress = (step - settings.warm_up_steps) / max(1, steps - settings.warm_up_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return top * (settings.final_rate + (1 - settings.final_rate) * cosine)


def _peak(settings: OptimiserSettings, clips: int | None) -> float:
    """The learning rate after the warm-up, for steps of that many clips."""
    if clips is None or settings.lr_batch is None:
        return settings.learning_rate
    return settings.learning_rate * (clips / settings.lr_batch)


def describe_batches(settings: TrainingSettings, processes: int) -> list[str]:
    """A line for each size of the global batch: how it is composed, and its peak learning rate."""
    optimiser = settings.optimiser
    accumulated, lines = optimiser.gradient_accumulation_steps, []
    for clips in dict.fromkeys(stage.clips for stage in settings.stages):
        together = clips * processes * accumulated
        scaling = (
            f"scaled for that from {optimiser.learning_rate:g} for {optimiser.lr_batch}"
            if optimiser.lr_batch is not None
            else "not scaled to the batch (optimiser.lr_batch scales it)"
        )
        lines.append(
            f"{together} clips a step: {clips} on each of {processes} processes, "
            f"{accumulated} accumulated; learning rate {_peak(optimiser, together):g}, {scaling}"
        )
    return lines


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float | None) -> float:
    """Scale the gradients so that their total norm is at most `limit`, if there is one; returns the norm before scaling."""
    groups: dict[bool, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault(isinstance(parameter, DTensor), []).append(parameter)
    norms = [
        whole(get_total_norm([p.grad for p in group if p.grad is not None]))
        for group in groups.values()
    ]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if limit is not None:
        for group in groups.values():
            clip_grads_with_norm_(group, limit, norm)
    return float(norm)


@torch.no_grad()
def update_average(
    average: dict[str, Tensor], parameters: dict[str, nn.Parameter], decay: float, step: int
) -> None:
    """Move the running average towards the parameters of the same names, in place; faster at the start."""
    decay = min(decay, (1 + step) / (10 + step))
    current = [local(parameters[name]) for name in average]
    torch._foreach_lerp_([local(value) for value in average.values()], current, 1 - decay)
