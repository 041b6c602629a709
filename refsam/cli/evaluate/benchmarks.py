"""``refsam evaluate ref-davis17``, ``ref-youtube-vos``, ``mevis``, ``refcoco``: run a model on a benchmark and score it."""

from collections.abc import Callable
from dataclasses import replace
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

RootOption = Annotated[Path, typer.Option(help="Folder of the dataset, laid out as docs/data.md says.")]  # fmt: skip
RunFolderOption = Annotated[
    Path,
    typer.Option(
        help="Folder for predictions, scores and report; give that of an interrupted run to continue it."
    ),
]
InferenceOption = Annotated[
    str,
    typer.Option(
        help="How the model is run: default, or paper, the authors' known choices (360-pixel short side, thresholds)."
    ),
]
VideosOption = Annotated[
    Path | None, typer.Option(help="Text file of the videos to run, one a line; all by default.")
]
TruthOption = Annotated[
    Path | None,
    typer.Option(help="Truth that lies elsewhere: <video>/<frame>.png, <video>/<expression>/<frame>.png, mask_dict.json."),
]  # fmt: skip
TruthExpressionsOption = Annotated[
    Path | None,
    typer.Option(
        help="meta_expressions.json that says which objects of that truth each expression means."
    ),
]
MissingOption = Annotated[
    str,
    typer.Option(help="error: stop where the model cannot take an expression; zero: score it as empty, and list it."),
]  # fmt: skip
ProcessesOption = Annotated[
    int, typer.Option(help="Processes that share the scoring; 0 is one per core.")
]


@grouped
def ref_davis17(
    root: RootOption,
    out: RunFolderOption,
    model: ModelChoice,
    split: str = "valid",
    inference: InferenceOption = "default",
    merge: Annotated[
        str | None,
        typer.Option(
            help="How objects share pixels: probabilities, or logits, the authors' rule; by default that of --inference."
        ),
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(
            help="How it is scored: davis-unsupervised (default), davis-semi-supervised, per-expression; repeat it for several."
        ),
    ] = None,
    videos: VideosOption = None,
    missing: MissingOption = "error",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    processes: ProcessesOption = 0,
) -> None:
    """Run a model on Ref-DAVIS17: each of the four annotators by itself, objects joined into maps, the mean of four scores.

    Started by torchrun, processes and machines share the videos; --out must be a folder that all of them see.
    """
    from refsam.data import open_dataset
    from refsam.evaluation.runners.inference import MERGE_NOTES, find_rules
    from refsam.evaluation.runners.ref_davis17 import RefDavis17

    rules = find_rules(inference)
    if merge is not None and merge not in MERGE_NOTES:
        raise UserError(f"merge: got {merge!r}, want {' or '.join(MERGE_NOTES)}")
    dataset = _chosen(open_dataset("ref-davis17", root, split), videos)
    chosen = next(rule for rule in MERGE_NOTES if rule == (merge or rules.merge))
    names = tuple(dict.fromkeys(protocol or ["davis-unsupervised"]))
    benchmark = RefDavis17(dataset, chosen, names)
    _run(benchmark, rules, out, model, device, dtype, missing, processes)


_SHARED = "Started by torchrun, processes and machines share the videos; --out must be a folder that all of them see."


def _per_expression(
    name: str, title: str, usual_split: str, folder: str, help_text: str
) -> Callable[..., None]:
    """The command of a dataset whose expressions are scored one by one; `folder` is where its server wants the masks."""

    @grouped
    def command(
        root: RootOption,
        out: RunFolderOption,
        model: ModelChoice,
        split: str = usual_split,
        inference: InferenceOption = "default",
        truth: TruthOption = None,
        truth_expressions: TruthExpressionsOption = None,
        videos: VideosOption = None,
        missing: MissingOption = "error",
        device: DeviceOption = "auto",
        dtype: DtypeOption = "auto",
        processes: ProcessesOption = 0,
    ) -> None:
        from refsam.data import open_dataset
        from refsam.evaluation.runners.inference import find_rules
        from refsam.evaluation.runners.per_expression import PerExpression

        dataset = _chosen(open_dataset(name, root, split), videos)
        places = _truth(dataset, truth, truth_expressions)
        benchmark = PerExpression(f"{title} {split}", dataset, folder, *places)
        _run(benchmark, find_rules(inference), out, model, device, dtype, missing, processes)

    command.__name__ = name.replace("-", "_")
    command.__doc__ = f"{help_text}\n\n    {_SHARED}"
    return command


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


