"""The folder of a benchmark run: finished units stay, no matter how the run ends, and processes share the others."""

import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refsam.errors import UserError, differences
from refsam.evaluation.scoring.clips import visible
from refsam.evaluation.scoring.results import as_json
from refsam.runtime.files import replace_file

_STAGING = ".unfinished"


class RunFolder:
    """`run.json` (settings), `results/<unit>.json` (one record per finished unit), `predictions/`.

    A unit counts as done when its record exists, which is written last and as a whole. Opening the folder of an earlier run
    with equal settings continues it.

    Raises:
        UserError: the folder holds something else, or a run with other settings, which the message names.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.predictions = folder / "predictions"
        self._results = folder / "results"
        content = as_json(settings)
        file = folder / "run.json"
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} exists and is no folder: give another one with --out")
        # In this order: another process that makes the folder now writes the settings before anything else.
        if folder.is_dir() and visible(folder) and not file.is_file():
            raise UserError(f"{folder} holds other files: give a new folder with --out")
        folder.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            _check_equal(file, json.loads(content))
        else:
            replace_file(file, content)
        self.predictions.mkdir(exist_ok=True)
        self._results.mkdir(exist_ok=True)

    def is_done(self, unit: str) -> bool:
        """Whether the unit's record is there."""
        return self._record(unit).is_file()

    def record(self, unit: str) -> dict[str, Any]:
        """The record of a finished unit."""
        found: dict[str, Any] = json.loads(self._record(unit).read_text(encoding="utf-8"))
        return found

    @contextmanager
    def unit(self, unit: str, folders: Sequence[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Write a unit's files below `folders` of the folder that is yielded, and fill its record, an empty dictionary.

        At the end these folders are moved into `predictions`, and the record is written. After an error nothing of it remains.
        """
        name = f"{unit.replace('/', '+')}.{socket.gethostname()}-{os.getpid()}"
        staging = self.folder / _STAGING / name
        shutil.rmtree(staging, ignore_errors=True)
        for folder in folders:
            (staging / folder).mkdir(parents=True)
        try:
            facts: dict[str, Any] = {}
            yield staging, facts
            self._finish(unit, staging, folders, facts)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def tidy(self) -> None:
        """Remove the files that killed processes left; call it when every unit is done."""
        shutil.rmtree(self.folder / _STAGING, ignore_errors=True)

    def _finish(
        self, unit: str, staging: Path, folders: Sequence[str], facts: Mapping[str, Any]
    ) -> None:
        for folder in folders:
            target = self.predictions / folder
            # Left by a process that was killed before it wrote the record.
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            (staging / folder).rename(target)
        record = self._record(unit)
        record.parent.mkdir(parents=True, exist_ok=True)
        replace_file(record, as_json({"unit": unit, **facts}))

    def _record(self, unit: str) -> Path:
        return self._results / f"{unit}.json"


def _check_equal(file: Path, wanted: Mapping[str, Any]) -> None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}; give a new folder with --out") from error
    every = {key: wanted.get(key) for key in sorted({*found, *wanted})}
    if different := differences(found, every):
        raise UserError(
            f"{file.parent} holds a run with other settings: {'; '.join(different)}; give another folder with --out"
        )
