"""Options that several sub-commands share."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refsam.errors import UserError

if TYPE_CHECKING:
    from refsam.model import PromptedSAM

OutOption = Annotated[Path, typer.Option(help="Folder for the results; it must not exist yet.")]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace the results of an earlier run in the folder."),
]
CheckpointOption = Annotated[
    str,
    typer.Option(help="Bundled name (nano), folder of a checkpoint, or Hugging Face Hub id."),
]
DeviceOption = Annotated[
    str, typer.Option(help="auto (the GPU if there is one), cpu, cuda or cuda:N.", metavar="NAME")
]
DtypeOption = Annotated[
    str,
    typer.Option(
        help="Precision of matrix products: float32, bfloat16 or auto (bfloat16 where the GPU has it; on a CPU that has it, "
        "in the image encoder).",
        metavar="NAME",
    ),
]
SemanticOption = Annotated[
    bool,
    typer.Option(
        "--semantic",
        help="EVF-SAM only: put '[semantic] ' before each text, for parts, stuff and all objects of a kind.",
    ),
]
GraphsOption = Annotated[
    bool,
    typer.Option(
        "--cuda-graphs", help="Record a frame's work on the GPU once and replay it (experimental)."
    ),
]
SamOption = Annotated[
    Path | None,
    typer.Option(
        "--sam",
        help="SAM's file or its converted folder, for a checkpoint that holds only what was trained; else looked for in "
        "REFSAM_SAM_DIR.",
    ),
]
TextEncoderOption = Annotated[
    str | None,
    typer.Option(
        "--text-encoder",
        help="Folder or Hub id of the checkpoint's text encoder, if it lies elsewhere.",
    ),
]


@dataclass(frozen=True)
class ModelChoice:
    """Which model a command loads: a checkpoint, and where what it stands on lies."""

    checkpoint: str = "nano"
    sam: Path | None = None
    text_encoder: str | None = None
    semantic: bool = False

    def load(self) -> "PromptedSAM":
        """The model, in eval mode, on the CPU; raises UserError."""
        from refsam.model import EVFSAM, load_model

        model = load_model(self.checkpoint, sam=self.sam, text_encoder=self.text_encoder)
        if isinstance(model, EVFSAM):
            model.semantic = self.semantic
        elif self.semantic:
            raise UserError(f"--semantic: {self.checkpoint} is not EVF-SAM; leave the option out")
        return model


_MODEL_OPTIONS = (
    ("checkpoint", CheckpointOption, "nano"),
    ("sam", SamOption, None),
    ("text_encoder", TextEncoderOption, None),
    ("semantic", SemanticOption, False),
)


def with_model(function: Callable[..., None]) -> Callable[..., None]:
    """The command whose parameter `model` is a ModelChoice: see `_MODEL_OPTIONS`."""
    signature = inspect.signature(function)
    options = [
        inspect.Parameter(
            name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=kind
        )
        for name, kind, default in _MODEL_OPTIONS
    ]
    parameters = [
        each
        for parameter in signature.parameters.values()
        for each in (options if parameter.name == "model" else [parameter])
    ]

    @wraps(function)
    def command(**values: Any) -> None:
        function(model=ModelChoice(*(values.pop(name) for name, _, _ in _MODEL_OPTIONS)), **values)

    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command
