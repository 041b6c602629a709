"""The folder of a run: locked, written under a hidden name, and then moved into place completely or not at all.

Only files that an earlier run recorded in its ``result.json`` are ever replaced or removed; all other files in the folder
belong to the user.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from refsam.errors import UserError
from refsam.runtime.files import BusyError, only_writer
from refsam.video.mask_formats import files_of

RESULT = "result.json"  # the last file that comes into place: it says that the others are there
RESUME = ".refsam-resume.safetensors"
_STAGING = ".refsam-unfinished-"
_COMMIT, _PLACING = "commit.json", "placing.json"  # the plan; its name once its first half is done
_LOCK = "refsam"
_OURS = re.compile(
    r"result\.json|overlay\.mp4|masks\.json|(masks|cutouts)/\d+/\d+\.png|palette/\d+\.png"
)


class RunFolder:
    """A run's output: files are written to `new`, a hidden folder, and `commit` moves them into `out`.

    Args:
        out: the folder to make; its missing parents are made too. An empty one may be there.
        overwrite: replace what an earlier run recorded.
        resume: add to what an earlier run recorded.

    Raises:
        UserError: `out` holds something that must not be replaced, or cannot be written.
        BusyError: another process writes into it.
    """

    def __init__(self, out: Path, *, overwrite: bool = False, resume: bool = False) -> None:
        self.out = out
        check_output(out, overwrite=overwrite or resume)
        self._made = _make_folders(out)
        self._held = ExitStack()
        self._held.enter_context(only_writer(out / _LOCK, wait=False))
        try:
            recover(out)
            check_output(out, overwrite=overwrite or resume)
            self.earlier = read_result(out) if resume else None
            self._replaced = recorded_files(out) if overwrite else set()
            self.staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=out))
            self.new = self.staging / "new"
            self.new.mkdir()
        except OSError as error:
            self._let_go()
            raise _not_writable(out, error) from error
        except UserError:
            self._let_go()
            raise
        self.is_open = True

    def commit(self, moved: dict[str, str] | None = None) -> None:
        """Move everything into place. If this process is killed meanwhile, a later run finishes it.

        Args:
            moved: files of the earlier run and their new names.
        """
        if self.earlier is not None:
            common = {RESULT, RESUME, "overlay.mp4", "masks.json"}
            self._replaced = common & recorded_files(self.out)
        plan = {"remove": sorted(self._replaced), "move": moved or {}}
        draft = self.staging / f"{_COMMIT}.draft"
        draft.write_text(json.dumps(plan))
        draft.rename(self.staging / _COMMIT)
        _carry_out(self.staging, self.out)
        self.is_open = False
        self._let_go()

    def discard(self) -> None:
        """Remove the written files and the folders that were made for them."""
        self.is_open = False
        shutil.rmtree(self.staging, ignore_errors=True)
        self._let_go()

    def _let_go(self) -> None:
        (self.out / f".{_LOCK}.lock").unlink(missing_ok=True)
        self._held.close()
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:  # it holds something
                return


def check_output(
    out: str | os.PathLike[str], *, overwrite: bool, source: str | None = None
) -> None:
    """Refuse an output folder before any work is done.

    Args:
        out: the folder.
        overwrite: whether results of an earlier run in it may be replaced.
        source: what is read, which must not lie in it.

    Raises:
        UserError: it exists and holds something while `overwrite` is False, is no folder, holds files where results would come
            that no run recorded, or holds the source.
    """
    out, other = Path(out), "give another folder with --out"
    if source is not None and out.exists() and _lies_in(source, out):
        raise UserError(f"{source} lies in {out}, where the results would come: {other}")
    try:
        if os.path.lexists(out) and not out.is_dir():
            raise UserError(f"{out} exists and is no folder: give another one with --out")
        there = [path for path in out.iterdir() if not _is_own(path.name)] if out.is_dir() else []
    except OSError as error:
        raise _not_writable(out, error) from error
    if not there:
        return
    if not overwrite:
        raise UserError(
            f"{out} exists: give a new folder with --out, or --overwrite to replace its results"
        )
    recorded = recorded_files(out)
    foreign = next((name for name in _results_in(out) if name not in recorded), None)
    if foreign is not None:
        raise UserError(
            f"{out / foreign} is not recorded as a result of refsam and would be replaced: {other}"
        )


def read_result(out: Path) -> dict[str, Any] | None:
    """Read an earlier run's ``result.json``; None if there is no valid one."""
    try:
        report = json.loads((out / RESULT).read_text(encoding="utf-8"))
        usable = isinstance(report["expressions"], list) and isinstance(report["frames"], int)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return report if usable else None


