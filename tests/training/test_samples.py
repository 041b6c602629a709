"""`refsam data show`: the clips that training draws, on one page."""

from pathlib import Path

import yaml
from typer.testing import CliRunner

from refsam.checkpoint import Checkpoint, write_checkpoint
from refsam.cli import main
from refsam.config import config_to_dict
from refsam.training.batches import DatasetStream, batches
from tests.data import fixtures
from tests.evf_folder import tiny_evf_config
from tests.training.runs import run_settings


def test_the_page_shows_the_clips_of_the_first_steps(tmp_path: Path) -> None:
    fixtures.write_ref_youtube_vos(tmp_path / "videos")
    listing = tmp_path / "videos/meta_expressions/train/meta_expressions.json"
    listing.write_text(listing.read_text().replace("a blue box", "a <b>blue</b> box"))
    settings = run_settings(tmp_path, "run", clips=2)
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(config_to_dict(settings)))
    arguments = ["data", "show", str(config), "--out", str(tmp_path / "page.html"), "--steps", "3"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0 and "6 clips" in result.output, result.output
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img") == 6 and "<b>blue" not in page and "http" not in page
    first = next(
        batches(DatasetStream(settings, [settings.data.datasets[0].open()]), 0, 1, workers=0)
    )
    assert all(name in page for name in first.clips.names)
    assert not (tmp_path / "run").exists()


def test_generated_clips_are_shown_too(tmp_path: Path) -> None:
    stages = "stages=[{steps: 1, clips: 2, expressions: 2, image_size: 64}]"
    root = Path(__file__).parents[2]
    arguments = [
        "data",
        "show",
        str(root / "configs/nano.yaml"),
        stages,
        "data.photographs=null",
        "--out",
        str(tmp_path / "page.html"),
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0 and "2 clips" in result.output, result.output


def test_training_does_not_start_from_evf_sam(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "evf", Checkpoint(tiny_evf_config(), {}, "evf", "{}"))
    stages = [{"steps": 1, "clips": 1, "expressions": 1, "image_size": 64}]
    values = {"model": {}, "stages": stages, "output": "x", "init_from": str(tmp_path / "evf")}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    result = CliRunner().invoke(
        main, ["data", "show", str(config), "--out", str(tmp_path / "page.html")]
    )
    assert result.exit_code == 2 and "EVF-SAM, wanted RefSAM" in result.output, result.output
