"""`refsam segment-videos`: arguments, lists, the summary and exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from refsam.cli import main
from refsam.video import ResultWriter
from tests.tiny_model import tiny_model
from tests.video.clips import write_video


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture
def videos(tmp_path: Path) -> list[Path]:
    return [write_video(tmp_path / f"{name}.mp4", frames=3) for name in "ab"]


def run(checkpoint: Path, *arguments: object) -> Result:
    words = ["segment-videos", *arguments, "--checkpoint", checkpoint, "--device", "cpu"]
    return CliRunner().invoke(main, [str(word) for word in words])


def report(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def test_writes_a_folder_for_each_video(
    checkpoint: Path, videos: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for before in (0, 2):
        result = run(checkpoint, *videos, "--text", "dog", "--out", out, "--batch-size", 2)
        assert result.exit_code == 0, result.output
        assert f"{2 - before} videos segmented, {before} done before" in result.stdout
    for name in "ab":
        assert report(out / name)["model"] == str(checkpoint)
        assert report(out / name)["dtype"] == "float32"
        assert len(list((out / name / "masks" / "00").iterdir())) == 3


def test_list_of_sources(checkpoint: Path, videos: list[Path], tmp_path: Path) -> None:
    listing = tmp_path / "list.yaml"
    listing.write_text("- a.mp4\n- source: b.mp4\n  text: [the red cup, tree]\n")
    result = run(checkpoint, "--list", listing, "--text", "dog", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = {
        name: [e["text"] for e in report(tmp_path / "out" / name)["expressions"]] for name in "ab"
    }
    assert found == {"a": ["dog"], "b": ["the red cup", "tree"]}


def test_missing_video_is_named_and_the_others_go_on(
    checkpoint: Path, videos: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    missing = tmp_path / "nowhere.mp4"
    result = run(checkpoint, missing, *videos, "--text", "dog", "--out", out)
    assert result.exit_code == 2
    assert f"refsam: {missing} does not exist" in result.stderr
    assert "1 of 3 videos could not be segmented" in result.stderr.splitlines()[-1]
    assert "2 videos segmented, 0 done before" in result.stdout
    assert sorted(path.name for path in out.iterdir()) == ["a", "b", "videos.json"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "no source"),
        (["a.mp4"], "a.mp4: nothing to segment; give --text"),
        (["a.mp4", "--text", " "], "--text is empty"),
        (["--list", "nowhere.yaml", "--text", "dog"], "nowhere.yaml does not exist"),
        (["--list", "{list}", "--text", "dog"], "got the entry {'video': 'a.mp4'}"),
        (["a.mp4", "--text", "dog", "--batch-size", "0"], "batch-size"),
        (["a.mp4", "--text", "xqzzy"], "xqzzy"),
    ],
)
def test_wrong_arguments(checkpoint: Path, tmp_path: Path, arguments: list[str], part: str) -> None:
    listing = tmp_path / "list.yaml"
    listing.write_text("[{video: a.mp4}]")
    given = [listing if word == "{list}" else word for word in arguments]
    result = run(checkpoint, *given, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert part in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["a: b", "[]", "- [unclosed", "[{source: 3, text: dog}]"])
def test_wrong_lists(checkpoint: Path, tmp_path: Path, content: str) -> None:
    listing = tmp_path / "list.yaml"
    listing.write_text(content)
    result = run(checkpoint, "--list", listing, "--text", "dog", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert str(listing) in result.stderr.splitlines()[-1]


def test_interrupted_run_says_how_to_go_on(
    checkpoint: Path, videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = ResultWriter.finish

    def interrupted(writer: ResultWriter, **facts: object) -> Path:
        if writer.out.name == second.stem:
            raise KeyboardInterrupt
        return finish(writer, **facts)

    first, second = sorted(videos, key=lambda video: -video.stat().st_size)
    monkeypatch.setattr(ResultWriter, "finish", interrupted)
    result = run(checkpoint, first, second, "--text", "dog", "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert "interrupted; 1 of the videos are done" in result.stderr.splitlines()[-1]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [first.stem, "videos.json"]
    monkeypatch.undo()
    result = run(checkpoint, first, second, "--text", "dog", "--out", tmp_path / "out")
    assert "1 videos segmented, 1 done before" in result.stdout


@pytest.mark.slow
def test_torchrun_does_not_stop_the_others_for_a_missing_video(
    checkpoint: Path, tmp_path: Path
) -> None:
    """torchrun ends all processes as soon as one fails: that one waits until the others are done."""
    long = write_video(tmp_path / "long.mp4", frames=120)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--no-python",
    ]
    command += [sys.executable, "-m", "refsam", "segment-videos", str(long), "nowhere.mp4"]
    command += ["--text", "dog", "--out", str(tmp_path / "out"), "--checkpoint", str(checkpoint)]
    result = subprocess.run(
        [*command, "--device", "cpu"], capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode != 0
    assert "refsam: nowhere.mp4 does not exist" in result.stderr
    assert report(tmp_path / "out" / "long")["frames"] == 120
