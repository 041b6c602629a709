"""Pair the files of predictions with those of the truth."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refsam.errors import UserError
from refsam.evaluation.scoring.problems import Problem
from refsam.evaluation.scoring.protocols import Protocol


@dataclass(frozen=True)
class RunLengths:
    """A mask of `size` (height, width) as the union of COCO run-length codes, none of them if it is empty.

    `size` is None if no expression of the video means an object: then the prediction's size is used.
    """

    size: tuple[int, int] | None
    codes: tuple[Mapping[str, Any], ...]


Truth = Path | RunLengths


@dataclass(frozen=True)
class Clip:
    """One unit of scoring: the frames of a video, or of one expression of it.

    `frames` names the frames that are scored; `truths` and `predictions` stand beside them, None where the prediction is
    missing. `unscored` names the frames that the protocol leaves out, `first_truth` is the truth of the video's first frame,
    scored or not. `object_ids`: the truth's pixel values that make up the object, None if the truth is binary or a map of
    object numbers.
    """

    video: str
    expression: str | None
    frames: tuple[str, ...]
    truths: tuple[Truth, ...]
    predictions: tuple[Path | None, ...]
    first_truth: Truth
    unscored: tuple[str, ...] = ()
    object_ids: frozenset[int] | None = None

    @property
    def name(self) -> str:
        """The video, or video/expression."""
        return self.video if self.expression is None else f"{self.video}/{self.expression}"


@dataclass(frozen=True)
class Layout:
    """The clips to score, what is wrong with the folders, and notes on what is not scored."""

    clips: tuple[Clip, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


def find_clips(
    predictions: Path,
    truth: Path,
    protocol: Protocol,
    *,
    videos: Collection[str] | None = None,
    expressions: Path | None = None,
) -> Layout:
    """Pair the files of two folders `<video>/<frame>.png` or, per expression, `<video>/<expression>/<frame>.png`.

    Per expression the truth may instead be `<video>/<frame>.png` or the file `mask_dict.json` of MeViS, if `expressions` is the
    `meta_expressions.json` that names each expression's objects. `videos` restricts all this to some videos.
    Raises UserError if there is no truth, or if it does not fit the protocol.
    """
    if not predictions.is_dir():
        raise UserError(f"prediction: no folder {predictions}")
    if expressions is not None and not protocol.per_expression:
        raise UserError(f"expressions: {protocol.name} has none, want --protocol per-expression")
    notes: list[str] = []
    clips = _true_clips(truth, protocol, expressions, notes)
    if videos is not None:
        known = {clip.video for clip in clips}
        if unknown := sorted(set(videos) - known):
            raise UserError(f"videos: not in the truth: {', '.join(unknown)}")
        clips = [clip for clip in clips if clip.video in videos]
    finder = _PredictionFinder(predictions, protocol, videos)
    paired = tuple(finder.pair(clips))
    return Layout(paired, tuple(finder.problems), (*notes, *finder.notes))


def read_names(path: Path) -> list[str]:
    """The names in a text file, one per line, such as DAVIS' `val.txt`; raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"videos: {path} cannot be read as text: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def _true_clips(
    truth: Path, protocol: Protocol, expressions: Path | None, notes: list[str]
) -> list[Clip]:
    if expressions is not None:
        clips = list(_listed_clips(truth, expressions, notes))
    elif not truth.is_dir():
        raise UserError(f"truth: no folder {truth}")
    else:
        clips = list(_folder_clips(truth, protocol))
    if not clips:
        raise UserError(f"truth: no videos in {truth}, want {_wanted_layout(protocol)}")
    return clips


def _wanted_layout(protocol: Protocol) -> str:
    return "<video>/<expression>/<frame>.png" if protocol.per_expression else "<video>/<frame>.png"


def _folder_clips(truth: Path, protocol: Protocol) -> Iterable[Clip]:
    """Clips of a folder of PNGs, each video with its expressions where the protocol has them."""
    for video in _folders(truth):
        folders = _folders(video) if protocol.per_expression else [video]
        for folder in folders or [video]:
            frames = _frames(folder)
            if not folders or not frames:
                hint = "; --expressions says which objects each expression means" if frames else ""
                raise UserError(
                    f"truth: no masks in {folder}, want {_wanted_layout(protocol)}{hint}"
                )
            yield _clip(
                video.name, folder.name if protocol.per_expression else None, frames, protocol
            )


def _clip(
    video: str, expression: str | None, truths: Mapping[str, Truth], protocol: Protocol
) -> Clip:
    frames = tuple(truths)
    scored = frames[1:-1] if protocol.inner_frames else frames
    if not scored:
        raise UserError(
            f"truth: {video} has {len(frames)} frames, {protocol.name} needs at least 3"
        )
    return Clip(
        video=video,
        expression=expression,
        frames=scored,
        truths=tuple(truths[frame] for frame in scored),
        predictions=(),
        first_truth=truths[frames[0]],
        unscored=(frames[0], frames[-1]) if protocol.inner_frames else (),
    )


def _listed_clips(truth: Path, expressions: Path, notes: list[str]) -> Iterable[Clip]:
    """Clips of the expressions that a `meta_expressions.json` lists (Ref-YouTube-VOS, MeViS)."""
    listed = _read_json(expressions).get("videos")
    if not isinstance(listed, dict):
        raise UserError(
            f"expressions: {expressions} is no meta_expressions.json, want an entry 'videos'"
        )
    codes = _read_json(truth) if truth.is_file() else None
    # The validation list of Ref-YouTube-VOS names the test videos too.
    without_truth = [
        video for video in sorted(listed) if codes is None and not (truth / video).is_dir()
    ]
    if without_truth:
        notes.append(
            f"not scored, as the truth lacks these listed videos: {', '.join(without_truth)}"
        )
    for video in sorted(set(listed) - set(without_truth)):
        try:
            yield from _listed_expressions(truth, codes, video, listed[video])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            message = f"expressions: {video} in {expressions} does not fit the truth {truth}"
            raise UserError(f"{message}: {error!r}") from error


