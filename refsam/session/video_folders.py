"""Assigns a folder to each of many videos, and reads the results of an earlier run.

``videos.json`` in the output folder maps folders to sources. A later run with more videos gives each the folder it had.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refsam.errors import UserError, differences
from refsam.runtime.files import only_writer, replace_file

FOLDERS = "videos.json"
Source = str | os.PathLike[str]


@dataclass(frozen=True)
class VideoJob:
    """A video, what to segment in it, and where its results go."""

    source: str
    expressions: tuple[str, ...]
    folder: Path


def make_jobs(
    videos: Sequence[Source], expressions: Sequence[str] | Sequence[Sequence[str]]
) -> list[tuple[str, tuple[str, ...]]]:
    """Each video with its expressions; raises ValueError where they do not fit."""
    sources = [os.fspath(video) for video in videos]
    if isinstance(expressions, str) or not expressions:
        raise ValueError(f"expressions: got {expressions!r}, want a list of strings")
    if all(isinstance(texts, str) for texts in expressions):
        lists = [tuple(map(str, expressions))] * len(sources)
    else:
        lists = [tuple(texts) for texts in expressions]
    if len(lists) != len(sources):
        raise ValueError(
            f"expressions: got {len(lists)} lists, want {len(sources)}, one for each video"
        )
    return list(zip(sources, lists, strict=True))


def assign_folders(pairs: Sequence[tuple[str, tuple[str, ...]]], out: Path) -> list[VideoJob]:
    """Give each video a folder of its own, and write the map; several processes may do so at a time.

    Raises UserError: `out` cannot be written, or its map is damaged.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror}): give another folder"
        ) from error
    file = out / FOLDERS
    with only_writer(file, wait=True):
        known = _read(file)
        folders = _choose([source for source, _ in pairs], known)
        entries = [{"folder": folder, "source": source} for folder, source in known.items()]
        content = json.dumps({"videos": entries}, indent=1, ensure_ascii=False) + "\n"
        replace_file(file, content.encode("utf-8", "backslashreplace"))
    file.with_name(f".{file.name}.lock").unlink(missing_ok=True)
    return [
        VideoJob(source, texts, out / folder)
        for (source, texts), folder in zip(pairs, folders, strict=True)
    ]


def _read(file: Path) -> dict[str, str]:
    """The source of each folder that is already assigned."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["videos"]
        return {str(entry["folder"]): str(entry["source"]) for entry in entries}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}): give another folder with --out") from error


def _choose(sources: Sequence[str], known: dict[str, str]) -> list[str]:
    """A folder for each source; `known` gets the new ones."""
    taken = {folder.casefold() for folder in known}  # some disks do not tell A from a
    had: dict[str, list[str]] = {}
    for folder, source in known.items():
        had.setdefault(source, []).append(folder)
    seen: Counter[str] = Counter()
    folders = []
    for source in sources:
        place = source if "://" in source else os.path.abspath(source)
        number = seen[place]
        seen[place] += 1
        if number == len(had.setdefault(place, [])):
            folder = _unique(_stem(source), taken)
            taken.add(folder.casefold())
            had[place].append(folder)
            known[folder] = place
        folders.append(had[place][number])
    return folders


def _unique(name: str, taken: set[str]) -> str:
    candidate, number = name, 1
    while candidate.casefold() in taken or candidate == FOLDERS:
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def _stem(source: str) -> str:
    """A video's name without its suffix, or a folder's whole name; forbidden characters are replaced."""
    path = Path(source)
    name = path.name if os.path.isdir(source) else path.stem
    return re.sub(r"[^\w.-]+", "-", name).lstrip(".") or "video"


def finished(job: VideoJob, settings: dict[str, Any], *, tidy: bool) -> int | None:
    """Number of frames of an earlier run that finished; None if there was none.

    Args:
        job: the video.
        settings: the settings that it must have had.
        tidy: first finish or remove what a killed run left, unless another process works there.

    Raises:
        UserError: its settings were others.
    """
    from refsam.video import run_folder

    if tidy:
        run_folder.tidy(job.folder)
    file = job.folder / run_folder.RESULT
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        found = report | {"text": [expression["text"] for expression in report["expressions"]]}
        complete, frames = report["complete"], report["frames"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no result of refsam: give another folder with --out") from error
    wanted = {"text": [*job.expressions], "source": job.source, **settings}
    if different := differences(found, wanted):
        raise UserError(
            f"{job.folder} holds results of other settings: {'; '.join(different)}; give another folder with --out"
        )
    return frames if complete else None
