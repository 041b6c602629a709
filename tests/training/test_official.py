"""Files as the authors save them are trained on: converted, then the start of a stage."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from refsam import RefSAM
from refsam.checkpoint.files import is_base
from refsam.model.pretrained_text_encoder import T5TextEncoder
from refsam.training.loop import Trainer
from tests.data import fixtures
from tests.test_checkpoint import convert, official_files
from tests.training.runs import losses_of, ones_for_words, run_settings


def test_official_files_are_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(T5TextEncoder, "encode", ones_for_words)  # its weights are gigabytes
    fixtures.write_ref_youtube_vos(tmp_path / "videos")
    sam, files = official_files(tmp_path)
    result = convert("official", *files, "--sam", sam, "--out", tmp_path / "official")
    assert result.exit_code == 0, result.output
    start: dict[str, Any] = {"init_from": str(tmp_path / "official"), "model": {}, "validation": {}}
    losses = losses_of(Trainer(run_settings(tmp_path, "run", **start)))
    assert len(losses) == 4 and all(math.isfinite(loss) for loss in losses)
    before = RefSAM.from_pretrained(tmp_path / "official").state_dict()
    after = RefSAM.from_pretrained(tmp_path / "run/model", sam=sam).state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert {name.split(".")[0] for name in moved} > {"image_encoder", "mask_decoder"}
    assert any("_Adapter." in name for name in moved)
    assert not any(is_base(name) for name in moved)  # SAM's encoder stays as it is
