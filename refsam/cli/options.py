"""Options that several sub-commands share."""

from pathlib import Path
from typing import Annotated

import typer

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
GraphsOption = Annotated[
    bool,
    typer.Option(
        "--cuda-graphs", help="Record a frame's work on the GPU once and replay it (experimental)."
    ),
]
