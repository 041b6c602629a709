"""``refsam segment``: masks, overlay and result file for one source."""

import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refsam.cli.options import (
    DeviceOption,
    DtypeOption,
    GraphsOption,
    ModelChoice,
    OutOption,
    OverwriteOption,
    with_model,
)
from refsam.errors import UserError
from refsam.runtime.device import (
    autocast,
    check_names,
    choose_device,
    choose_dtype,
    choose_encoder_dtype,
)
from refsam.runtime.malloc import keep_freed_memory
from refsam.runtime.threads import choose_threads

if TYPE_CHECKING:
    import torch

    from refsam.model import PromptedSAM
    from refsam.session import EncodedFrame, FrameGraphs, PreparedFrame, VideoSession
    from refsam.video import Frame, ResultWriter

app = typer.Typer(rich_markup_mode="markdown")


@app.command()
@with_model
def segment(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Video file, folder of images (natural order), image, camera:0 or a stream's URL.",
        ),
    ],
    text: Annotated[
        list[str],
        typer.Option(help="Object to segment, such as 'the red backpack'; repeat it for more."),
    ],
    out: OutOption,
    model: ModelChoice,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    overlay: Annotated[
        bool, typer.Option("--overlay/--no-overlay", help="Also write overlay.mp4.")
    ] = True,
    overwrite: OverwriteOption = False,
    graphs: GraphsOption = False,
) -> None:
    """Segment the objects that the text names, in every frame.

    Writes into the folder OUT:

    - `masks/00/00000.png` and so on, expression by expression, frame by frame: 0 and 255, at the
      frame's own size; an object that is not in view gives an empty mask
    - `overlay.mp4`, the masks drawn onto the video
    - `result.json`, a score and an area for each frame and expression, and what was run

    Ctrl-C keeps what is finished. Example:
    `refsam segment clip.mp4 --text "the red backpack" --text "the dog" --out out`
    """
    started = time.perf_counter()
    check_names(device, dtype)
    check_expressions(text)
    from refsam.video import ResultWriter, open_source
    from refsam.video.writer import check_output

    check_output(out, overwrite=overwrite)
    with open_source(source) as reader:
        session, precision = load_session(model, text, device, dtype, graphs=graphs)
        from refsam.session import prefetch_frames

        writer = ResultWriter(
            out,
            text,
            fps=reader.fps,
            time_base=reader.time_base,
            overlay=overlay,
            overwrite=overwrite,
        )
        with writer, closing(prefetch_frames(session, reader)) as frames:
            run = segment_frames(
                session, frames, writer, precision, reader.expected_frames, started
            )
            writer.finish(**run.facts(model.checkpoint, source, session, precision))
    run.report(out)


@dataclass
class Run:
    """How a run went: seconds, frames, and what ended it early."""

    frames: int = 0
    seconds_to_first_mask: float | None = None
    seconds: float = 0.0
    seconds_of_frames: float = 0.0
    seconds_in_model: float = 0.0
    stopped_by: UserError | KeyboardInterrupt | None = None

    @property
    def rate(self) -> float:
        """Frames per second from the first frame on: without imports and loading."""
        return self.frames / self.seconds_of_frames

    def facts(
        self, model: str, source: str, session: "VideoSession", precision: "torch.dtype"
    ) -> dict:
        """The entries of ``result.json`` besides the frames."""
        from refsam import __version__

        return {
            "refsam": __version__,
            "model": model,
            "source": source,
            "complete": self.stopped_by is None,
            "stopped_by": None
            if self.stopped_by is None
            else str(self.stopped_by) or "interrupted",
            "device": str(session.model.device),
            **precision_facts(session.model, precision),
            **graph_facts(session.graphs),
            "timings": {
                "seconds": round(self.seconds, 3),
                "seconds_to_first_mask": round(self.seconds_to_first_mask or 0.0, 3),
                "seconds_in_model": round(self.seconds_in_model, 3),
                "frames_per_second": round(self.rate, 2),
            },
        }

    def report(self, out: Path) -> None:
        """Print the outcome; raise what ended the run early."""
        if isinstance(self.stopped_by, KeyboardInterrupt):
            typer.echo(
                f"refsam: interrupted; the {self.frames} frames done until then are in {out}",
                err=True,
            )
            raise typer.Exit(130)
        if self.stopped_by is not None:
            raise UserError(f"{self.stopped_by}; the {self.frames} frames before it are in {out}")
        typer.echo(f"{self.frames} frames in {self.seconds:.1f} s: {out}")
        typer.echo(
            f"{self.rate:.1f} frames/s once the model was loaded, reading and writing included"
        )