def _listed_expressions(
    truth: Path, codes: Mapping[str, Any] | None, video: str, entry: Mapping[str, Any]
) -> Iterable[Clip]:
    size, ids = None if codes is None else _coded_size(codes, entry), None
    for number, expression in entry["expressions"].items():
        truths: Mapping[str, Truth]
        if codes is None:
            ids, truths = _object_pngs(truth / video, entry["frames"], expression)
        else:
            truths = _object_codes(codes, size, entry["frames"], expression)
        names = tuple(sorted(truths))
        ordered = tuple(truths[name] for name in names)
        yield Clip(video, number, names, ordered, (), ordered[0], object_ids=ids)


def _object_pngs(
    folder: Path, frames: Sequence[str], expression: Mapping[str, Any]
) -> tuple[frozenset[int], dict[str, Path]]:
    """Object numbers of an expression, and the maps that hold them."""
    wanted = expression["obj_id"]
    wanted = wanted if isinstance(wanted, list) else [wanted]
    files = _frames(folder)
    if lost := sorted(set(frames) - set(files)):
        raise UserError(f"truth: {folder} lacks the listed frames {', '.join(lost)}")
    return frozenset(int(number) for number in wanted), {frame: files[frame] for frame in frames}


def _object_codes(
    codes: Mapping[str, Any],
    size: tuple[int, int] | None,
    frames: Sequence[str],
    expression: Mapping[str, Any],
) -> dict[str, RunLengths]:
    """Run-length codes of an expression's objects: `mask_dict` lists them by position in `frames`, null for none."""
    tracks = [codes[str(number)] for number in expression["anno_id"]]
    return {
        frame: RunLengths(size, tuple(track[i] for track in tracks if track[i] is not None))
        for i, frame in enumerate(frames)
    }


def _coded_size(codes: Mapping[str, Any], video: Mapping[str, Any]) -> tuple[int, int] | None:
    """The size of a video's masks, from the first one of any of its expressions that is not null; None where all are."""
    for expression in video["expressions"].values():
        for number in expression.get("anno_id", ()):
            for code in codes.get(str(number), ()):
                if code is not None:
                    height, width = code["size"]
                    return height, width
    return None


class _PredictionFinder:
    """Finds the prediction of every frame and notes all that is missing or not used."""

    def __init__(self, root: Path, protocol: Protocol, videos: Collection[str] | None) -> None:
        self.root = root
        self.protocol = protocol
        self.videos = videos
        self.problems: list[Problem] = []
        self.notes: list[str] = []

    def pair(self, clips: Sequence[Clip]) -> Iterable[Clip]:
        """The clips with their predictions; `problems` and `notes` are complete when all are drawn."""
        found = {folder.name for folder in _folders(self.root)}
        expected = dict.fromkeys(clip.video for clip in clips)
        missing = [video for video in expected if video not in found]
        self.problems += [Problem("video missing", "", video) for video in missing]
        for extra in sorted(found - set(expected)):
            if self.videos is None:
                self.problems.append(Problem("video extra", "", extra))
        self._note_other_files(self.root)
        for video in expected:
            of_video = [clip for clip in clips if clip.video == video]
            if video in found and self.protocol.per_expression:
                self._compare_expressions(video, of_video)
            for clip in of_video:
                yield self._with_predictions(clip)

    def _compare_expressions(self, video: str, clips: Sequence[Clip]) -> None:
        found = {folder.name for folder in _folders(self.root / video)}
        expected = {clip.expression for clip in clips if clip.expression is not None}
        for kind, names in (("missing", expected - found), ("extra", found - expected)):
            self.problems += [Problem(f"expression {kind}", video, name) for name in sorted(names)]
        self._note_other_files(self.root / video, pngs_too=True)

    def _with_predictions(self, clip: Clip) -> Clip:
        folder = self.root / clip.name
        if not folder.is_dir():
            return replace(clip, predictions=(None,) * len(clip.frames))
        files = _frames(folder)
        self._note_other_files(folder)
        missing = [frame for frame in clip.frames if frame not in files]
        self.problems += [Problem("frame missing", clip.name, frame) for frame in missing]
        extra = sorted(set(files) - set(clip.frames) - set(clip.unscored))
        self.problems += [Problem("frame extra", clip.name, frame) for frame in extra]
        return replace(clip, predictions=tuple(files.get(frame) for frame in clip.frames))

    def _note_other_files(self, folder: Path, pngs_too: bool = False) -> None:
        others = [
            path.name
            for path in visible(folder)
            if path.is_file() and (pngs_too or path.suffix.lower() != ".png")
        ]
        if others:
            self.notes.append(f"ignored in {folder}: {', '.join(others)}")


def visible(folder: Path) -> list[Path]:
    """The entries of a folder, sorted, without hidden ones."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _folders(root: Path) -> list[Path]:
    return [path for path in visible(root) if path.is_dir()]


def _frames(folder: Path) -> dict[str, Path]:
    """The PNGs of a folder by name, sorted."""
    return {path.stem: path for path in visible(folder) if path.suffix.lower() == ".png"}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: got a JSON {type(content).__name__}, want an object")
    return content
