"""Checkpoints: there and back, deltas, damage, foreign files, conversion, and nothing half-written."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from refsam import RefSAM, RefSAMConfig, checkpoint
from refsam.checkpoint import SAM_SOURCES, Source
from refsam.cli.convert import app
from refsam.errors import CheckpointError, UserError
from refsam.model import EncodedText, word_tokenizer
from tests.golden import golden_folder, golden_weights, read_golden, relative_error
from tests.tiny_model import CONFIG, tiny_model

FRAME = torch.randint(0, 256, (1, 40, 64, 3), dtype=torch.uint8)


@torch.no_grad()
def logits_of(model: RefSAM) -> Tensor:
    image = model.encode_image(model.preprocess(FRAME)[0])
    return model.decode(image, model.encode_text(["the red cup"])).logits


def partial_files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if "partial" in path.name]


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    loaded = RefSAM.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config and not loaded.training
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert loaded.text_encoder.tokenizer.to_str() == model.text_encoder.tokenizer.to_str()
    assert {p.name for p in (tmp_path / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
    }
    assert partial_files(tmp_path) == []


def test_vocabulary_belongs_to_the_checkpoint(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(["zorg"])
    model = RefSAM(RefSAMConfig.from_dict(CONFIG), tokenizer)
    model.save_pretrained(tmp_path / "model")
    assert RefSAM.from_pretrained(str(tmp_path / "model")).encode_text(["zorg"]).unknown == ((),)


def test_saving_again_replaces_the_files(tmp_path: Path) -> None:
    tiny_model(0).save_pretrained(tmp_path / "model")
    other = tiny_model(1)
    other.save_pretrained(tmp_path / "model")
    assert torch.equal(logits_of(RefSAM.from_pretrained(tmp_path / "model")), logits_of(other))
    assert partial_files(tmp_path) == []


def test_failed_writing_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(0)
    model.save_pretrained(tmp_path / "model")

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("refsam.checkpoint.files.save_file", full_disk)
    with pytest.raises(CheckpointError, match=r"cannot be written .*No space left"):
        tiny_model(1).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="cannot be written"):
        tiny_model(1).save_pretrained(tmp_path / "new")
    assert torch.equal(logits_of(RefSAM.from_pretrained(tmp_path / "model")), logits_of(model))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_bundled_names_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refsam.checkpoint.files.BUNDLED", tmp_path)
    tiny_model().save_pretrained(tmp_path / "tiny")
    assert checkpoint.resolve_directory("tiny") == tmp_path / "tiny"
    with pytest.raises(CheckpointError, match=r"got 'tiney', wanted a bundled name \(tiny\)"):
        checkpoint.resolve_directory("tiney")


def test_hub_ids_go_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    asked: list[Any] = []

    def download(repo: str, **options: Any) -> str:
        asked.append((repo, options["revision"]))
        if repo == "some/one":
            return str(tmp_path / "model")
        raise ConnectionError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    RefSAM.from_pretrained("some/one", revision="v1")
    assert asked == [("some/one", "v1")]
    with pytest.raises(CheckpointError, match="Hub: no connection"):
        RefSAM.from_pretrained("no/one", revision=None)


def test_another_image_size_resizes_the_tables(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    larger = RefSAM.from_pretrained(tmp_path / "model", image_size=96)
    block = larger.image_encoder.blocks
    assert larger.image_size == 96 and larger.image_encoder.pos_embed.shape == (1, 6, 6, 32)
    assert len(block[1].attn.rel_pos_h) == 11 and len(block[0].attn.rel_pos_h) == 5
    with torch.no_grad():
        pixels, _ = model.preprocess(FRAME, image_size=96)
        at_run_time = model.encode_image(pixels).embedding
        torch.testing.assert_close(larger.encode_image(pixels).embedding, at_run_time)
    larger.save_pretrained(tmp_path / "larger")
    assert RefSAM.from_pretrained(tmp_path / "larger").image_size == 96


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_nothing_is_ever_unpickled(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    marker, bomb = tmp_path / "exploded", Bomb(tmp_path / "exploded")
    (tmp_path / "model" / "model.safetensors").write_bytes(pickle.dumps(bomb))
    torch.save({"a": bomb}, tmp_path / "sam.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(bomb, protocol=2))
    with pytest.raises(CheckpointError, match="cannot be read"):
        RefSAM.from_pretrained(tmp_path / "model")
    for name in ("sam.pth", "raw.pth"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            checkpoint.convert_sam(tmp_path / name, RefSAM.expected_tensors)
    assert not marker.exists()


def damage(folder: Path, kind: str) -> None:
    """Spoil a saved checkpoint in one way."""
    header = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "no weights":
        weights.unlink()
    elif kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "not json":
        (folder / "config.json").write_text("{")
    elif kind == "foreign":
        (folder / "config.json").write_text('{"model_type": "sam"}')
    elif kind == "unknown key":
        header["config"]["speed"] = 9
        (folder / "config.json").write_text(json.dumps(header))
    elif kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif kind == "bad tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    elif kind == "missing tensor":
        del tensors["tracking.norm1.weight"]
        save_file(tensors, weights)
    elif kind == "another shape":
        tensors["tracking.norm1.weight"] = torch.zeros(3)
        save_file(tensors, weights)
    else:
        save_file(tensors | {"extra": torch.zeros(1)}, weights)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "model.safetensors: cannot be read"),
        ("no weights", "model.safetensors: cannot be read"),
        ("no config", "config.json: cannot be read"),
        ("not json", "config.json: cannot be read"),
        ("foreign", "not a checkpoint of refsam"),
        ("unknown key", "speed: unknown key"),
        ("no tokenizer", "tokenizer.json is missing"),
        ("bad tokenizer", "tokenizer.json: cannot be read"),
        ("missing tensor", r"1 missing \(tracking.norm1.weight\)"),
        ("another shape", r"1 of another shape \(tracking.norm1.weight \(3,\) for \(32,\)\)"),
        ("extra tensor", r"1 unexpected \(extra\)"),
    ],
)
def test_damaged_checkpoints_are_named_in_one_line(tmp_path: Path, kind: str, message: str) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    damage(tmp_path / "model", kind)
    with pytest.raises(UserError, match=message) as caught:
        RefSAM.from_pretrained(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_files_and_missing_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "sam.pth").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"is a file, wanted a folder .*refsam convert"):
        RefSAM.from_pretrained(tmp_path / "sam.pth")
    with pytest.raises(CheckpointError, match="wanted a bundled name"):
        RefSAM.from_pretrained(tmp_path / "missing")


def test_published_sam_files_are_recorded() -> None:
    assert {key: source.name for key, source in SAM_SOURCES.items()} == {
        "vit_b": "sam_vit_b_01ec64.pth",
        "vit_l": "sam_vit_l_0b3195.pth",
        "vit_h": "sam_vit_h_4b8939.pth",
    }
    for source in SAM_SOURCES.values():
        assert len(source.sha256 or "") == 64 and (source.url or "").endswith(source.name)


SAM_SIZES = {
    **CONFIG,
    "mask_decoder": {"mlp_dim": 64, "iou_hidden_dim": 32, "num_heads": 8},
    "prompt_dim": 64,
    "frozen": True,
}
"""Like a published SAM's in everything but size: 8 heads in the decoder."""