def check_expressions(expressions: list[str]) -> None:
    """Refuse empty expressions before a model is loaded.

    Raises:
        UserError: nothing but white space.
    """
    for expression in expressions:
        if not expression.strip():
            raise UserError(
                "--text is empty: say what to segment, such as --text 'the red backpack'"
            )


def load_model(
    choice: ModelChoice, device: "torch.device", dtype: str
) -> tuple["PromptedSAM", "torch.dtype"]:
    """A model on a device, its encoder's weights packed, and the dtype for autocast.

    Raises:
        UserError: no such checkpoint, or a dtype that the device lacks.
    """
    keep_freed_memory()
    precision = choose_dtype(dtype, device)
    model = choice.load().to(device)
    choose_threads(model.device, model.config.image_encoder.multiplications)
    return model.optimize(choose_encoder_dtype(dtype)), precision


def precision_facts(model: "PromptedSAM", precision: "torch.dtype") -> dict[str, str]:
    """The dtypes for ``result.json``: autocast's, and that of the image encoder's products."""
    import torch

    encoder = precision if precision != torch.float32 else model.image_encoder.product_dtype
    names = {"dtype": precision, "encoder_dtype": encoder}
    return {key: str(dtype).removeprefix("torch.") for key, dtype in names.items()}


def make_graphs(model: "PromptedSAM") -> "FrameGraphs":
    """CUDA graphs for a model.

    Raises:
        UserError: it is not on a GPU.
    """
    from refsam.session import FrameGraphs

    if model.device.type != "cuda":
        raise UserError(f"--cuda-graphs: the model is on {model.device}; want --device cuda")
    return FrameGraphs(model)


def graph_facts(graphs: "FrameGraphs | None") -> dict[str, dict[str, float]]:
    """The number and memory of CUDA graphs for ``result.json``; empty without graphs."""
    if graphs is None:
        return {}
    memory = round(graphs.memory_bytes / 2**20, 1)
    return {"cuda_graphs": {"count": graphs.count, "memory_mib": memory}}


def load_session(
    choice: ModelChoice, expressions: list[str], device: str, dtype: str, *, graphs: bool = False
) -> tuple["VideoSession", "torch.dtype"]:
    """Load a model onto a device and begin a session with it.

    Raises:
        UserError: no such device, checkpoint or known words.
    """
    model, precision = load_model(choice, choose_device(device), dtype)
    from refsam.model.text_encoder import explain_unknown
    from refsam.session import VideoSession

    session = VideoSession(model, expressions, graphs=make_graphs(model) if graphs else None)
    for expression, words in zip(expressions, session.unknown_words, strict=True):
        if words:
            typer.echo(f"refsam: note: {explain_unknown(expression, words)}", err=True)
    return session, precision


def segment_frames(
    session: "VideoSession",
    frames: Iterable[tuple["Frame", "PreparedFrame | EncodedFrame"]],
    writer: "ResultWriter",
    precision: "torch.dtype",
    expected_frames: int | None,
    started: float,
) -> Run:
    """Step through the frames and queue the results, until the end, a bad frame or Ctrl-C.

    Args:
        frames: as `prefetch_frames` gives them.
        started: `time.perf_counter` when the command began.

    Raises:
        UserError: nothing could be done at all, or the results cannot be written.
    """

    from refsam.cli.progress import progress
    from refsam.runtime.signals import defer_interrupts
    from refsam.session import EncodedFrame
    from refsam.video import FrameDecodeError

    run, first = Run(), time.perf_counter()
    device = session.model.device
    try:
        with (
            progress("segmenting", expected_frames) as advance,
            autocast(device, precision),
            defer_interrupts() as check,
        ):
            for frame, prepared in frames:
                begun = time.perf_counter()
                masks, scores = session.step(prepared).on_host()
                now = time.perf_counter()
                run.seconds_in_model += now - begun
                if isinstance(prepared, EncodedFrame):
                    run.seconds_in_model += prepared.seconds
                if run.seconds_to_first_mask is None:
                    run.seconds_to_first_mask = now - started
                writer.write(frame, masks, scores)
                run.frames += 1
                advance()
                check()
    except (FrameDecodeError, KeyboardInterrupt) as error:
        if run.frames == 0:
            raise
        run.stopped_by = error
    ended = time.perf_counter()
    run.seconds, run.seconds_of_frames = ended - started, ended - first
    return run
