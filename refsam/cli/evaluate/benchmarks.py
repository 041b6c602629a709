"""``refsam evaluate ref-davis17``, ``ref-youtube-vos``, ``mevis``, ``refcoco``: run a model on a benchmark and score it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refsam.cli.evaluate.problems import listing_problems
from refsam.cli.options import DeviceOption, DtypeOption, ModelChoice, grouped
from refsam.cli.progress import progress
from refsam.errors import UserError
from refsam.runtime.device import check_names, choose_device, choose_dtype, choose_encoder_dtype

if TYPE_CHECKING:
    from refsam.data import ReferringDataset
    from refsam.evaluation.runners.benchmark import Benchmark
    from refsam.evaluation.runners.inference import InferenceRules

SplitOption = Annotated[
    str, typer.Option(help="The split to run; docs/data.md lists those of each dataset.")
]
VideosOption = Annotated[
    Path | None, typer.Option(help="Text file of the videos to run, one per line; all by default.")
]
ProcessesOption = Annotated[int, typer.Option(help="Processes that share the scoring; 0 means one per core.")]  # fmt: skip


@dataclass(frozen=True)
class RunOptions:
    """The dataset, where the results go, and how the model is run."""

    root: Annotated[Path, typer.Option(help="Folder of the dataset, laid out as docs/data.md says.")]  # fmt: skip
    out: Annotated[
        Path,
        typer.Option(help="Folder for predictions, scores and report; give that of an interrupted run to continue it."),
    ]  # fmt: skip
    inference: Annotated[
        str,
        typer.Option(help="How the model is run: default, or paper, as the authors do (360-pixel short side, thresholds)."),
    ] = "default"  # fmt: skip
    missing: Annotated[
        str,
        typer.Option(help="error: stop if the model cannot take an expression; zero: score it as empty, and list it."),
    ] = "error"  # fmt: skip
    device: DeviceOption = "auto"
    dtype: DtypeOption = "auto"

    @property
    def rules(self) -> "InferenceRules":
        """The rules of inference; raises UserError for an unknown name."""
        from refsam.evaluation.runners.inference import find_rules

        return find_rules(self.inference)

    def open(self, name: str, split: str, videos: Path | None) -> "ReferringDataset":
        """A split of the dataset, with the listed videos only."""
        from refsam.data import open_dataset
        from refsam.evaluation.scoring.clips import read_names

        dataset = open_dataset(name, self.root, split)
        if videos is None:
            return dataset
        names = set(read_names(videos))
        if unknown := sorted(names - {video.name for video in dataset.videos}):
            raise UserError(f"videos: not in {dataset.name} {dataset.split}: {', '.join(unknown)}")
        chosen = tuple(video for video in dataset.videos if video.name in names)
        return replace(dataset, videos=chosen)


_SHARED = "Started by torchrun, processes and machines share the {}; --out must be a folder that all of them see."


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """A command, whose help says how processes share its work."""
    items = "images" if function.__name__ == "refcoco" else "videos"
    function.__doc__ = f"{function.__doc__}\n\n    {_SHARED.format(items)}"
    return grouped(function)


@_command
def ref_davis17(
    run: RunOptions,
    model: ModelChoice,
    split: SplitOption = "valid",
    merge: Annotated[
        str | None,
        typer.Option(help="How objects share pixels: probabilities, or logits as the authors do; --inference sets the default."),
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(help="davis-unsupervised (default), davis-semi-supervised or per-expression; repeat it for several."),
    ] = None,
    videos: VideosOption = None,
    processes: ProcessesOption = 0,
) -> None:  # fmt: skip
    """Run a model on Ref-DAVIS17: each annotator's objects are joined into maps; the score is the mean of all annotators."""
    from refsam.evaluation.runners.inference import MERGE_NOTES
    from refsam.evaluation.runners.ref_davis17 import RefDavis17

    wanted = run.rules.merge if merge is None else merge
    if wanted not in MERGE_NOTES:
        raise UserError(f"merge: got {merge!r}, want {' or '.join(MERGE_NOTES)}")
    rule = next(rule for rule in MERGE_NOTES if rule == wanted)
    names = tuple(dict.fromkeys(protocol or ["davis-unsupervised"]))
    _run(RefDavis17(run.open("ref-davis17", split, videos), rule, names), run, model, processes)


def _per_expression(
    name: str, title: str, usual_split: str, folder: str, help_text: str
) -> Callable[..., None]:
    """The command of a dataset whose expressions are scored one by one; `folder` is where its server wants the masks."""

    def command(
        run: RunOptions,
        model: ModelChoice,
        split: SplitOption = usual_split,
        truth: Annotated[
            Path | None,
            typer.Option(help="Truth elsewhere: `<video>/<frame>.png`, `<video>/<expression>/<frame>.png` or mask_dict.json."),
        ] = None,
        truth_expressions: Annotated[
            Path | None,
            typer.Option(help="meta_expressions.json that says which objects of that truth each expression means."),
        ] = None,
        videos: VideosOption = None,
        processes: ProcessesOption = 0,
    ) -> None:  # fmt: skip
        from refsam.evaluation.runners.per_expression import PerExpression

        dataset = run.open(name, split, videos)
        places = _truth(dataset, truth, truth_expressions)
        _run(PerExpression(f"{title} {split}", dataset, folder, *places), run, model, processes)

    command.__name__, command.__doc__ = name.replace("-", "_"), help_text
    return _command(command)


