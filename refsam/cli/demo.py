"""``refsam demo``: the bundled model on a generated clip whose true masks are known."""

import time
from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refsam.cli.frame_loop import segment_frames
from refsam.cli.options import (
    CheckpointOption,
    DeviceOption,
    DtypeOption,
    ModelChoice,
    OutOption,
    OverwriteOption,
)
from refsam.cli.progress import progress
from refsam.cli.segment import load_session, session_facts
from refsam.runtime.device import check_names
from refsam.runtime.signals import defer_interrupts, termination_interrupts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from refsam.data.generated import GeneratedClip
    from refsam.video import Frame

app = typer.Typer(rich_markup_mode="markdown")
_FPS = Fraction(12)


@app.command()
def demo(
    out: OutOption = Path("refsam-demo"),
    seed: Annotated[int, typer.Option(help="Another seed draws another clip.")] = 0,
    photo: Annotated[
        bool,
        typer.Option(
            "--photo", help="Move a camera over real photographs instead: a cat, a cup, a woman."
        ),
    ] = False,
    frames: Annotated[int, typer.Option(min=1, help="Length of the clip, in frames.")] = 24,
    checkpoint: CheckpointOption = "nano",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    overwrite: OverwriteOption = False,
) -> None:
    """Segment a generated clip with known truth; print J&F, write masks and an overlay.

    `--photo` takes photographs that scikit-image ships: their truth is not known, so nothing is scored.

    J is the overlap of mask and truth (intersection over union), F the agreement of their contours, both
    0 to 1, as DAVIS 2017 defines them.
    """
    started = time.perf_counter()
    check_names(device, dtype)
    from refsam.video import ResultWriter
    from refsam.video.run_folder import check_output

    check_output(out, overwrite=overwrite)
    session, precision = load_session(ModelChoice(checkpoint), [], device, dtype)
    from refsam.data.generated import generate_clip
    from refsam.data.photographs import sample
    from refsam.session import prefetch_frames

    clip = None if photo else generate_clip(seed=seed, frames=frames)
    if clip is None:
        images, expressions = sample.sample_clip(frames), list(sample.EXPRESSIONS)
    else:
        images, expressions = clip.frames.numpy(), clip.expressions
    for expression in expressions:
        session.add(expression)
    writer = ResultWriter(out, expressions, fps=_FPS, time_base=1 / _FPS, overwrite=overwrite)
    with termination_interrupts(), writer:
        with (
            progress("segmenting", frames) as advance,
            defer_interrupts() as heed,
            closing(prefetch_frames(session, _frames(images), heed=heed)) as prepared,
        ):
            run = segment_frames(
                session, prepared, writer, precision, started=started, advance=advance, heed=heed
            )
        facts = run.facts() | session_facts(session, precision)
        source = f"generated, seed {seed}" if clip else "photographs of scikit-image"
        writer.finish(model=checkpoint, source=source, **facts)
    run.report(out, typer.echo)
    if clip:
        _print_scores(clip, out)


def _frames(images: "NDArray[np.uint8]") -> Iterator["Frame"]:
    from refsam.video import Frame

    for index, image in enumerate(images):
        yield Frame(index, float(index / _FPS), image)


def _print_scores(clip: "GeneratedClip", out: Path) -> None:
    """Compare the files that were written with the truth: J, F and J&F per expression and in the mean."""
    import numpy as np
    from PIL import Image

    from refsam.metrics import contour_accuracy, region_similarity

    scores = []
    for index, (text, truth) in enumerate(zip(clip.expressions, clip.masks.numpy(), strict=True)):
        files = sorted((out / "masks" / f"{index:02d}").iterdir())
        masks = np.stack([np.asarray(Image.open(file)) > 0 for file in files])
        truth = truth[: len(masks)]
        j, f = np.mean(region_similarity(masks, truth)), np.mean(contour_accuracy(masks, truth))
        scores.append((j + f) / 2)
        typer.echo(f"{text}: J {j:.3f}, F {f:.3f}, J&F {(j + f) / 2:.3f}")
    typer.echo(f"mean J&F {np.mean(scores):.3f}")
