"""``refsam segment``: masks, overlay and result file for one source."""

import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refsam.cli.frame_loop import json_lines, segment_frames
from refsam.cli.options import (
    ComputeOptions,
    MaskOptions,
    ModelChoice,
    OutOption,
    OverwriteOption,
    QuietOption,
    ReadingOptions,
    grouped,
)
from refsam.cli.progress import progress
from refsam.errors import ExpressionError, UserError, differences
from refsam.runtime.collector import no_collection
from refsam.runtime.device import (
    check_names,
    choose_device,
    choose_dtype,
    choose_encoder_dtype,
    precision_facts,
)
from refsam.runtime.malloc import keep_freed_memory
from refsam.runtime.signals import defer_interrupts, termination_interrupts
from refsam.runtime.threads import choose_threads

if TYPE_CHECKING:
    import torch

    from refsam.model import PromptedSAM
    from refsam.session import FrameGraphs, VideoSession

app = typer.Typer(rich_markup_mode="markdown")


@app.command()
@grouped
def segment(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Video file, folder of images (natural order), image, 'frames/*.jpg', frames/%05d.jpg, camera:0, a stream's "
            "URL, or - for standard input.",
        ),
    ],
    text: Annotated[list[str], typer.Option(help="Object to segment, such as 'the red car'; repeat it for more.")],
    out: OutOption,
    model: ModelChoice,
    compute: ComputeOptions,
    masks: MaskOptions,
    reading: ReadingOptions,
    overwrite: OverwriteOption = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in OUT where it ended.")] = False,
    json: Annotated[
        str | None,
        typer.Option(
            help="Write a JSON line for every frame as soon as it is done; - is standard output, and the rest goes to stderr.",
            metavar="FILE",
        ),
    ] = None,
    quiet: QuietOption = False,
) -> None:  # fmt: skip
    """Segment the objects that the text names, in every frame.

    Writes into the folder OUT:

    - `masks/00/00000.png` and so on, expression by expression, frame by frame: 0 and 255, at the
      frame's own size; an object that is not in view gives an empty mask
    - `overlay.mp4`, the masks drawn onto the video
    - `result.json`, a score and an area for each frame and expression, and what was run

    Ctrl-C keeps what is finished. Example:
    `refsam segment clip.mp4 --text "the red car" --text "the dog" --out out`
    """
    started = time.perf_counter()
    check_names(compute.device, compute.dtype)
    check_expressions(text)
    masks.check(len(text))
    from refsam.video import ResultWriter, open_source
    from refsam.video.frames import source_facts
    from refsam.video.run_folder import check_output

    def say(line: str) -> None:
        if not quiet:
            typer.echo(line, err=json == "-")

    check_output(out, overwrite=overwrite or resume, source=source)
    facts = {"source": source, "model": model.checkpoint, "threshold": masks.threshold}
    facts["selection"] = reading.to_read().selection()
    earlier = _earlier(out, text, facts | {"formats": masks.format_names}) if resume else None
    if earlier is not None and earlier["complete"]:
        return say(f"{earlier['frames']} frames were done before: {out}")
    after = -1 if earlier is None else earlier["frame_numbers"][-1]
    with termination_interrupts(), open_source(source, reading.to_read(after)) as reader:
        session, precision = load_session(
            model,
            text,
            compute.device,
            compute.dtype,
            graphs=compute.graphs,
            threshold=masks.threshold,
            quiet=quiet,
        )
        from refsam.session import prefetch_frames

        if earlier is not None:
            session.restore(_state(out))
            reader.skipped |= {e["frame"]: e["problem"] for e in earlier["skipped_frames"]}
        with (
            ResultWriter(
                out,
                text,
                fps=reader.fps,
                time_base=reader.time_base,
                overlay=masks.overlay,
                overwrite=overwrite,
                formats=masks.format_names,
                sound=reader.sound,
                resume=earlier is not None,
            ) as writer,
            json_lines(json, text, reader.files, with_masks="rle" in masks.format_names) as tell,
        ):
            with (
                progress("segmenting", reader.expected_frames, quiet=quiet) as advance,
                defer_interrupts() as heed,
                closing(prefetch_frames(session, reader, heed=heed)) as frames,
            ):
                run = segment_frames(
                    session,
                    frames,
                    writer,
                    precision,
                    started=started,
                    advance=advance,
                    heed=heed,
                    tell=tell,
                )
            if run.frames == 0 and earlier is None:
                raise UserError(f"{source} has no frame in the chosen range: see --start and --end")
            writer.finish(
                pack=lambda state: state.to_bytes(),
                **facts,
                **run.facts(),
                **session_facts(session, precision),
                **source_facts(reader),
            )
    for note in () if quiet else reader.notes:
        typer.echo(f"refsam: note: {note}", err=True)
    run.report(out, say)


