"""`refsam bench --compare`: what counts as slower, and what is said of the rest."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.report import compare

ORIGIN = {"hardware": {"processor": "a processor"}, "threads": 2}


def row(provider: str, **values: Any) -> dict[str, Any]:
    """A row of a provider; `ms` and `speedup` are its time's."""
    if "ms" in values:
        values["median_ms"] = values.pop("ms")
    key = {"device": "cpu", "operator": "op", "case": "a case", "provider": provider}
    return key | values | {"provenance": values.get("provenance", ORIGIN)}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "cpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(before: Path, after: Path, *options: str) -> int:
    return main(["--compare", str(before), str(after), *options])


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return write(
        tmp_path / "before",
        row("plain", ms=10.0, speedup=1.0),
        row("ours", ms=5.0, speedup=2.0),
        row("limit", ms=1.0, speedup=10.0, is_ceiling=True),
        row("absent", skipped="is not installed"),
    )


def test_same_run_has_no_regressions(before: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(before, before) == 0
    assert "0 of 4 are regressions" in capsys.readouterr().out


def test_slower_than_the_threshold_is_a_regression(
    before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = write(
        tmp_path / "after", row("plain", ms=10.0, speedup=1.0), row("ours", ms=6.0, speedup=10 / 6)
    )
    assert run(before, after) == 1
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.endswith("REGRESSION"))
    assert "ours" in line and "+20.0 %" in line and "5.00 ms ->" in line
    assert run(before, after, "--threshold", "25") == 0


def test_a_slower_machine_is_none(
    before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"hardware": {"processor": "another"}, "threads": 2}
    after = write(
        tmp_path / "after",
        row("plain", ms=30.0, speedup=1.0, provenance=other),
        row("ours", ms=15.0, speedup=2.0, provenance=other),
    )
    assert run(before, after) == 0
    assert "different machines" in capsys.readouterr().out


def test_ceilings_are_not_judged(before: Path, tmp_path: Path) -> None:
    after = write(tmp_path / "after", row("limit", ms=9.0, speedup=1.0, is_ceiling=True))
    assert run(before, after) == 0


def test_wrong_results_are_regressions(
    before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = write(tmp_path / "after", row("ours", wrong="off by 1"), row("new", ms=1.0, speedup=9))
    assert run(before, after) == 1
    printed = capsys.readouterr().out
    assert "wrong: off by 1  REGRESSION" in printed
    assert "not measured before" in printed and "not measured after" in printed


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ("", "got no rows"), ("{}", "got no rows"), ("x", "got no rows")],
)
def test_what_is_no_result_is_refused(
    before: Path,
    tmp_path: Path,
    content: str | None,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    assert run(before, path) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_runs_without_a_common_case_are_refused(before: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", row("plain", ms=1.0, speedup=1.0) | {"case": "another"})
    with pytest.raises(ValueError, match="no case in common"):
        compare.report(before, other, 10.0)


def test_the_command_compares(before: Path, tmp_path: Path) -> None:
    write(tmp_path / "after", row("ours", ms=9.0, speedup=10 / 9))
    command = [sys.executable, "-m", "refsam", "bench", "--compare", "before", "after"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    assert "1 of 4 are regressions" in result.stdout
