"""``refsam segment-videos``: many sources, one folder of results for each."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refsam import __version__
from refsam.cli.frame_loop import exit_code
from refsam.cli.options import (
    ComputeOptions,
    MaskOptions,
    ModelChoice,
    QuietOption,
    ReadingOptions,
    grouped,
)
from refsam.cli.progress import progress
from refsam.cli.segment import check_expressions, load_model, make_graphs
from refsam.errors import UserError
from refsam.runtime.device import autocast, check_names, choose_device, precision_facts
from refsam.runtime.signals import defer_interrupts, termination_interrupts

if TYPE_CHECKING:
    from refsam.session import Shard, VideoOptions, VideoOutcome

app = typer.Typer(rich_markup_mode="markdown")


@app.command()
@grouped
def segment_videos(
    out: Annotated[Path, typer.Option(help="Folder for the results: a new one, or one with an earlier run to continue.")],
    model: ModelChoice,
    compute: ComputeOptions,
    masks: MaskOptions,
    reading: ReadingOptions,
    sources: Annotated[
        list[str] | None, typer.Argument(metavar="SOURCE...", help="Video files, folders of images or images.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Object to segment in every source that has no text in the list; repeat it for more."
        ),
    ] = None,
    listing: Annotated[
        Path | None,
        typer.Option(
            "--list",
            help="YAML or JSON list of more sources: paths, or {source: PATH, text: [...]}; relative to its folder.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Frames for each call of the image encoder, one from each video; by default 8 on a GPU, 1 on a CPU. "
            "1 gives each frame's masks soonest.",
        ),
    ] = None,
    quiet: QuietOption = False,
) -> None:  # fmt: skip
    """Segment many videos; run it again to continue.

    Writes `OUT/<name of the video>/` as `refsam segment` does. Finished videos are skipped. A source that cannot be
    read does not stop the others: it is named at the end, and the exit code is 2. Started by torchrun, processes and
    machines share the videos. Example:
    `torchrun --nproc-per-node 8 --no-python refsam segment-videos clips/*.mp4 --text "the dog" --out out`
    """
    check_names(compute.device, compute.dtype)
    videos, expressions = _all_sources(sources or [], text or [], listing)
    masks.check(max(map(len, expressions)))
    from refsam.session import Shard, VideoOptions

    options = VideoOptions(reading.to_read(), masks.format_names, masks.threshold)
    shard = Shard.from_environment()
    outcomes: list[VideoOutcome] = []
    total = len(videos) if shard.world_size == 1 else None
    with (
        termination_interrupts(),
        progress("segmenting", total, "videos", quiet=quiet) as advance,
    ):

        def note(outcome: "VideoOutcome") -> None:
            outcomes.append(outcome)
            if outcome.problem is not None:
                typer.echo(f"refsam: {outcome.problem}", err=True)
            elif outcome.is_busy and not quiet:
                typer.echo(
                    f"refsam: note: {outcome.source} is being done by another process", err=True
                )
            advance()

        try:
            _run(
                model,
                compute,
                videos,
                expressions,
                out,
                options,
                masks.overlay,
                batch_size,
                shard,
                note,
            )
        except KeyboardInterrupt as interrupt:
            words = str(interrupt) or "interrupted"
            typer.echo(
                f"refsam: {words}; {len(outcomes)} of the videos are done: the same command goes on",
                err=True,
            )
            raise typer.Exit(exit_code(interrupt)) from None
    _wait_for_the_others()
    _report(outcomes, out, quiet)


def _run(
    model: ModelChoice,
    compute: ComputeOptions,
    videos: list[str],
    expressions: list[list[str]],
    out: Path,
    options: "VideoOptions",
    overlay: bool,
    batch_size: int | None,
    shard: "Shard",
    note: Callable[["VideoOutcome"], None],
) -> None:
    """Load the model and segment this process's share of the videos."""
    from refsam.session import segment_videos

    place = choose_device(compute.device)
    loaded, precision = load_model(model, place, compute.dtype)
    facts = {
        "refsam": __version__,
        "model": model.checkpoint,
        **precision_facts(precision, loaded.image_encoder.product_dtype),
    }
    with autocast(place, precision), defer_interrupts() as heed:
        segment_videos(
            loaded,
            videos,
            expressions,
            out,
            batch_size=batch_size or (8 if place.type == "cuda" else 1),
            overlay=overlay,
            options=options,
            shard=shard,
            graphs=make_graphs(loaded) if compute.graphs else None,
            settings=facts,
            advance=note,
            heed=heed,
        )


