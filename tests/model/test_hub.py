"""push_to_hub against a folder in the place of the Hub; the model card."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from refsam import RefSAM
from refsam.checkpoint import Source
from refsam.errors import CheckpointError
from tests.tiny_model import tiny_model


class Hub:
    """The used part of huggingface_hub's HfApi, writing into a folder."""

    root: Path

    def __init__(self, token: str | None = None) -> None:
        if token == "bad":
            raise OSError("401 Client Error\nmore of it")

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Any:
        assert exist_ok
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, repo_id: str, folder_path: Path, **_: Any) -> str:
        shutil.copytree(folder_path, self.root / repo_id)
        return f"https://hub/{repo_id}/commit/1"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    Hub.root = tmp_path
    monkeypatch.setattr("refsam.model.refsam.HfApi", Hub)
    return tmp_path


def test_what_is_pushed_is_what_is_loaded(hub: Path) -> None:
    model = tiny_model()
    assert model.push_to_hub("someone/tiny") == "https://hub/someone/tiny/commit/1"
    folder = hub / "someone" / "tiny"
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "tokenizer.json"
    }  # fmt: skip
    loaded = RefSAM.from_pretrained(folder)
    for (name, ours), theirs in zip(
        model.state_dict().items(), loaded.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_the_card_says_what_is_known_and_what_is_missing(hub: Path) -> None:
    tiny_model().push_to_hub("someone/tiny", model_card_kwargs={"training": "On *everything*."})
    card = ModelCard.load(hub / "someone" / "tiny" / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "refsam")
    assert 'from_pretrained("someone/tiny")' in card.text
    assert "| image encoder | 4 blocks, 32 wide, 2 heads, image 64, patch 16 |" in card.text
    assert "On *everything*." in card.text
    assert "Not measured yet" in card.text
    assert "{{" not in card.text


@pytest.mark.parametrize("through_save", [False, True])
def test_a_delta_is_pushed_as_one(hub: Path, through_save: bool) -> None:
    model = tiny_model()
    model.freeze_pretrained()
    model.sources["sam"] = Source("sam_tiny.pth", "abc", "https://elsewhere")
    if through_save:
        model.save_pretrained(hub / "own", delta=True, push_to_hub=True, repo_id="someone/delta")
    else:
        model.push_to_hub("someone/delta", delta=True)
    folder = hub / "someone" / "delta"
    card = (folder / "README.md").read_text()
    assert "| built on | sam_tiny.pth (SHA-256 abc" in card
    assert 'from_pretrained("someone/delta", sam="PATH")' in card
    with pytest.raises(CheckpointError, match=r"is a delta and needs sam_tiny\.pth"):
        RefSAM.from_pretrained(folder)


def test_refusals_of_the_hub_are_one_line(hub: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"push_to_hub: 'a/b' cannot be written: 401 Client Error$"
    ):
        tiny_model().push_to_hub("a/b", token="bad")


def test_a_card_that_is_there_stays(tmp_path: Path) -> None:
    model, folder = tiny_model(), tmp_path / "tiny"
    model.save_pretrained(folder)
    (folder / "README.md").write_text("mine")
    model.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"
