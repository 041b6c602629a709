"""EVF-SAM from a folder to masks: reading what is published, sessions, the command line, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from refsam import EVFSAM, RefSAM, VideoSession, load_model
from refsam.checkpoint import read_evf
from refsam.cli import main
from refsam.errors import CheckpointError, ExpressionError
from refsam.session import FrameGraphs, step_batch
from tests.evf_folder import tiny_evf_config, write_evf, write_tokenizer
from tests.golden import relative_error
from tests.session import cuda_stand_in
from tests.video.clips import write_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_evf(tmp_path_factory.mktemp("hub") / "evf")


@pytest.fixture(scope="module")
def model(folder: Path) -> EVFSAM:
    found = load_model(folder)
    assert isinstance(found, EVFSAM)
    return found


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4")


def frame(seed: int = 0, size: tuple[int, int] = (90, 120)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.mark.parametrize("weights", ["safetensors", "sharded", "bin"])
def test_every_kind_of_file_is_read(weights: str, tmp_path: Path, model: EVFSAM) -> None:
    found = EVFSAM.from_pretrained(write_evf(tmp_path / "evf", weights))
    assert found.config == model.config == tiny_evf_config()
    assert not found.training
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_convert_and_read_back(dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    name = str(dtype).removeprefix("torch.")
    out = tmp_path / "converted"
    result = CliRunner().invoke(
        main, ["convert", "evf", str(folder), "--out", str(out), "--dtype", name]
    )
    assert result.exit_code == 0, result.output
    assert "ignored: 2" in result.output
    found = load_model(out)
    assert isinstance(found, EVFSAM)
    assert found.dtype == dtype
    assert found.encode_text(["the dog"]).lengths.tolist() == [4]


def test_sessions_run_it(model: EVFSAM) -> None:
    texts = ["the red dog", "the cat on the left"]
    session = VideoSession(model, texts, optimize=False)
    first, again = session.step(frame()), session.step(frame())
    assert first.masks.shape == (2, 90, 120)
    assert torch.equal(first.logits, again.logits)  # no memory
    pixels, _ = model.preprocess(torch.from_numpy(frame())[None])
    image = model.encode_image(pixels, model.view(torch.from_numpy(frame())[None]))
    for row, text in enumerate(texts):
        alone = model.decode(image, model.encode_text([text])).logits[0]
        assert relative_error(first.logits[row], alone) <= 1e-5


def test_frames_of_several_videos_in_one_batch(model: EVFSAM) -> None:
    sizes = [(90, 120), (64, 40)]
    sessions = [VideoSession(model, [text], optimize=False) for text in ("the dog", "a red cup")]
    frames = [frame(seed, size) for seed, size in enumerate(sizes)]
    together = step_batch(list(zip(sessions, frames, strict=True)))
    for session, image, found in zip(sessions, frames, together, strict=True):
        alone = session.step(image)
        assert found.masks.shape[1:] == image.shape[:2]
        assert relative_error(found.logits, alone.logits) <= 1e-5


def test_packed_weights(folder: Path) -> None:
    model, pixels = load_model(folder), torch.from_numpy(frame())[None]
    inputs = model.preprocess(pixels)[0], model.view(pixels)
    text = model.encode_text(["the dog", "a red cup on the left"])
    with torch.no_grad():
        index = torch.tensor([0, 0])
        plain = model.decode(model.encode_image(*inputs), text, index).logits
        for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
            model.optimize(dtype)
            packed = model.decode(model.encode_image(*inputs), text, index).logits
            assert relative_error(packed, plain) <= limit
        model.deoptimize()
        assert torch.equal(model.decode(model.encode_image(*inputs), text, index).logits, plain)


def test_semantic_prefix(folder: Path) -> None:
    model = load_model(folder)
    assert isinstance(model, EVFSAM)
    plain = model.encode_text(["the dog"])
    model.semantic = True
    prefixed = model.encode_text(["the dog"])
    assert prefixed.lengths.tolist() == [5]
    assert prefixed.words.shape[1] == plain.words.shape[1] + 1


def test_command_line(folder: Path, clip: Path, tmp_path: Path) -> None:
    arguments = ["--text", "the dog", "--text", "a red cup", "--checkpoint", str(folder)]
    for name, more in (("one", []), ("semantic", ["--semantic"])):
        out = tmp_path / name
        result = CliRunner().invoke(
            main, ["segment", str(clip), *arguments, "--out", str(out), *more]
        )
        assert result.exit_code == 0, result.output
        report = json.loads((out / "result.json").read_text())
        assert [each["text"] for each in report["expressions"]] == ["the dog", "a red cup"]
        masks = sorted((out / "masks" / "01").iterdir())
        assert len(masks) == report["frames"]
        assert set(np.unique(np.array(Image.open(masks[0])))) <= {0, 255}
    many = CliRunner().invoke(
        main, ["segment-videos", str(clip), *arguments, "--out", str(tmp_path / "many")]
    )
    assert many.exit_code == 0, many.output


def test_semantic_is_for_evf_sam_only(clip: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main,
        ["segment", str(clip), "--text", "red", "--out", str(tmp_path / "o"), "--semantic"],
    )
    assert result.exit_code == 2
    assert "--semantic" in result.output
    assert "EVF-SAM" in result.output


@pytest.mark.parametrize("text", ["", "   ", "dog " * 1100])
def test_expressions_that_cannot_be_read(model: EVFSAM, text: str) -> None:
    with pytest.raises(ExpressionError, match="expression: got"):
        model.encode_text([text])


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    folder = write_evf(tmp_path / "evf")
    write_tokenizer(folder, [f"word{index}" for index in range(200)])
    with pytest.raises(CheckpointError, match=r"gives token \d+, the model has 100"):
        load_model(folder).encode_text(["word150"])
    text = (folder / "tokenizer.json").read_text().replace("<pad>", "<other>")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="not BEiT-3's"):
        load_model(folder)


def remove(name: str) -> object:
    return lambda folder: (folder / name).unlink()


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("config", "harm", "says"),
    [
        ({"sam_scale": "large"}, None, "sam_scale in config.json is 'large', wanted 'huge'"),
        ({"sam_scale": "efficient"}, None, "SAM 2 or EfficientSAM"),
        ({}, remove("tokenizer.json"), "no tokenizer"),
        ({}, remove("model.safetensors"), "no weights, wanted"),
        ({}, truncate, "cannot be read"),
    ],
)
def test_folders_that_are_refused(
    config: dict, harm: object, says: str, clip: Path, tmp_path: Path
) -> None:
    folder = write_evf(tmp_path / "evf", **config)
    if harm is not None:
        harm(folder)  # type: ignore[operator]
    result = CliRunner().invoke(
        main,
        [
            "segment",
            str(clip),
            "--text",
            "dog",
            "--out",
            str(tmp_path / "o"),
            "--checkpoint",
            str(folder),
        ],
    )
    assert result.exit_code == 2, result.output
    assert says in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_missing_shard_and_foreign_tensors(tmp_path: Path) -> None:
    folder = write_evf(tmp_path / "evf", "sharded")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors"):
        read_evf(folder)
    whole = write_evf(tmp_path / "whole", "bin")
    tensors = torch.load(whole / "pytorch_model.bin", weights_only=True)
    torch.save(tensors | {"visual_model.memory": torch.zeros(1)}, whole / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"1 unexpected \(memory\)"):
        load_model(whole)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    folder = write_evf(tmp_path / "evf", "bin")
    torch.save({"x": Path("x")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load_model(folder)


def test_the_other_class_is_named(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"use refsam\.load_model"):
        RefSAM.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="wanted EVF-SAM"):
        EVFSAM.from_pretrained("nano")


def test_hub_without_a_network_names_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        CheckpointError, match=r"huggingface\.co/YxZhang/evf-sam-multitask"
    ) as error:
        load_model("YxZhang/evf-sam-multitask", local_files_only=True)
    assert "config.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_sentencepiece_model(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = write_evf(tmp_path / "evf")
    (folder / "tokenizer.json").unlink()
    lines = [
        " ".join(np.random.default_rng(s).permutation("the red dog a cat on left two cups".split()))
        for s in range(400)
    ]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "beit3"),
        vocab_size=28,
        minloglevel=2,
    )
    (tmp_path / "beit3.model").rename(folder / "beit3.spm")
    original = sentencepiece.SentencePieceProcessor(model_file=str(folder / "beit3.spm"))
    model = load_model(folder)
    assert isinstance(model, EVFSAM)
    for text in ("the red dog", "two  cats on a zebra", "The DOG, left!"):
        pieces = [piece + 1 if piece else 3 for piece in original.encode(text)]
        assert model._ids(text) == [0, *pieces, 2]


def test_export(folder: Path, model: EVFSAM, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    arguments = ["export", "--checkpoint", str(folder), "--out", str(out), "--format", "onnx"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    facts = json.loads((out / "export.json").read_text())
    assert facts["text_encoder"] == "beit3"
    assert [*facts["graphs"]["image_encoder"]["inputs"]] == ["pixels", "view"]
    decoder = facts["graphs"]["mask_decoder"]
    assert decoder["inputs"]["ids"]["shape"] == ["expressions", "words"]
    assert decoder["onnx"]["largest_difference"] <= facts["tolerance"]


def test_cuda_graphs(model: EVFSAM, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_stand_in.install(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(EVFSAM, "device", torch.device("cuda", 0))
        graphs = FrameGraphs(model)
    texts = ["the dog", "a red cup on the left", "the cat"]
    plain = VideoSession(model, texts, optimize=False)
    recorded = VideoSession(model, texts, optimize=False, graphs=graphs)
    for seed in range(3):
        wanted, found = plain.step(frame(seed)).logits, recorded.step(frame(seed)).logits
        assert relative_error(found, wanted) <= 1e-5
    assert graphs.count == 2


def test_evaluation_runs_it(folder: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    arguments = ["evaluate", "generated", "--checkpoint", str(folder), "--clips", "1"]
    result = CliRunner().invoke(main, [*arguments, "--json", str(scores)])
    assert result.exit_code == 0, result.output
    assert json.loads(scores.read_text())["clips"] == 1
