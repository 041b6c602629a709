"""The installations of `make install-matrix`: the docs show every row as it was run, or that it was not."""

import sys
from pathlib import Path

import pytest

from benchmarks.gates import install_matrix


def test_the_page_shows_the_results(root: Path) -> None:
    page = (root / "docs" / "platforms.md").read_text()
    assert f"{install_matrix.MARK}\n\n{install_matrix.table(install_matrix.read())}\n" in page


def test_rows_have_names_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [row.name for row in install_matrix.ROWS]
    assert len(set(names)) == len(names)
    monkeypatch.setattr(sys, "argv", ["install_matrix", "--list"])
    install_matrix.main()
    assert capsys.readouterr().out.split() == names
    monkeypatch.setattr(sys, "argv", ["install_matrix", "py2.7"])
    with pytest.raises(SystemExit, match=r"^rows: got py2\.7, wanted some of --list$"):
        install_matrix.main()
