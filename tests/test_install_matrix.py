"""The installations of `make install-matrix`: the docs show every row as it was run, or that it was not."""

import sys

import pytest

from benchmarks.gates import install_matrix
from benchmarks.report import tables


def test_the_table_shows_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = install_matrix.ROWS
    entry = {"state": "passed", "detail": "2.10 | built"}
    monkeypatch.setattr(tables, "read", lambda: {first.name: entry})
    lines = tables.install_matrix().splitlines()[2:]
    assert lines[0] == f"| {first.python} | {first.torch} | plain | passed | 2.10 ; built |"
    assert len(lines) == len(others) + 1
    assert all("| not run | not tried" in line for line in lines[1:])


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