def session_facts(session: "VideoSession", precision: "torch.dtype") -> dict[str, Any]:
    """Entries of ``result.json`` about the model and the device."""
    from refsam import __version__

    return {
        "refsam": __version__,
        "device": str(session.model.device),
        **precision_facts(precision, session.model.image_encoder.product_dtype),
        **graph_facts(session.graphs),
    }


def _earlier(out: Path, text: list[str], wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The report of a run that this one can continue; None where there is none.

    Raises UserError: it did something else, or its source cannot be read twice.
    """
    from refsam.video.run_folder import RESULT, read_result

    if (
        wanted["source"] == "-"
        or wanted["source"].startswith("camera:")
        or "://" in wanted["source"]
    ):
        raise UserError(f"--resume: {wanted['source']} cannot be read from the beginning again")
    report = read_result(out)
    if report is None:
        return None
    different = differences(report, wanted)
    if [expression["text"] for expression in report["expressions"]] != text:
        different.append("other expressions")
    if different:
        raise UserError(
            f"--resume: {out / RESULT} is of another run: {'; '.join(different)}; give another folder with --out"
        )
    return report


def _state(out: Path) -> Any:
    """The state after the last frame of the run in that folder."""
    from refsam.session import TrackState
    from refsam.video.run_folder import RESUME

    try:
        return TrackState.from_bytes((out / RESUME).read_bytes())
    except OSError as error:
        raise UserError(
            f"--resume: {out / RESUME} cannot be read ({error.strerror}); start again with --overwrite"
        ) from error


def check_expressions(expressions: list[str]) -> None:
    """Refuse empty expressions before a model is loaded. Raises UserError: nothing but white space."""
    for expression in expressions:
        if not expression.strip():
            raise UserError("--text is empty: say what to segment, such as --text 'the red car'")
        try:
            expression.encode()
        except UnicodeEncodeError:
            shown = expression.encode("utf-8", "backslashreplace").decode()
            raise ExpressionError(
                f"--text '{shown}' is not UTF-8: set a UTF-8 locale, such as LC_ALL=C.UTF-8"
            ) from None


@no_collection()
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
    return model.optimize(choose_encoder_dtype(dtype), fixed_weights=True), precision


def make_graphs(model: "PromptedSAM") -> "FrameGraphs":
    """CUDA graphs for a model. Raises UserError: it is not on a GPU."""
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


@no_collection()
def load_session(
    choice: ModelChoice,
    expressions: list[str],
    device: str,
    dtype: str,
    *,
    graphs: bool = False,
    threshold: float = 0.5,
    quiet: bool = False,
) -> tuple["VideoSession", "torch.dtype"]:
    """Load a model onto a device and begin a session with it. Raises UserError: no such device, checkpoint or known words."""
    model, precision = load_model(choice, choose_device(device), dtype)
    from refsam.model.text_encoder import explain_unknown
    from refsam.session import VideoSession

    session = VideoSession(
        model,
        expressions,
        graphs=make_graphs(model) if graphs else None,
        threshold=threshold,
    )
    for expression, words in zip(expressions, session.unknown_words, strict=True):
        if words and not quiet:
            typer.echo(f"refsam: note: {explain_unknown(expression, words)}", err=True)
    return session, precision
