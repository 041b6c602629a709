"""The benchmark of scoring folders of masks, at a small size."""

import json
from pathlib import Path

from benchmarks.end_to_end import scoring


def test_writes_how_much_faster_two_processes_are(tmp_path: Path) -> None:
    out = tmp_path / "scoring.json"
    scoring.main(["--out", str(out), "--rounds", "1", "--videos", "2", "--frames", "3"])
    content = json.loads(out.read_text())
    assert content["frames"] == 6
    assert content["speedup"] == content["seconds"]["1"][0] / content["seconds"]["2"][0]
