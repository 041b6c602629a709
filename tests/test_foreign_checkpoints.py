"""SAM's weights as people have them: in entries of other files, from Hugging Face, and what is no weights at all."""

import argparse
import gzip
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from refsam import RefSAM, RefSAMConfig, checkpoint
from refsam.cli.convert import app
from refsam.errors import CheckpointError, UserError
from tests.test_checkpoint import SAM_SIZES


class Trainer:
    """A class of a training program, of which this project knows nothing."""

    def __init__(self) -> None:
        self.epoch = 3

    def __reduce__(self) -> Any:
        return (_explode, (1,))


def _explode(_: int) -> None:
    raise AssertionError("a file was executed")


@pytest.fixture
def state() -> dict[str, Tensor]:
    """Tensors of a tiny SAM under segment-anything's names."""
    torch.manual_seed(3)
    model = RefSAM(RefSAMConfig.from_dict(SAM_SIZES))
    return {key: value for key, value in model.state_dict().items() if checkpoint.is_sam(key)}


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"model_state": s},
        lambda s: {"model": s, "args": argparse.Namespace(lr=1e-4, out=Path("/tmp"))},
        lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"state": {}, "param_groups": [{"lr": 1}]}},
        lambda s: {"state_dict": prefixed(s, "model.") | {"loss.weight": torch.ones(1)}},
        lambda s: {"model": prefixed(s, "module."), "trainer": Trainer()},
        lambda s: prefixed(s, "sam_model."),
        lambda s: {"weights of mine": s},
        lambda s: {"weights of mine": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        lambda s: {"checkpoint": {"state_dict": s, "epoch": 3}},
        lambda s: s | {"epoch": 3},
        lambda s: {"model": s | {"steps": 5}, "loss": torch.ones(())},
        lambda s: prefixed(s, "module.sam._orig_mod."),
        lambda s: {key.replace(".blocks.", "._fsdp_wrapped_module.blocks._orig_mod."): x for key, x in s.items()},
        lambda s: s | {"mask_decoder.hf_token.weight": torch.ones(1, 64)},  # SAM-HQ
    ],
)  # fmt: skip
def test_state_dicts_are_found_where_programs_put_them(
    tmp_path: Path, state: dict[str, Tensor], wrap: Any
) -> None:
    torch.save(wrap(state), tmp_path / "sam.pth")
    stored, report = checkpoint.convert_sam(tmp_path / "sam.pth", RefSAM.expected_tensors)
    assert stored.tensors.keys() == state.keys()
    assert all(torch.equal(stored.tensors[key], value) for key, value in state.items())
    assert len(report.ignored) <= 1


def test_a_file_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    torch.save({"ema": {"decay": 0.9}, "step": 4}, tmp_path / "sam.pth")
    with pytest.raises(CheckpointError, match=r"it holds 'ema', 'step'; wanted one of model_state"):
        checkpoint.convert_sam(tmp_path / "sam.pth", RefSAM.expected_tensors)


