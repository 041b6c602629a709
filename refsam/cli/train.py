"""``refsam train``: train a model from a YAML configuration."""

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from refsam.training.loop import Trainer

app = typer.Typer()


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file, such as configs/nano.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Entries to change, such as optimiser.learning_rate=3e-4."),
    ] = None,
    allow_changes: Annotated[
        bool,
        typer.Option(
            "--allow-changes",
            help="Resume with a changed configuration; the log notes the changes.",
        ),
    ] = False,
) -> None:  # fmt: skip
    """Train a model; run it again to resume where it stopped or was killed. On several GPUs: torchrun -m refsam train CONFIG.

    Writes log, curves, the resumable state and, at the end, the model into the folder that the configuration names. SIGUSR1 saves
    the state after the step; SIGTERM and Ctrl-C end the run after it, with its state saved.
    """
    # Read when torch is first imported: threads that wait by spinning keep the workers that draw batches off the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from refsam.training.loop import Trainer
    from refsam.training.settings import TrainingSettings

    settings = TrainingSettings.from_yaml(config, overrides or ())
    trainer = Trainer(settings, typer.echo, allow_changes=allow_changes)
    try:
        for record in trainer.run():
            numbers = "  ".join(f"{n} {value:.4g}" for n, value in record.items() if n != "step")
            _echo(trainer, f"step {int(record['step'])}/{trainer.steps}  {numbers}")
    finally:
        trainer.leave()
    if not trainer.stopped_by:
        _echo(trainer, f"model written to {trainer.output / 'model'}")
        return
    name = signal.Signals(trainer.stopped_by).name
    _echo(
        trainer,
        f"stopped by {name} after step {trainer.step} of {trainer.steps}; the state is in {trainer.output}: "
        "the same command continues from it",
    )
    raise typer.Exit(128 + trainer.stopped_by)


def _echo(trainer: "Trainer", text: str) -> None:
    """Print in the first process only."""
    if trainer.processes.is_first:
        typer.echo(text)
