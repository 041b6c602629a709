"""Every example runs as its first lines say, at small sizes."""

import ast
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest

from refsam.video import Frame
from tests.tiny_model import tiny_model

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three folders of two frames each."""
    from PIL import Image

    folders = [tmp_path_factory.mktemp("videos") / f"clip{index}" for index in range(3)]
    for index, folder in enumerate(folders):
        folder.mkdir()
        for frame in range(2):
            image = np.full((48, 64, 3), 40 * (index + frame), np.uint8)
            Image.fromarray(image).save(folder / f"{frame}.png")
    return folders


def test_each_example_is_listed_and_tested() -> None:
    listed = re.findall(r"\((\w+)\.py\)", (FOLDER / "README.md").read_text())
    tested = [name.removeprefix("test_") for name in globals() if name.startswith("test_")]
    assert set(listed) == set(EXAMPLES) <= set(tested)


def test_one_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    load("one_kernel").main()
    first, last = re.findall(r"loss ([\d.]+) -> ([\d.]+)", capsys.readouterr().out)[0]
    assert float(last) < 0.8 * float(first)


def test_one_kernel_needs_torch_alone() -> None:
    tree = ast.parse((FOLDER / "one_kernel.py").read_text())
    modules = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    modules += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    assert set(modules) == {"torch", "refsam_kernels"}


def test_faster_sam(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    load("faster_sam").main(["--image-size", "64", "--depth", "2", "--repeats", "1"])
    output = capsys.readouterr().out
    assert re.search(r"[\d.]+ s -> [\d.]+ s, [\d.]+x as fast", output)
    assert float(re.findall(r"differ by (\S+)", output)[0]) <= 1e-5


def test_ocr_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    load("ocr_encoder").main(["--pixels", "320", "--depth", "3", "--dim", "128"])
    output = capsys.readouterr().out
    assert re.search(r"[\d.]+ s -> [\d.]+ s, [\d.]+x as fast", output)
    theirs, ours = map(float, re.findall(r"by (\d\S+e-\d+)", output))
    assert ours <= 2 * theirs


def test_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    load("adapters").main(["--image-size", "64", "--depth", "2", "--steps", "6"])
    output = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", output)]
    assert len(losses) == 6
    assert min(losses[4:]) < losses[0]  # the fifth and sixth clip are the first and second again
    assert re.search(r"at most \d+ MiB", output)


class Camera:
    """A source that knows neither its length nor its end."""

    name, fps, time_base, expected_frames = "camera:0", Fraction(30), Fraction(1, 30), None

    def __iter__(self) -> Iterator[Frame]:
        index = 0
        while True:
            yield Frame(index, index / 30, np.full((48, 64, 3), index % 256, np.uint8))
            index += 1

    def __enter__(self) -> "Camera":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing to close."""


def test_camera(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    example = load("camera")
    monkeypatch.setattr(example, "open_source", lambda name: Camera())
    example.main([
        "--text", "the red cup", "--text", "a dog", "--checkpoint", str(checkpoint),
        "--frames", "3", "--save", str(tmp_path / "frames"),
    ])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["0.00", "0.03", "0.07"]
    assert lines[3].startswith("3 frames, ")
    assert len(list((tmp_path / "frames").glob("*.jpg"))) == 3


def test_many_videos(
    checkpoint: Path, videos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes, as torchrun tells them, one after the other; then one, and a video that is not there."""
    names = [*map(str, videos), "--text", "the red cup", "--checkpoint", str(checkpoint)]
    names += ["--out", str(tmp_path / "out")]
    example, done = load("many_videos"), []
    for rank in "01":
        with mock.patch.dict(os.environ, RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank):
            assert example.main(names) == 0
        done.append(set(re.findall(r"clip\d", capsys.readouterr().out)))
    assert done[0] | done[1] == {"clip0", "clip1", "clip2"}
    assert not done[0] & done[1]
    for video in videos:
        facts = json.loads((tmp_path / "out" / video.name / "result.json").read_text())
        assert facts["frames"] == 2
    assert example.main(["missing.mp4", *names]) == 1
    text = capsys.readouterr().out
    assert text.count("done earlier") == 3
    assert "missing.mp4 does not exist" in text
