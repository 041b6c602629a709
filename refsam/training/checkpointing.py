"""Gathers a run's resumable state and its averaged model from all processes.

`torch.distributed.checkpoint.state_dict` would give a parameter that was never updated the optimiser state of one step: a
resumed run would differ from an uninterrupted one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from refsam.checkpoint import Checkpoint, write_checkpoint
from refsam.errors import UserError, named
from refsam.model.model_card import card_arguments
from refsam.training.distributed import Processes, local, spread_like, whole
from refsam.training.module import TrainingModule

_OPTIMISER = "optimiser."


class Weights:
    """The trained weights of a run, their running average (empty without one) and the optimisers' state.

    Methods that gather must be called by every process.
    """

    def __init__(
        self,
        module: TrainingModule,
        optimisers: list[torch.optim.Optimizer],
        processes: Processes,
        with_average: bool,
    ) -> None:
        self.module = module
        self.model = module.model
        self.optimisers = optimisers
        self.processes = processes
        self.average: dict[str, Tensor] = {}
        if with_average:
            self.average = {n: value.detach().clone() for n, value in self._trained().items()}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Swap in the averaged weights within the block."""
        if not self.average:
            yield
            return
        trained = self._trained()
        kept = {name: local(value).clone() for name, value in trained.items()}
        try:
            _fill(trained, {name: local(value) for name, value in self.average.items()})
            yield
        finally:
            _fill(trained, kept)

    def averaged_checkpoint(self, delta: bool) -> Checkpoint:
        """The averaged model; with `delta`, without the tensors of SAM's file."""
        with self.averaged():
            stored = self.model.to_checkpoint(delta)
            tensors = {n: whole(t).detach().cpu().clone() for n, t in stored.tensors.items()}
        return replace(stored, tensors=tensors)

    def save_model(self, folder: Path, may_be_delta: bool) -> None:
        """Write the averaged model, without SAM's own tensors if `may_be_delta` and the model is built on SAM's file."""
        stands_on_sam = "sam" in self.model.sources and self.model.config.frozen
        stored = self.averaged_checkpoint(may_be_delta and stands_on_sam)
        if self.processes.is_first:
            folder.parent.mkdir(parents=True, exist_ok=True)
            write_checkpoint(folder, stored)
            card = self.model.generate_model_card(**card_arguments(stored))
            card.save(folder / "README.md")

    def state(self) -> dict[str, Tensor]:
        """The complete resumable state by name, gathered and on the host."""
        state = self._weights() | self._optimiser_state()
        # Sorted, so that all processes gather the same tensor at the same time.
        return {name: whole(state[name]).detach().cpu().contiguous() for name in sorted(state)}

    def load(self, tensors: dict[str, Tensor], place: Path) -> None:
        """Load the result of `state`; raises UserError, which names `place`, if it is of another model."""
        expected = self._weights()
        stored = {name for name in tensors if not name.startswith(_OPTIMISER)}
        if wrong := sorted(stored ^ expected.keys()):
            raise UserError(
                f"{place}: its state is of another model ({named(wrong)} differ): take another output"
            )
        _check_shapes(tensors, expected, place)
        _fill(expected, {n: local(spread_like(tensors[n], expected[n])) for n in expected})
        parameters = dict(self.module.named_parameters())
        owner = {id(p): o for o in self.optimisers for g in o.param_groups for p in g["params"]}
        for name in sorted(tensors.keys() - stored):
            _, key, parameter = name.split(".", 2)
            target = parameters[parameter]
            value = tensors[name]
            # The number of steps is no tensor of the parameter's shape, and never sharded.
            placed = value.to(target.device) if key == "step" else spread_like(value, target)
            owner[id(target)].state[target][key] = placed

    def _trained(self) -> dict[str, Tensor]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def _weights(self) -> dict[str, Tensor]:
        """The module's trained tensors and their running average, by name."""
        frozen = {n for n, p in self.module.named_parameters() if not p.requires_grad}
        weights = {n: t for n, t in self.module.state_dict().items() if n not in frozen}
        return weights | {f"average.{name}": value for name, value in self.average.items()}

    def _optimiser_state(self) -> dict[str, Tensor]:
        """The optimisers' state of each parameter that was stepped, by name."""
        state = {}
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        for optimiser in self.optimisers:
            for parameter, values in optimiser.state.items():
                for key, value in values.items():
                    state[f"{_OPTIMISER}{key}.{names[id(parameter)]}"] = value
        return state


@torch.no_grad()
def _fill(targets: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        local(targets[name]).copy_(value)


def _check_shapes(tensors: dict[str, Tensor], expected: dict[str, Tensor], place: Path) -> None:
    wrong = [
        f"{name} {tuple(tensors[name].shape)}, now {tuple(value.shape)}"
        for name, value in sorted(expected.items())
        if tensors[name].shape != value.shape
    ]
    if not wrong:
        return
    hint = ""
    if any("text_encoder.words" in name for name in wrong):
        hint = (
            "the expressions have other words than when the run was begun: put the data back, or "
        )
    raise UserError(
        f"{place}: its state is of another model ({named(wrong, 2)}): {hint}start a new run in another "
        f"output, with init_from={place}/best to keep what was learnt"
    )