@pytest.fixture
def sam_file(tmp_path: Path) -> Path:
    """A tiny file like segment-anything's, with the prompt encoder's unused parts."""
    torch.manual_seed(3)
    model = RefSAM(RefSAMConfig.from_dict(SAM_SIZES))
    state = {key: value for key, value in model.state_dict().items() if checkpoint.is_sam(key)}
    state["prompt_encoder.no_mask_embed.weight"] = torch.zeros(1, 64)
    state["prompt_encoder.point_embeddings.0.weight"] = torch.zeros(1, 64)
    torch.save(state, tmp_path / "sam_vit_t.pth")
    return tmp_path / "sam_vit_t.pth"


def convert(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_convert_sam_detects_the_size_and_reports_every_key(sam_file: Path, tmp_path: Path) -> None:
    result = convert("sam", sam_file, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "size: 32 wide, 4 blocks, 2 heads, image 64" in result.output
    assert "ignored: 2 (prompt_encoder.no_mask_embed.weight" in result.output
    stored = checkpoint.read_checkpoint(tmp_path / "out")
    wanted = RefSAMConfig.from_dict(SAM_SIZES)
    assert stored.config.image_encoder == wanted.image_encoder
    assert stored.config.mask_decoder == wanted.mask_decoder
    assert stored.kind == "sam"
    assert stored.sources["sam"].sha256 == checkpoint.file_sha256(sam_file)


def test_converted_sam_is_an_untrained_refsam(
    sam_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    convert("sam", sam_file, "--out", tmp_path / "out")
    model = RefSAM.from_pretrained(tmp_path / "out")
    assert "start anew" in caplog.text
    state = torch.load(sam_file, weights_only=True)
    for name, value in model.state_dict().items():
        if checkpoint.is_sam(name):
            assert torch.equal(value, state[name])
    assert not model.image_encoder.blocks[3].MLP_Adapter.D_fc2.weight.any()
    assert not model.image_encoder.blocks[3].attn.qkv.weight.requires_grad


@pytest.mark.parametrize("contents", [{}, {"a": torch.zeros(1)}, {"model": {"a": 1}}, [1]])
def test_convert_sam_refuses_other_files(tmp_path: Path, contents: Any) -> None:
    torch.save(contents, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"not a (SAM checkpoint|state dict)"):
        checkpoint.convert_sam(tmp_path / "other.pth", RefSAM.expected_tensors)
    assert convert("sam", tmp_path / "other.pth", "--out", tmp_path / "out").exit_code != 0
    assert not (tmp_path / "out").exists()


def test_convert_overwrites_only_when_told(sam_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    refused = convert("sam", sam_file, "--out", tmp_path / "out")
    assert isinstance(refused.exception, UserError) and "exists" in str(refused.exception)
    assert convert("sam", sam_file, "--out", tmp_path / "out", "--overwrite").exit_code == 0


@pytest.fixture
def trained(sam_file: Path, tmp_path: Path) -> RefSAM:
    """A model built on the tiny SAM file and has trained a little."""
    config = RefSAMConfig.from_dict(SAM_SIZES)
    sam = checkpoint.convert_sam(sam_file, RefSAM.expected_tensors)[0]
    torch.manual_seed(4)
    model = RefSAM(config).eval()
    model.load_state_dict(sam.tensors, strict=False)
    model.sources = dict(sam.sources)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_delta_holds_what_was_trained_and_finds_its_sam_file(
    trained: RefSAM, sam_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The small text encoder has no file of its own, so a delta holds it too.
    trained.save_pretrained(tmp_path / "delta", delta=True)
    names = set(load_file(tmp_path / "delta" / "model.safetensors"))
    assert not any(checkpoint.is_base(name) for name in names)
    assert {n for n, p in trained.named_parameters() if p.requires_grad} <= names
    loaded = RefSAM.from_pretrained(tmp_path / "delta", sam=sam_file)
    assert torch.equal(logits_of(loaded), logits_of(trained))
    monkeypatch.setenv("REFSAM_SAM_DIR", str(sam_file.parent))
    assert torch.equal(logits_of(RefSAM.from_pretrained(tmp_path / "delta")), logits_of(trained))
    convert("sam", sam_file, "--out", tmp_path / "converted")
    again = RefSAM.from_pretrained(tmp_path / "delta", sam=tmp_path / "converted")
    assert torch.equal(logits_of(again), logits_of(trained))
    again.save_pretrained(tmp_path / "again", delta=True)


def test_delta_names_the_file_it_lacks(
    trained: RefSAM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.sources = {"sam": SAM_SOURCES["vit_b"]}
    trained.save_pretrained(tmp_path / "delta", delta=True)
    monkeypatch.delenv("REFSAM_SAM_DIR", raising=False)
    for options in ({}, {"sam": tmp_path / "missing.pth"}):
        with pytest.raises(CheckpointError) as caught:
            RefSAM.from_pretrained(tmp_path / "delta", **options)
        source = SAM_SOURCES["vit_b"]
        for part in (source.name, source.sha256, source.url):
            assert str(part) in str(caught.value)
    monkeypatch.setenv("REFSAM_SAM_DIR", str(tmp_path))
    with pytest.raises(CheckpointError, match=f"not in {tmp_path}"):
        RefSAM.from_pretrained(tmp_path / "delta")


def test_delta_refuses_another_sam_file(trained: RefSAM, sam_file: Path, tmp_path: Path) -> None:
    trained.sources = {"sam": Source("sam_vit_t.pth", "0" * 64)}
    trained.save_pretrained(tmp_path / "delta", delta=True)
    with pytest.raises(CheckpointError, match=r"sam_vit_t.pth \(SHA-256 0{64}\)"):
        RefSAM.from_pretrained(tmp_path / "delta")
    convert("sam", sam_file, "--out", tmp_path / "converted")
    for other in (sam_file, tmp_path / "converted"):
        with pytest.raises(CheckpointError, match=r"has SHA-256 .*, wanted sam_vit_t.pth"):
            RefSAM.from_pretrained(tmp_path / "delta", sam=other)


def test_delta_needs_a_known_and_untouched_base(trained: RefSAM, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="recorded SAM file"):
        tiny_model().save_pretrained(tmp_path / "delta", delta=True)
    trained.requires_grad_(True)
    with pytest.raises(CheckpointError, match="left it as it was"):
        trained.save_pretrained(tmp_path / "delta", delta=True)
    assert not (tmp_path / "delta").exists()


def official_files(folder: Path) -> tuple[Path, list[Path]]:
    """The golden model's weights as the authors would have saved them, and its SAM file."""
    names = json.loads((golden_folder() / "official_model_names.json").read_text())
    weights = golden_weights({name: tuple(shape) for name, shape in names})
    gaussian = "sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    weights |= golden_weights({gaussian: (2, 128)})
    prefixes = {
        "resizer": "resizer.",
        "mask_decoder": "sam.mask_decoder.",
        "dense_conv": "dense_conv.",
        "track_net": "temporal_aggregation_network.",
        "image_encoder_blocks": "sam.image_encoder.blocks.",
    }
    files = []
    for kind, prefix in prefixes.items():
        files.append(folder / f"{kind}_t5-small_7.pth")
        part = {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
        torch.save(part, files[-1])
    sam = {key[4:]: v for key, v in weights.items() if key.startswith("sam.")}
    torch.save({k: v for k, v in sam.items() if "_Adapter." not in k}, folder / "sam_vit_t.pth")
    return folder / "sam_vit_t.pth", files


@torch.no_grad()
def test_converted_official_files_give_the_golden_outputs(tmp_path: Path) -> None:
    sam, files = official_files(tmp_path)
    result = convert("official", *files, "--sam", sam, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    model = RefSAM.from_pretrained(tmp_path / "out")
    assert model.config.text_encoder.name == "google-t5/t5-small"
    golden, track = read_golden("official_model_tiny.npz"), None
    text = model.project_text(EncodedText(golden["text"], torch.tensor([7])))
    for time, frame in enumerate(golden["frames"]):
        output = model.decode(
            model.encode_image(model.preprocess(frame[None])[0]), text, None, track
        )
        track = output.track_token
        assert relative_error(output.logits[None], golden[f"low_{time}"]) <= 1e-5
        assert relative_error(track[None], golden[f"track_{time}"]) <= 1e-5


def test_official_low_rank_updates_are_merged(tmp_path: Path) -> None:
    sam, files = official_files(tmp_path)
    blocks = torch.load(files[-1], weights_only=True)
    down, up = torch.randn(4, 48), torch.randn(48, 4)
    weight = blocks.pop("1.attn.proj.weight")
    blocks |= {
        "1.attn.proj.w.weight": weight,
        "1.attn.proj.w.bias": blocks.pop("1.attn.proj.bias"),
        "1.attn.proj.w_a.weight": down,
        "1.attn.proj.w_b.weight": up,
    }
    torch.save(blocks, files[-1])
    stored, _ = checkpoint.convert_official(files, sam, RefSAM.expected_tensors)
    key = "image_encoder.blocks.1.attn.proj.weight"
    torch.testing.assert_close(stored.tensors[key], weight + up @ down)


def test_official_files_without_blocks_have_no_adapters(tmp_path: Path) -> None:
    sam, files = official_files(tmp_path)
    stored, _ = checkpoint.convert_official(files[:-1], sam, RefSAM.expected_tensors)
    assert stored.config.image_encoder.adapter_ratio == 0


def test_official_conversion_names_what_is_wrong(tmp_path: Path) -> None:
    sam, files = official_files(tmp_path)
    expected = RefSAM.expected_tensors
    with pytest.raises(CheckpointError, match=r"track_net_\* missing"):
        checkpoint.convert_official(files[:3], sam, expected)
    with pytest.raises(CheckpointError, match="wanted one each of resizer_"):
        checkpoint.convert_official([*files, sam], sam, expected)
    for file in files:
        file.rename(file.with_name(file.name.replace("t5-small", "other")))
    renamed = [file.with_name(file.name.replace("t5-small", "other")) for file in files]
    with pytest.raises(CheckpointError, match="text_encoder: no file name holds"):
        checkpoint.convert_official(renamed, sam, expected)
    stored, _ = checkpoint.convert_official(renamed, sam, expected, "google-t5/t5-small")
    assert stored.config.text_encoder.width == 512


@pytest.mark.parametrize("preset", ["vit_b", "vit_l", "vit_h"])
def test_detect_config_knows_the_published_sizes(preset: str) -> None:
    config = RefSAMConfig.preset(preset)
    assert checkpoint.detect_config(RefSAM.expected_tensors(config)) == config
