"""The installations of `make install-matrix`: the docs show every row as it was run, or that it was not."""

import subprocess
import sys
from pathlib import Path

from benchmarks.gates import install_matrix


def test_the_page_shows_the_results(root: Path) -> None:
    page = (root / "docs" / "platforms.md").read_text()
    assert f"{install_matrix.MARK}\n\n{install_matrix.table(install_matrix.read())}\n" in page


def test_rows_have_names_of_their_own(root: Path) -> None:
    names = [row.name for row in install_matrix.ROWS]
    assert len(set(names)) == len(names)
    command = [sys.executable, "-m", "benchmarks.gates.install_matrix"]
    listed = subprocess.run(
        [*command, "--list"], cwd=root, capture_output=True, text=True, check=True
    )
    assert listed.stdout.split() == names
    refused = subprocess.run(
        [*command, "py2.7"], cwd=root, capture_output=True, text=True, check=False
    )
    assert refused.returncode != 0
    assert refused.stderr.strip() == "rows: got py2.7, wanted some of --list"