def recorded_files(out: Path) -> set[str]:
    """Names, relative to the folder, of all files that an earlier run recorded there."""
    report = read_result(out)
    if report is None:
        return set()
    names = {RESULT, RESUME, "overlay.mp4"}
    return {name for name in (*names, *files_of(report)) if (out / name).is_file()}


def tidy(out: Path) -> None:
    """`recover` the folder, as the next run in it would, unless another process is at work there."""
    if out.is_dir() and any(_is_own(path.name) for path in out.iterdir()):
        with suppress(BusyError):
            with only_writer(out / _LOCK, wait=False):
                recover(out)
            (out / f".{_LOCK}.lock").unlink(missing_ok=True)


def recover(out: Path) -> None:
    """Finish moving the results of a killed run into place, and remove the unfinished files of others.

    The caller holds the folder's lock, or knows that nobody writes there.
    """
    for path in out.iterdir():
        if path.name.startswith(_STAGING):
            if (path / _COMMIT).exists() or (path / _PLACING).exists():
                _carry_out(path, out)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _carry_out(staging: Path, out: Path) -> None:
    """Remove old files, then move new ones into place; after an interruption either half can be repeated."""
    if (staging / _COMMIT).exists():
        plan = json.loads((staging / _COMMIT).read_text())
        for name in plan["remove"]:
            (out / name).unlink(missing_ok=True)
        _remove_empty({(out / name).parent for name in plan["remove"]}, out)
        for old, new in plan["move"].items():
            if (out / old).exists():
                os.replace(out / old, out / new)
        (staging / _COMMIT).rename(staging / _PLACING)
    for path in sorted((staging / "new").iterdir(), key=lambda path: path.name == RESULT):
        _merge(path, out / path.name)
    shutil.rmtree(staging)


def _merge(source: Path, target: Path) -> None:
    if source.is_dir() and target.is_dir():
        for path in source.iterdir():
            _merge(path, target / path.name)
    else:
        os.replace(source, target)


def _remove_empty(folders: Iterable[Path], out: Path) -> None:
    """Remove folders, and those above them, that hold nothing any more."""
    for folder in sorted(folders, key=lambda path: -len(path.parts)):
        while folder != out and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent


def _results_in(out: Path) -> Iterator[str]:
    """Files whose names are those of results."""
    for pattern in ("*", "palette/*", "masks/*/*", "cutouts/*/*"):
        names = (path.relative_to(out).as_posix() for path in out.glob(pattern))
        yield from filter(_OURS.fullmatch, names)


def _is_own(name: str) -> bool:
    return name.startswith(_STAGING) or name == f".{_LOCK}.lock"


def _lies_in(source: str, out: Path) -> bool:
    path = Path(source)
    while not path.exists() and path != path.parent:  # a pattern lies where its folder does
        path = path.parent
    return path.exists() and path != Path(".") and path.resolve().is_relative_to(out.resolve())


def _make_folders(out: Path) -> list[Path]:
    """Make ``out`` and its missing parents; returns those that it made, outermost first."""
    missing = [path for path in (out, *out.parents) if not path.exists()][::-1]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(out, error) from error
    return missing


def _not_writable(out: Path, error: OSError) -> UserError:
    return UserError(f"{out} cannot be written ({error.strerror}): give another folder with --out")
