"""`refsam evaluate masks`: what it prints and writes, and how it refuses."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from refsam.cli import main


@pytest.fixture
def folders(tmp_path):
    for folder in ("pred", "gt"):
        (tmp_path / folder / "bear").mkdir(parents=True)
        for frame in range(3):
            mask = np.zeros((30, 40), dtype=np.uint8)
            mask[5:20, 5:25] = 1
            mask[8:, :] *= folder == "gt" or frame != 1
            Image.fromarray(mask).save(tmp_path / folder / "bear" / f"{frame:05d}.png")
    return ["--pred", str(tmp_path / "pred"), "--gt", str(tmp_path / "gt")]


def run(*words):
    """Exit code of `refsam evaluate masks`."""
    with pytest.raises(SystemExit) as finished:
        main(["evaluate", "masks", "--processes", "1", *map(str, words)])
    return finished.value.code


def test_the_table_names_the_protocol_its_rules_and_the_scores(folders, capsys):
    assert run(*folders) == 0
    printed = capsys.readouterr().out
    assert "protocol: davis-unsupervised" in printed
    assert "Matching: Hungarian" in printed
    row = next(line.split() for line in printed.splitlines() if line.startswith("bear"))
    assert float(row[5]) == pytest.approx(100 * (1 + 0.2 + 1) / 3, abs=0.005)


def test_json_csv_and_plots_hold_the_same_scores(folders, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs refsam[eval]")
    outputs = tmp_path / "scores.json", tmp_path / "scores.csv", tmp_path / "plots"
    assert run(*folders, "--json", outputs[0], "--csv", outputs[1], "--plots", outputs[2]) == 0
    content = json.loads(outputs[0].read_text())
    assert content["protocol"] == "davis-unsupervised"
    assert content["objects"][0]["J"] == [1, 0.2, 1]
    assert content["objects"][0]["frames"] == ["00000", "00001", "00002"]
    rows = list(csv.DictReader(outputs[1].open()))
    assert [row["video"] for row in rows] == ["bear", "overall"]
    assert float(rows[0]["J-Mean"]) == content["overall"]["J-Mean"]
    with Image.open(outputs[2] / "bear.png") as plot:
        assert plot.width > 500


def test_problems_are_listed_line_by_line_and_nothing_is_written(folders, tmp_path, capsys):
    (tmp_path / "pred" / "bear" / "00001.png").unlink()
    (tmp_path / "pred" / "bear" / "00002.png").write_bytes(b"")
    assert run(*folders, "--json", tmp_path / "scores.json") == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-3:] == [
        "bear: 1 frame missing: 00001",
        "bear: 1 unreadable PNG: 00002",
        "refsam: 2 problems, listed above: put them right, or score what cannot be used as empty with "
        "--missing zero",
    ]
    assert "protocol" not in printed.out
    assert not (tmp_path / "scores.json").exists()


def test_missing_zero_reports_what_it_scored_as_empty(folders, tmp_path, capsys):
    (tmp_path / "pred" / "bear" / "00001.png").unlink()
    assert run(*folders, "--missing", "zero") == 0
    assert "1 problems; what could not be used was scored as empty:" in capsys.readouterr().out


def test_a_list_of_videos_restricts_the_scoring(folders, tmp_path, capsys):
    (tmp_path / "val.txt").write_text("bear\n\n")
    (tmp_path / "pred" / "cat").mkdir()
    assert run(*folders, "--videos", tmp_path / "val.txt") == 0
    assert run(*folders, "--videos", tmp_path / "no.txt") == 2
    assert "no.txt cannot be read as text" in capsys.readouterr().err


def test_outputs_that_cannot_be_written_are_refused_before_the_work(folders, tmp_path, capsys):
    assert run(*folders, "--csv", tmp_path / "no" / "scores.csv") == 2
    assert "there is no folder" in capsys.readouterr().err
    assert run(*folders, "--json", tmp_path) == 2
    assert "is a folder, want the name of a file" in capsys.readouterr().err


def test_plots_without_matplotlib_name_the_extra(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(*folders, "--plots", tmp_path / "plots") == 2
    assert "plots need matplotlib: pip install 'refsam[eval]'" in capsys.readouterr().err


def test_unknown_protocols_are_refused(folders, capsys):
    assert run(*folders, "--protocol", "coco") == 2
    assert "want one of davis-unsupervised" in capsys.readouterr().err


def test_scoring_does_not_import_torch(folders):
    words = ["evaluate", "masks", "--processes", "1", *folders]
    program = (
        f"import sys; from refsam.cli import main\ntry: main({words!r})\n"
        "except SystemExit as finished: assert not finished.code\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
