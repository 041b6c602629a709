"""``refsam train``: train a model from a YAML configuration."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file, such as configs/nano.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Entries to change, such as optimiser.learning_rate=3e-4.",
        ),
    ] = None,
) -> None:
    """Train a model; run again to resume where it stopped.

    Writes log.jsonl, the resumable state and, at the end, the model into the folder that the configuration names.
    """
    from refsam.config import config_from_yaml
    from refsam.training.loop import Trainer
    from refsam.training.settings import TrainingSettings

    trainer = Trainer(config_from_yaml(TrainingSettings, config, overrides or ()))
    for note in trainer.notes:
        typer.echo(f"data: {note}")
    for record in trainer.run():
        numbers = "  ".join(
            f"{name} {value:.4g}" for name, value in record.items() if name != "step"
        )
        typer.echo(f"step {int(record['step'])}/{trainer.steps}  {numbers}")
    typer.echo(f"model written to {trainer.output / 'model'}")
