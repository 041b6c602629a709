"""Compares a resumed run's configuration with the one it started with."""

from collections.abc import Mapping
from typing import Any

from refsam.config import config_to_dict
from refsam.errors import UserError
from refsam.training.settings import TrainingSettings
from refsam.training.state import Progress

_ACCUMULATION = "optimiser.gradient_accumulation_steps"

# Entries that change neither data nor gradients: device, speed, logging, what is kept.
_HARMLESS = (
    "output",
    "init_from",
    "sam",
    "trunk",
    "detector",
    "text_cache",
    "validation",
    "device",
    "threads",
    "workers",
    "activation_checkpointing",
    "compile",
    "parallel",
    "peak_tflops",
    "delta",
    "wandb",
    "save_every",
    "log_every",
)


def learnt(settings: TrainingSettings) -> dict[str, Any]:
    """The entries that decide what is learnt, by their dotted names."""
    values = config_to_dict(settings)
    return leaves({key: value for key, value in values.items() if key not in _HARMLESS})


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Entries of nested plain values by their dotted names; a list of plain values is one entry."""
    if isinstance(value, Mapping):
        parts = list(value.items())
    elif isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        parts = list(enumerate(value))
    else:
        return {name: value}
    found: dict[str, Any] = {}
    for key, entry in parts:
        found |= leaves(entry, f"{name}.{key}" if name else str(key))
    return found


def differences(before: Mapping[str, Any], settings: TrainingSettings) -> list[str]:
    """Describe every entry that differs from `learnt` at the start of the run.

    More steps in the last stage do not count where the learning rate does not depend on them.
    """
    now = learnt(settings)
    last = f"stages.{len(settings.stages) - 1}.steps"
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        is_longer = key == last and old is not None and new is not None and new > old
        if old != new and not (is_longer and settings.optimiser.final_rate == 1.0):
            found.append(f"{key} was {_short(old)}, now {_short(new)}")
    return found


def _short(value: Any) -> str:
    text = "not there" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_configuration(
    before: Mapping[str, Any], settings: TrainingSettings, allow_changes: bool
) -> list[str]:
    """Describe the changes; raises UserError with all of them unless changes are allowed."""
    changes = differences(before, settings) if before else []
    if changes and not allow_changes:
        raise UserError(
            f"{settings.output} holds a run with another configuration: {'; '.join(changes)}; put it back, take another output, "
            "or continue with --allow-changes"
        )
    return [f"allowed changes: {'; '.join(changes)}"] if changes else []


def keep_batches(
    progress: Progress,
    now: Progress,
    before: Mapping[str, Any],
    settings: TrainingSettings,
    allow_changes: bool,
) -> tuple[int, list[str]]:
    """The number of batches that each process accumulates so that a step keeps its batches and their order; notes on changes.

    `progress` is the state's, `now` this run's, whose threads and processes it takes over. Another number that the settings ask
    for is taken. Raises UserError where the processes cannot share the batches evenly, unless changes are allowed.
    """
    accumulation = settings.optimiser.gradient_accumulation_steps
    total = progress.batches or progress.processes * accumulation
    if accumulation == before.get(_ACCUMULATION, accumulation):
        if total % now.processes == 0:
            accumulation = total // now.processes
        elif not allow_changes:
            raise UserError(
                f"{settings.output}: a step was {total} batches on {progress.processes} processes, which {now.processes} cannot "
                "share evenly: take a number of processes that divides it, or continue with --allow-changes"
            )
    said = []
    if progress.threads != now.threads:
        said.append(
            f"{progress.threads} threads before, now {now.threads}: losses will differ slightly"
        )
    together = accumulation * now.processes
    if progress.processes != now.processes:
        said.append(
            f"{progress.processes} processes before, now {now.processes}: a step is {together} batches, "
            f"{accumulation} on each; losses will differ slightly"
        )
    progress.threads, progress.processes, progress.batches = now.threads, now.processes, together
    return accumulation, said
