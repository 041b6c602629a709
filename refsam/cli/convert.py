"""``refsam convert``: convert other programs' checkpoints to refsam's: segment-anything's, EVF-SAM's and the RefSAM authors'."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refsam.errors import UserError
from refsam.runtime.device import check_dtype

if TYPE_CHECKING:
    from refsam.checkpoint import Checkpoint, KeyReport

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Convert checkpoints of other programs.",
)

_Out = Annotated[Path, typer.Option("--out", help="The folder to write.")]
_Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a checkpoint in that folder.")
]


@app.command()
def sam(
    source: Annotated[
        Path,
        typer.Argument(
            help="sam_vit_b_*.pth or another size's, MedSAM's or SAM-HQ's file, one that a training program wrote, or a folder "
            "of Hugging Face's SamModel."
        ),
    ],
    out: _Out,
    text_encoder: Annotated[
        str | None,
        typer.Option(
            "--text-encoder",
            help="Hub id or folder of a T5 or RoBERTa, or small, which is trained with the model; google-t5/t5-3b by default.",
        ),
    ] = None,
    overwrite: _Overwrite = False,
) -> None:
    """Convert SAM's weights to an untrained RefSAM, for training or as the base of a delta. Nothing in the file is executed."""
    from refsam.checkpoint import convert_sam, text_encoder_entries
    from refsam.model import RefSAM

    _check_out(out, overwrite)
    entries = None if text_encoder is None else text_encoder_entries(text_encoder)
    _write(*convert_sam(source, RefSAM.expected_tensors, entries), out)


@app.command()
def official(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="`resizer_*`, `mask_decoder_*`, `dense_conv_*`, `track_net_*`, `image_encoder_blocks_*`"
        ),
    ],
    sam: Annotated[
        Path, typer.Option("--sam", help="The `sam_vit_*.pth` that they were trained on.")
    ],
    out: _Out,
    text_encoder: Annotated[
        str | None,
        typer.Option("--text-encoder", help="Hub id of the text encoder, if no file name says it."),
    ] = None,
    overwrite: _Overwrite = False,
) -> None:
    """Convert the authors' files, one per module, together with SAM's file, to a whole checkpoint."""
    from refsam.checkpoint import convert_official
    from refsam.model import RefSAM

    _check_out(out, overwrite)
    _write(*convert_official(files, sam, RefSAM.expected_tensors, text_encoder), out)


@app.command()
def evf(
    folder: Annotated[
        Path,
        typer.Argument(
            help="EVF-SAM's folder: config.json, weights, tokenizer (see docs/evf_sam.md)."
        ),
    ],
    out: _Out,
    dtype: Annotated[str, typer.Option(help="Precision of the written tensors: float32, bfloat16 or float16.")] = "float32",
    overwrite: _Overwrite = False,
) -> None:  # fmt: skip
    """Convert EVF-SAM's published files: a model that segments by text without training."""
    from refsam.checkpoint import read_evf
    from refsam.model import EVFSAM

    _check_out(out, overwrite)
    check_dtype(dtype, ("float32", "bfloat16", "float16"))
    import torch

    _write(*read_evf(folder, EVFSAM.expected_tensors, getattr(torch, dtype)), out)


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise UserError(f"--out: {out} exists; wanted a new folder, or --overwrite")


def _write(checkpoint: "Checkpoint", report: "KeyReport", out: Path) -> None:
    from refsam.checkpoint import write_checkpoint

    write_checkpoint(out, checkpoint)
    encoder = checkpoint.config.image_encoder
    typer.echo(
        f"size: {encoder.embed_dim} wide, {encoder.depth} blocks, {encoder.num_heads} heads, "
        f"image {encoder.image_size}\n{report}\nwritten: {out}"
    )