class Command:
    """A file that holds it would have the shell make a file."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.made}",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda s, x: x, lambda s, x: {"model": s, "hook": x}])
def test_a_command_in_a_file_is_named_and_not_run(
    tmp_path: Path, state: dict[str, Tensor], wrap: Any, zipped: bool
) -> None:
    content = wrap(state, Command(tmp_path / "made"))
    torch.save(content, tmp_path / "sam.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as error:
        checkpoint.convert_sam(tmp_path / "sam.pth", RefSAM.expected_tensors)
    assert str(error.value).startswith(f"{tmp_path / 'sam.pth'}: cannot be read (it would call ")
    assert not re.search("weights_only|\x1b|\n", str(error.value))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda s: nn.Linear(2, 2), "a torch.nn.modules.linear.Linear, whose code is never run: save its state_dict"),
        (lambda s: {"model": nn.Linear(2, 2)}, "it holds 'model'; wanted one of"),
        (lambda s: {"student": s, "teacher": s}, "it holds 'student', 'teacher'; wanted one of"),
        (lambda s: [s], r"not a state dict \(tensors by name\)$"),
        (lambda s: {k: x for k, x in s.items() if "neck" not in k}, "no usable 'image_encoder.neck.0.weight'"),
        (lambda s: {k: x for k, x in s.items() if "encoder" in k}, "no usable 'mask_decoder.transformer"),
        (lambda s: s | {"image_encoder.neck.1.bias": torch.ones(3)}, r"1 of another shape \(image_encoder.neck.1.bias"),
    ],
)  # fmt: skip
def test_other_content_is_refused_with_the_file_and_the_key(
    tmp_path: Path, state: dict[str, Tensor], content: Any, message: str
) -> None:
    torch.save(content(state), tmp_path / "sam.pth")
    with pytest.raises(CheckpointError, match=f"^{tmp_path / 'sam.pth'}: .*{message}"):
        checkpoint.convert_sam(tmp_path / "sam.pth", RefSAM.expected_tensors)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"a": 1}), r"\(torch.save did not write it\)"),
        (gzip.compress(b"weights"), r"\(torch.save did not write it\)"),
        (b"\x81\xa1a\x01", r"\(torch.save did not write it\)"),
        (b"PK\x03\x04" + bytes(600), "zip archive.*: download it again"),
    ],
    ids=["pickle", "gzip", "msgpack", "half-a-zip"],
)
def test_files_that_torch_did_not_write(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "sam.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"sam.pth: cannot be read .*{message}") as error:
        checkpoint.convert_sam(tmp_path / "sam.pth", RefSAM.expected_tensors)
    assert not re.search("weights_only|\x1b|\n", str(error.value))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "web page"),
        (b"\n<html lang=en>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"", "empty"),
        (b"x" * 600, "cannot be read"),
    ],
)
def test_what_downloads_leave_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "sam.pth").write_bytes(content)
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "config.json").write_text('{"model_type": "sam"}')
    for path in (tmp_path / "sam.pth", tmp_path):
        with pytest.raises(CheckpointError, match=message) as error:
            checkpoint.convert_sam(path, RefSAM.expected_tensors)
        assert "\x1b" not in str(error.value) and "\n" not in str(error.value)


def test_hugging_faces_sam_computes_the_same(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    config = transformers.SamConfig(
        vision_config={
            "hidden_size": 32, "output_channels": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": 64, "patch_size": 16, "window_size": 2, "global_attn_indexes": [2], "mlp_dim": 128, "num_pos_feats": 32,
        },
        prompt_encoder_config={"hidden_size": 64, "image_size": 64, "patch_size": 16, "image_embedding_size": 4},
        mask_decoder_config={"hidden_size": 64, "mlp_dim": 64, "iou_head_hidden_dim": 32},
    )  # fmt: skip
    other = transformers.SamModel(config).eval()
    nn.init.normal_(other.vision_encoder.pos_embed)
    for layer in other.vision_encoder.layers:
        nn.init.normal_(layer.attn.rel_pos_h), nn.init.normal_(layer.attn.rel_pos_w)
    other.save_pretrained(tmp_path / "hf")
    result = CliRunner().invoke(app, ["sam", str(tmp_path / "hf"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    model = RefSAM.from_pretrained(tmp_path / "out")
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = other.get_image_embeddings(pixels)
        got, _ = model.image_encoder(pixels)
    assert (got.permute(0, 3, 1, 2) - want).abs().max() < 1e-5
    theirs = dict(other.mask_decoder.named_parameters())
    ours = dict(model.mask_decoder.named_parameters())
    # As many of each shape, and the named ones equal: the rest is renamed one to one.
    assert sorted(p.shape for p in theirs.values()) == sorted(p.shape for p in ours.values())
    for one, another in {
        "iou_prediction_head.proj_out.weight": "iou_prediction_head.layers.2.weight",
        "output_hypernetworks_mlps.1.layers.0.weight": "output_hypernetworks_mlps.1.layers.1.weight",
        "upscale_conv2.weight": "output_upscaling.3.weight",
        "transformer.layers.1.layer_norm4.bias": "transformer.layers.1.norm4.bias",
        "transformer.layer_norm_final_attn.weight": "transformer.norm_final_attn.weight",
    }.items():
        assert torch.equal(theirs[one], ours[another])


def test_hugging_faces_other_models_and_shards(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="type 'bert', wanted sam"):
        checkpoint.convert_sam(tmp_path, RefSAM.expected_tensors)
    (tmp_path / "config.json").write_text('{"model_type": "sam"}')
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(CheckpointError, match="wanted one beside it"):
        checkpoint.convert_sam(tmp_path, RefSAM.expected_tensors)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="no weights in this folder"):
        checkpoint.convert_sam(empty, RefSAM.expected_tensors)


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("small", {"kind": "small", "width": 128}),
        ("roberta-base", {"kind": "roberta", "name": "FacebookAI/roberta-base", "width": 768}),
        ("google-t5/t5-small", {"kind": "t5", "width": 512}),
        ("a folder", {"kind": "t5", "width": 48}),
    ],
)
def test_convert_sam_names_the_text_encoder(
    tmp_path: Path, state: dict[str, Tensor], name: str, entries: dict[str, Any]
) -> None:
    torch.save(state, tmp_path / "sam.pth")
    if name == "a folder":
        name = str(tmp_path / "mine")
        Path(name).mkdir()
        Path(name, "config.json").write_text('{"model_type": "t5", "d_model": 48}')
    arguments = ["sam", tmp_path / "sam.pth", "--out", tmp_path / "out", "--text-encoder", name]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    encoder = vars(checkpoint.read_checkpoint(tmp_path / "out").config.text_encoder)
    assert encoder | entries == encoder


def test_convert_sam_refuses_a_text_encoder_that_is_none(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    torch.save(state, tmp_path / "sam.pth")
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    arguments = ["sam", tmp_path / "sam.pth", "--out", tmp_path / "out", "--text-encoder", tmp_path]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(result.exception, UserError)
    assert "wanted small, a folder or Hub id" in str(result.exception)
    assert not (tmp_path / "out").exists()
