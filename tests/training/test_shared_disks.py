"""Files of a run and of the text cache belong to whom the umask lets in; who may not read them is told so."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from refsam.errors import UserError
from refsam.training import state
from refsam.training.loop import Trainer
from refsam.training.text_features import TextFeatures
from tests.data import fixtures
from tests.training.runs import losses_of, run_settings
from tests.training.test_text_features import TEXTS, build_encoder


@pytest.fixture(params=[0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def assert_follows(folder: Path, umask: int) -> None:
    """Locks may be opened by everybody: they say nothing, and a colleague must be able to take them."""
    for path in folder.rglob("*"):
        everybody = 0o777 if path.is_dir() else 0o666
        assert path.suffix == ".lock" or path.stat().st_mode & 0o777 == everybody & ~umask, path


def test_files_of_a_run(tmp_path: Path, umask: int) -> None:
    fixtures.write_ref_youtube_vos(tmp_path / "videos")
    losses_of(Trainer(run_settings(tmp_path, "run", steps=1)))
    assert (tmp_path / "run" / state.STATE).exists()
    assert_follows(tmp_path / "run", umask)


def test_files_of_the_text_cache(tmp_path: Path, umask: int) -> None:
    folder = tmp_path / "cache"
    TextFeatures(build_encoder(), folder)(TEXTS)
    assert len(list(folder.rglob("*.safetensors"))) == len(TEXTS)
    assert_follows(folder, umask)


def test_a_state_that_may_not_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / state.STATE).write_bytes(b"a colleague's")
    monkeypatch.setattr(state, "_read", refuse)  # root may read everything
    with pytest.raises(UserError, match=r"may not be read by this user: ask its owner"):
        state.read_state(tmp_path)
