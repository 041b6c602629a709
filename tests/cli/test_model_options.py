"""`--sam` and `--text-encoder` wherever a command takes a checkpoint: a delta is used with what it stands on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from refsam import RefSAM, RefSAMConfig, checkpoint
from refsam.cli import main
from refsam.cli.convert import app as convert
from tests.data import fixtures
from tests.test_checkpoint import SAM_SIZES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sam.pth`, its conversion `sam`, and `model`, a delta on it."""
    folder = tmp_path_factory.mktemp("delta")
    torch.manual_seed(3)
    whole = RefSAM(RefSAMConfig.from_dict(SAM_SIZES)).state_dict()
    torch.save({k: v for k, v in whole.items() if checkpoint.is_sam(k)}, folder / "sam.pth")
    arguments = [
        "sam",
        str(folder / "sam.pth"),
        "--out",
        str(folder / "sam"),
        "--text-encoder",
        "small",
    ]
    assert CliRunner().invoke(convert, arguments).exit_code == 0
    RefSAM.from_pretrained(folder / "sam").save_pretrained(folder / "model", delta=True)
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(folder / "frame.png")
    fixtures.write_ref_youtube_vos_truth(
        fixtures.write_ref_youtube_vos(folder / "videos", frames=2), frames=2
    )
    return folder


COMMANDS = {
    "segment": ["segment", "frame.png", "--text", "red ball", "--no-overlay"],
    "segment-videos": ["segment-videos", "frame.png", "--text", "red ball", "--no-overlay"],
    "evaluate": ["evaluate", "ref-youtube-vos", "--root", "videos", "--missing", "zero"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_delta_is_used_with_its_sam_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.delenv("REFSAM_SAM_DIR", raising=False)
    command = [*COMMANDS[name], "--checkpoint", "model", "--out", str(tmp_path / "out")]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 2 and "--sam" in refused.output
    result = CliRunner().invoke(main, [*command, "--sam", "sam.pth"])
    assert result.exit_code == 0, result.output


def test_a_text_encoder_that_the_checkpoint_has_none_of(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    command = [*COMMANDS["segment"], "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, [*command, "--text-encoder", "google-t5/t5-small"])
    assert result.exit_code == 2 and "text_encoder" in result.output