@grouped
def refcoco(
    root: RootOption,
    out: RunFolderOption,
    model: ModelChoice,
    dataset: Annotated[str, typer.Option(help="refcoco, refcoco+ or refcocog.")] = "refcoco",
    split_by: Annotated[
        str | None, typer.Option(help="unc, umd or google; the dataset's usual one by default.")
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(help="Repeat it for several; all evaluation splits by default."),
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(
            help="How scores are made of IoUs: referformer (default), sa2va or lavt; repeat it for several."
        ),
    ] = None,
    inference: InferenceOption = "default",
    missing: MissingOption = "error",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Run a model on RefCOCO, RefCOCO+ or RefCOCOg: oIoU, mIoU and P@0.5 to 0.9 of each split.

    Started by torchrun, processes and machines share the images; --out must be a folder that all of them see.
    """
    from refsam.data import open_dataset
    from refsam.data.refcoco import SPLITS_BY
    from refsam.evaluation.runners.inference import find_rules
    from refsam.evaluation.runners.refcoco import RefCoco

    rules = find_rules(inference)
    if dataset not in SPLITS_BY:
        raise UserError(f"dataset: got {dataset!r}, want one of {', '.join(SPLITS_BY)}")
    by = SPLITS_BY[dataset]
    usual = by.get(split_by or next(iter(by)), ("train",))[1:]  # open_dataset refuses a wrong one
    opened = [
        open_dataset(dataset, root, name, split_by=split_by)
        for name in dict.fromkeys(split or usual or ("val",))
    ]
    benchmark = RefCoco(tuple(opened), tuple(dict.fromkeys(protocol or ["referformer"])))
    _run(benchmark, rules, out, model, device, dtype, missing, 1)


@grouped
def long_rvos(
    root: RootOption,
    out: RunFolderOption,
    model: ModelChoice,
    split: str = "valid",
    inference: InferenceOption = "default",
    videos: VideosOption = None,
    missing: MissingOption = "error",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Run a model on Long-RVOS, videos of a minute: J, F, tIoU and vIoU of all sentences and of each type.

    Memory does not grow with a video's length. Started by torchrun, processes and machines share the videos; --out must be a
    folder that all of them see.
    """
    from refsam.data import open_dataset
    from refsam.evaluation.runners.inference import find_rules
    from refsam.evaluation.runners.long_rvos import LongRvos

    dataset = _chosen(open_dataset("long-rvos", root, split), videos)
    benchmark = LongRvos(f"Long-RVOS {split}", dataset, None, dataset.truth)
    _run(benchmark, find_rules(inference), out, model, device, dtype, missing, 1)


@grouped
def folder(
    root: RootOption,
    out: RunFolderOption,
    model: ModelChoice,
    split: str = "validation",
    inference: InferenceOption = "default",
    videos: VideosOption = None,
    missing: MissingOption = "error",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    processes: ProcessesOption = 0,
) -> None:
    """Run a model on your own videos and score it, each expression by itself, in the frames that have a mask.

    Started by torchrun, processes and machines share the videos; --out must be a folder that all of them see.
    """
    from refsam.data import open_dataset
    from refsam.evaluation.runners.inference import find_rules
    from refsam.evaluation.runners.per_expression import PerExpression

    dataset = _chosen(open_dataset("folder", root, split), videos)
    benchmark = PerExpression(f"{root} {split}", dataset, None, dataset.truth)
    _run(benchmark, find_rules(inference), out, model, device, dtype, missing, processes)


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


def _chosen(dataset: "ReferringDataset", videos: Path | None) -> "ReferringDataset":
    """The dataset with the listed videos only."""
    from refsam.evaluation.scoring.clips import read_names

    if videos is None:
        return dataset
    names = read_names(videos)
    known = {video.name for video in dataset.videos}
    if unknown := sorted(set(names) - known):
        raise UserError(f"videos: not in {dataset.name} {dataset.split}: {', '.join(unknown)}")
    chosen = tuple(video for video in dataset.videos if video.name in set(names))
    return replace(dataset, videos=chosen)


def _run(
    benchmark: "Benchmark",
    rules: "InferenceRules",
    out: Path,
    choice: ModelChoice,
    device: str,
    dtype: str,
    missing: str,
    processes: int,
) -> None:
    """Load the model, predict and score; print what was found."""
    from refsam.evaluation.runners.benchmark import Runner, evaluate, shard_of
    from refsam.runtime.threads import available_cores
    from refsam.session import Shard

    check_names(device, dtype)
    if missing not in ("error", "zero"):
        raise UserError(f"missing: got {missing!r}, want error or zero")
    shard = Shard.from_environment()
    place = choose_device(device)
    model = choice.load().to(place)
    model.optimize(choose_encoder_dtype(dtype))
    runner = Runner(model, choice.checkpoint, rules, choose_dtype(dtype, place), missing)
    with (
        listing_problems(),
        progress("evaluating", len(shard_of(benchmark, shard)), "videos") as advance,
    ):
        outcome = evaluate(
            benchmark,
            runner,
            out,
            shard=shard,
            processes=processes or available_cores(),
            advance=advance,
        )
    if outcome is None:
        typer.echo(f"process {shard.rank} of {shard.world_size}: done; others are still at work")
        return
    typer.echo(outcome.text)
    typer.echo(f"\nreport: {out / 'report.html'}")
