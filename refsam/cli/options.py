"""Options that several sub-commands share, alone and in groups."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refsam.errors import UserError

if TYPE_CHECKING:
    from refsam.model import PromptedSAM
    from refsam.video import ReadOptions

OutOption = Annotated[
    Path, typer.Option(help="Folder for the results; it must be empty or not exist yet.")
]
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
        help="Precision of matrix products: float32, bfloat16, int8 (image encoder, CPU only) or auto (bfloat16 where the "
        "GPU supports it; on a CPU that supports it, in the image encoder).",
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
OverlayOption = Annotated[
    bool, typer.Option("--overlay/--no-overlay", help="Also write overlay.mp4.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]


@dataclass(frozen=True)
class ModelChoice:
    """The model that a command loads: a checkpoint, and the files that it is built on."""

    checkpoint: CheckpointOption = "nano"
    sam: SamOption = None
    text_encoder: TextEncoderOption = None
    semantic: SemanticOption = False

    def load(self) -> "PromptedSAM":
        """The model, in eval mode, on the CPU; raises UserError."""
        from refsam.model import EVFSAM, load_model

        model = load_model(self.checkpoint, sam=self.sam, text_encoder=self.text_encoder)
        if isinstance(model, EVFSAM):
            model.semantic = self.semantic
        elif self.semantic:
            raise UserError(f"--semantic: {self.checkpoint} is not EVF-SAM; leave the option out")
        return model


@dataclass(frozen=True)
class ComputeOptions:
    """Device and precision of the model."""

    device: DeviceOption = "auto"
    dtype: DtypeOption = "auto"
    graphs: GraphsOption = False


@dataclass(frozen=True)
class MaskOptions:
    """Threshold and file formats of masks."""

    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="Format of masks: png (0 and 255; the default), palette (one PNG per frame, in DAVIS's colours), rle (COCO's "
            "run lengths, in masks.json) or cutout (PNGs with transparency); repeat it for more.",
            metavar="NAME",
        ),
    ] = None
    threshold: Annotated[
        float,
        typer.Option(help="Pixels with a higher probability than this belong to a mask, 0 to 1."),
    ] = 0.5
    overlay: OverlayOption = True

    @property
    def format_names(self) -> list[str]:
        """The formats, each once."""
        return list(dict.fromkeys(self.formats or ["png"]))

    def check(self, expressions: int) -> None:
        """Refuse impossible options before the work begins; raises UserError."""
        from refsam.video.mask_formats import check_formats

        check_formats(self.format_names, expressions)
        if not 0 < self.threshold < 1:
            raise UserError(f"--threshold {self.threshold:g}: want a number between 0 and 1")


@dataclass(frozen=True)
class ReadingOptions:
    """Range of frames to read, and time limits."""

    start: Annotated[
        str, typer.Option(help="Where to begin: seconds or [hh:]mm:ss.", metavar="TIME")
    ] = "0"
    end: Annotated[
        str | None, typer.Option(help="Where to end, in the same form.", metavar="TIME")
    ] = None
    stride: Annotated[int, typer.Option(min=1, help="Take every N-th frame.", metavar="N")] = 1
    max_frames: Annotated[
        int | None, typer.Option(min=1, help="Take at most N frames.", metavar="N")
    ] = None
    timeout: Annotated[
        float,
        typer.Option(
            min=0,
            help="Stop waiting for a stream after this many seconds without data; 0: never.",
        ),
    ] = 30.0
    skip_bad_frames: Annotated[
        bool,
        typer.Option(
            "--skip-bad-frames",
            help="Skip frames that cannot be decoded; result.json lists them.",
        ),
    ] = False

    def to_read(self, after: int = -1) -> "ReadOptions":
        """The options for `open_source`; raises UserError for invalid times."""
        from refsam.video import ReadOptions

        start = _seconds("--start", self.start)
        end = None if self.end is None else _seconds("--end", self.end)
        if end is not None and end <= start:
            raise UserError(f"--end {self.end}: want a time behind --start {self.start}")
        return ReadOptions(
            start=start,
            end=end,
            stride=self.stride,
            max_frames=self.max_frames,
            after=after,
            timeout=self.timeout,
            skip_bad_frames=self.skip_bad_frames,
        )


def _seconds(option: str, text: str) -> float:
    parts = text.split(":")
    if len(parts) > 3 or not all(re.fullmatch(r"\d+(\.\d*)?|\.\d+", part) for part in parts):
        raise UserError(f"{option} {text}: want seconds or [hh:]mm:ss, such as 12.5 or 1:02:03")
    return sum(float(part) * 60**place for place, part in enumerate(reversed(parts)))


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Let typer see the fields of parameters that are dataclasses as options of their own."""
    only_keyword, empty = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.empty
    groups: dict[str, type] = {}
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        group = parameter.annotation
        if not isinstance(group, type) or not dataclasses.is_dataclass(group):
            parameters.append(parameter.replace(kind=only_keyword))
            continue
        groups[name] = group
        for field in dataclasses.fields(group):
            default = empty if field.default is dataclasses.MISSING else field.default
            option = inspect.Parameter(field.name, only_keyword, default=default)
            parameters.append(option.replace(annotation=field.type))

    @wraps(command)
    def call(**given: Any) -> None:
        for name, group in groups.items():
            fields = [field.name for field in dataclasses.fields(group)]
            given[name] = group(**{field: given.pop(field) for field in fields})
        command(**given)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call