def _wait_for_the_others() -> None:
    """Under torchrun, return when every process is done: it ends all of them as soon as one exits with an error."""
    from torch import distributed

    if distributed.is_torchelastic_launched():
        distributed.init_process_group("gloo", timeout=timedelta(days=365))
        distributed.barrier()
        distributed.destroy_process_group()


def _report(outcomes: list["VideoOutcome"], out: Path, quiet: bool) -> None:
    """Print what was done; raise UserError if a video could not be segmented."""
    before = sum(outcome.was_done for outcome in outcomes)
    wrong = sum(outcome.problem is not None for outcome in outcomes)
    frames = sum(outcome.frames for outcome in outcomes if not outcome.was_done)
    busy = sum(outcome.is_busy for outcome in outcomes)
    done = len(outcomes) - before - wrong - busy
    elsewhere = f", {busy} being done by another process" if busy else ""
    if not quiet:
        typer.echo(
            f"{done} videos segmented, {before} done before{elsewhere}, {frames} frames written: {out}"
        )
    if wrong:
        raise UserError(
            f"{wrong} of {len(outcomes)} videos could not be segmented to their end, as said above;"
            " the same command tries them again"
        )


def _all_sources(
    sources: list[str], text: list[str], listing: Path | None
) -> tuple[list[str], list[list[str]]]:
    """Every source and what to segment in it; raises UserError where either is missing."""
    entries = [(path, text) for source in sources for path in _expanded(source)]
    if listing is not None:
        entries += [_entry(entry, text, listing) for entry in _read_list(listing)]
    if not entries:
        raise UserError("no source: give videos, or a list of them with --list")
    for source, texts in entries:
        if not texts:
            raise UserError(f"{source}: nothing to segment; give --text 'the red car'")
        check_expressions(texts)
    videos, expressions = zip(*entries, strict=True)
    return list(videos), list(expressions)


def _expanded(source: str) -> list[str]:
    """Files that match a pattern the shell has not expanded; raises UserError if there are none."""
    from refsam.video.reader import is_pattern, matching

    if not source.strip():
        raise UserError("a source is empty: give videos, or a list of them with --list")
    if not is_pattern(source):
        return [source]
    found = matching(source)
    if not found:
        raise UserError(f"{source} matches no file: give videos, or a list of them with --list")
    return found


def _read_list(listing: Path) -> list[Any]:
    import yaml

    try:
        found = yaml.safe_load(listing.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{listing} does not exist: give a list of sources with --list") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{listing} cannot be read as YAML or JSON: {error}") from error
    if not isinstance(found, list) or not found:
        raise UserError(f"{listing}: got no list, want one of paths or of source and text")
    return found


def _entry(entry: Any, text: list[str], listing: Path) -> tuple[str, list[str]]:
    """An entry's source, relative to the list's folder, and its text."""
    if isinstance(entry, str):
        entry = {"source": entry}
    if not isinstance(entry, dict) or not {"source"} <= set(entry) <= {"source", "text"}:
        raise UserError(f"{listing}: got the entry {entry!r}, want a path or {{source: , text: }}")
    source, own = entry["source"], entry.get("text", text)
    own = [own] if isinstance(own, str) else own
    is_text = isinstance(own, list) and all(isinstance(line, str) for line in own)
    if not isinstance(source, str) or not source.strip() or not is_text:
        raise UserError(f"{listing}: got the entry {entry!r}, want strings in it")
    return (source if "://" in source else str(listing.parent / source)), own
