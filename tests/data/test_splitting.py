"""One's own videos divided, trained on by the documented commands, and scored."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from refsam.cli import main
from refsam.data import DataError, open_dataset
from refsam.data.splitting import split_folder
from tests.data import fixtures


def write_videos(root: Path, count: int) -> Path:
    """So many videos of three frames, two objects, two expressions."""
    split = root / "train"
    rows = ["video,objects,text"]
    for index in range(count):
        video = f"clip{index}"
        names = [f"frame{time}" for time in range(3)]
        fixtures.write_video(split / "frames" / video, split / "masks" / video, names, 2)
        rows += [f"{video},1,the red box", f'{video},2,"a blue, small zeppelin"']
    (split / "expressions.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.mark.parametrize(
    ("count", "share", "held"), [(2, 0.2, 1), (8, 0.2, 2), (8, 0.9, 7), (3, 0.99, 2)]
)
@pytest.mark.parametrize("copy", [False, True])
def test_videos_are_divided_whole(
    tmp_path: Path, count: int, share: float, held: int, copy: bool
) -> None:
    root = write_videos(tmp_path / "mine", count)
    before = open_dataset("folder", root, "train")
    parts = split_folder(root, tmp_path / "out", share=share, copy=copy)
    assert len(parts["validation"]) == held and len(parts["train"]) == count - held
    assert not set(parts["validation"]) & set(parts["train"])
    for part, videos in parts.items():
        dataset = open_dataset("folder", tmp_path / "out", part)
        assert {video.name for video in dataset.videos} == set(videos)
        for video in dataset.videos:
            assert video in before.videos
            texts = [e.text for e in dataset.expressions(video.name)]
            assert texts == [e.text for e in before.expressions(video.name)]
    assert any(path.is_symlink() for path in (tmp_path / "out").rglob("*")) is not copy
    assert split_folder(root, tmp_path / "again", share=share) == parts


def test_what_cannot_be_divided(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 video cannot be divided"):
        split_folder(write_videos(tmp_path / "one", 1), tmp_path / "out")
    root = write_videos(tmp_path / "mine", 2)
    with pytest.raises(DataError, match="share between 0 and 1"):
        split_folder(root, tmp_path / "out", share=1.0)
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="exists"):
        split_folder(root, tmp_path / "out")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_masks_of_segment_videos_are_scored(tmp_path: Path) -> None:
    """Files as `refsam segment-videos` writes them; perfect ones score 1."""
    write_videos(tmp_path / "mine", 2)
    dataset = open_dataset("folder", tmp_path / "mine", "train")
    for video in dataset.videos:
        texts = ["the red box", "a blue, small zeppelin"][::-1]  # another order than the table's
        folder = tmp_path / "out" / video.name
        for number, text in enumerate(texts):
            (expression,) = [e for e in dataset.expressions(video.name) if e.text == text]
            for time, frame in enumerate(video.frame_names):
                path = folder / "masks" / f"{number:02d}" / f"{time:05d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                mask = dataset.mask(expression, frame)
                Image.fromarray(np.where(mask, 255, 0).astype("u1")).save(path)
        entries = [{"text": text} for text in texts]
        (folder / "result.json").write_text(json.dumps({"expressions": entries}))
    arguments = ["evaluate", "masks", "--pred", tmp_path / "out", "--gt", tmp_path / "mine/train"]
    run(*arguments, "--json", tmp_path / "scores.json", "--processes", 1)
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["overall"]["J&F-Mean"] == pytest.approx(1.0)
    (tmp_path / "out/clip0/masks/00/00001.png").unlink()
    result = CliRunner().invoke(main, [str(a) for a in (*arguments, "--processes", 1)])
    assert result.exit_code == 2 and "frame missing" in result.output