ref_youtube_vos = _per_expression(
    "ref-youtube-vos",
    "Ref-YouTube-VOS",
    "valid",
    "Annotations",
    "Run a model on Ref-YouTube-VOS: writes submission.zip, and scores where the truth is at hand.",
)
mevis = _per_expression(
    "mevis",
    "MeViS",
    "valid_u",
    "",
    "Run a model on MeViS: writes submission.zip, and scores splits with truth (valid_u, train).",
)


@_command
def refcoco(
    run: RunOptions,
    model: ModelChoice,
    dataset: Annotated[str, typer.Option(help="refcoco, refcoco+ or refcocog.")] = "refcoco",
    split_by: Annotated[
        str | None, typer.Option(help="Who divided the dataset: unc, umd or google; its usual one by default.")
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(help="Split to run, all evaluation splits by default; repeat it for several."),
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(help="How scores are computed from IoUs: referformer (default), sa2va or lavt; repeat it for several."),
    ] = None,
) -> None:  # fmt: skip
    """Run a model on RefCOCO, RefCOCO+ or RefCOCOg: oIoU, mIoU and P@0.5 to 0.9 of each split."""
    from refsam.data import open_dataset
    from refsam.data.refcoco import SPLITS_BY
    from refsam.evaluation.runners.refcoco import RefCoco

    if dataset not in SPLITS_BY:
        raise UserError(f"dataset: got {dataset!r}, want one of {', '.join(SPLITS_BY)}")
    by = SPLITS_BY[dataset]
    usual = by.get(split_by or next(iter(by)), ("train",))[1:]  # open_dataset refuses a wrong one
    opened = [
        open_dataset(dataset, run.root, name, split_by=split_by)
        for name in dict.fromkeys(split or usual or ("val",))
    ]
    names = tuple(dict.fromkeys(protocol or ["referformer"]))
    _run(RefCoco(tuple(opened), names), run, model, 1)


@_command
def long_rvos(
    run: RunOptions, model: ModelChoice, split: SplitOption = "valid", videos: VideosOption = None
) -> None:
    """Run a model on Long-RVOS, videos of a minute: J, F, tIoU and vIoU of all expressions and of each type.

    Memory does not grow with a video's length.
    """
    from refsam.evaluation.runners.long_rvos import LongRvos

    dataset = run.open("long-rvos", split, videos)
    _run(LongRvos(f"Long-RVOS {split}", dataset, None, dataset.truth), run, model, 1)


@_command
def folder(
    run: RunOptions,
    model: ModelChoice,
    split: SplitOption = "validation",
    videos: VideosOption = None,
    processes: ProcessesOption = 0,
) -> None:
    """Run a model on your own videos and score it, each expression by itself, in the frames that have a mask."""
    from refsam.evaluation.runners.per_expression import PerExpression

    dataset = run.open("folder", split, videos)
    name = f"{run.root} {split}"
    _run(PerExpression(name, dataset, None, dataset.truth), run, model, processes)


def _truth(
    dataset: "ReferringDataset", truth: Path | None, expressions: Path | None
) -> tuple[Path | None, Path | None]:
    """The truth and the list of its expressions' objects, the dataset's own unless others are given."""
    if expressions is not None and truth is None:
        raise UserError("truth-expressions: got it without --truth, want both")
    if truth is None:
        every = [e for video in dataset.videos for e in dataset.expressions(video.name)]
        told = all(expression.object_ids is not None for expression in every)
        return dataset.truth, dataset.listing if told else None
    if not truth.exists():
        raise UserError(f"truth: there is no {truth}")
    if truth.is_file() and expressions is None:
        expressions = dataset.listing
    return truth, expressions


def _run(benchmark: "Benchmark", run: RunOptions, choice: ModelChoice, processes: int) -> None:
    """Load the model, predict and score; print what was found."""
    from refsam.evaluation.runners.benchmark import Runner, evaluate, shard_of
    from refsam.runtime.threads import available_cores
    from refsam.session import Shard

    check_names(run.device, run.dtype)
    if run.missing not in ("error", "zero"):
        raise UserError(f"missing: got {run.missing!r}, want error or zero")
    rules, shard, place = run.rules, Shard.from_environment(), choose_device(run.device)
    model = choice.load().to(place)
    model.optimize(choose_encoder_dtype(run.dtype))
    precision = choose_dtype(run.dtype, place)
    runner = Runner(model, choice.checkpoint, rules, precision, run.missing)
    count, cores = len(shard_of(benchmark, shard)), processes or available_cores()
    with listing_problems(), progress("evaluating", count, "videos") as advance:
        outcome = evaluate(
            benchmark, runner, run.out, shard=shard, processes=cores, advance=advance
        )
    if outcome is None:
        typer.echo(f"process {shard.rank} of {shard.world_size}: done; others are still at work")
        return
    typer.echo(outcome.text)
    typer.echo(f"\nreport: {run.out / 'report.html'}")
