"""Exported graphs against the model: torch.export and ONNX Runtime on the CPU; bad input."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from refsam.errors import UserError
from refsam.export import TOLERANCE, Graph, export_model, graphs_of
from refsam.export.files import compare, results_of
from refsam.model import RefSAM
from tests.tiny_model import tiny_detecting_model, tiny_model, tiny_trunk_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def model() -> RefSAM:
    """The fewest parts that have everything in them: exporting takes as long as there are nodes."""
    config = tiny_model().config.override(
        "image_encoder.depth=2", "image_encoder.global_blocks=[0,1]", "mask_decoder.depth=1"
    )
    torch.manual_seed(0)
    return RefSAM(config).eval()


@pytest.fixture(scope="module")
def exported(model: RefSAM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ONNX, the weights beside the graphs, as if they were too large."""
    folder = tmp_path_factory.mktemp("export") / "tiny"
    export_model(model, folder, formats=["onnx"], largest_single_file=1000)
    return folder


def session_of(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run(session: Any, **inputs: Tensor) -> list[Tensor]:
    feed = {name: tensor.numpy() for name, tensor in inputs.items()}
    return [torch.from_numpy(array) for array in session.run(None, feed)]


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE * float(wanted.abs().max()))


@torch.no_grad()
def test_a_video_by_onnx_runtime_is_the_models_own(model: RefSAM, exported: Path) -> None:
    """Three frames, with two expressions and with one, the track tokens handed on."""
    encoder, decoder = (
        session_of(exported / f"{name}.onnx") for name in ("image_encoder", "mask_decoder")
    )
    frames = torch.randint(0, 256, (3, 48, 64, 3), dtype=torch.uint8)
    for expressions in (["the red cup", "a dog on the left"], ["the box"]):
        text = model.encode_text(expressions)
        encoded = model.text_encoder(expressions)
        count = len(expressions)
        track, next_track = None, torch.zeros(count, 32)
        for index in range(len(frames)):
            pixels, _ = model.preprocess(frames[index : index + 1])
            image = model.encode_image(pixels)
            wanted = model.decode(image, text, None, track)
            (levels,) = run(encoder, pixels=pixels)
            assert_close(levels, image.levels)
            logits, iou, next_track = run(
                decoder,
                levels=levels,
                tokens=encoded.tokens,
                lengths=encoded.lengths,
                track=next_track,
                has_track=torch.full((count,), track is not None),
            )
            track = wanted.track_token
            for found, exact in zip(
                (logits, iou, next_track), (wanted.logits, wanted.iou, track), strict=True
            ):
                assert_close(found, exact)


@pytest.mark.parametrize("make", [tiny_trunk_model, tiny_detecting_model])
@torch.no_grad()
def test_a_trunks_maps_go_from_graph_to_graph(make: Callable[[], RefSAM]) -> None:
    model = make()
    encoder, decoder = graphs_of(model)
    assert encoder.outputs == ("levels", "fine", "names")
    pixels = torch.randn(1, 3, 64, 64)
    maps = dict(zip(encoder.outputs, encoder.module(pixels), strict=True))
    encoded = model.text_encoder(["the red cup", "a dog"])
    found = decoder.module(
        tokens=encoded.tokens,
        lengths=encoded.lengths,
        track=torch.zeros(2, 32),
        has_track=torch.zeros(2, dtype=torch.bool),
        **maps,
    )
    wanted = model.decode(model.encode_image(pixels), model.project_text(encoded))
    assert_close(found[0], wanted.logits)
    program = encoder.export()
    for name, map_ in zip(encoder.outputs, program.module()(pixels=pixels), strict=True):
        assert_close(map_, maps[name])


def test_no_operator_of_ours_is_left(exported: Path) -> None:
    for name in ("image_encoder", "mask_decoder"):
        graph = onnx.load(exported / f"{name}.onnx")
        onnx.checker.check_model(graph)
        assert {node.domain for node in graph.graph.node} <= {""}


def test_each_graph_holds_its_own_weights(model: RefSAM) -> None:
    encoder, decoder = ({name for name, _ in g.module.named_parameters()} for g in graphs_of(model))
    both = {f"model.{name}" for name, _ in model.named_parameters()}
    assert encoder | decoder == {name for name in both if "text_encoder" not in name}
    assert {name.split(".")[1] for name in encoder & decoder} == {"dense_attention"}


def test_facts_say_what_the_files_hold(model: RefSAM, exported: Path) -> None:
    facts = json.loads((exported / "export.json").read_text())
    assert facts["image_size"] == model.image_size
    assert facts["files"].keys() == {p.name for p in exported.iterdir()} - {"export.json"}
    decoder = facts["graphs"]["mask_decoder"]
    assert decoder["inputs"]["tokens"] == {
        "shape": ["expressions", "words", 32],
        "dtype": "float32",
    }
    assert decoder["outputs"]["logits"]["shape"] == ["expressions", 16, 16]
    assert 0 < decoder["onnx"]["largest_difference"] <= TOLERANCE
    session = session_of(exported / "mask_decoder.onnx")
    assert {i.name: i.shape for i in session.get_inputs()} == {
        name: entry["shape"] for name, entry in decoder["inputs"].items()
    }
    assert {i.name: i.shape for i in session.get_outputs()} == {
        name: entry["shape"] for name, entry in decoder["outputs"].items()
    }


def test_large_weights_lie_beside_the_graph(exported: Path) -> None:
    files = json.loads((exported / "export.json").read_text())["files"]
    for name in ("image_encoder.onnx", "mask_decoder.onnx"):
        assert files[f"{name}.data"] == (exported / f"{name}.data").stat().st_size > 10_000


@pytest.mark.slow
def test_torch_programs_replace_an_earlier_export(model: RefSAM, tmp_path: Path) -> None:
    model, out = tiny_model(), tmp_path / "out"
    out.mkdir()
    for name in ("notes.txt", "image_encoder.onnx", "export.json"):
        (out / name).write_text("mine")
    facts = export_model(model, out, formats=["torch"], overwrite=True)
    assert {path.name for path in out.iterdir()} == {
        "image_encoder.pt2", "mask_decoder.pt2", "export.json", "notes.txt"
    }  # fmt: skip
    for graph in graphs_of(model):
        assert facts["graphs"][graph.name]["torch"]["largest_difference"] <= TOLERANCE
        program = torch.export.load(out / f"{graph.name}.pt2")
        assert not [node for node in program.graph.nodes if "refsam_kernels" in str(node.target)]
    inputs = {**graph.inputs, "tokens": torch.randn(3, 9, 32), "lengths": torch.tensor([9, 2, 4])}
    with torch.no_grad():
        found, wanted = program.module()(**inputs), graph.module(**inputs)
    for ours, exact in zip(found, wanted, strict=True):
        assert_close(ours, exact)


@pytest.mark.slow
def test_the_bundled_model_through_the_command(tmp_path: Path) -> None:
    from refsam.cli import main

    out = tmp_path / "nano"
    result = CliRunner().invoke(main, ["export", "--out", str(out)])
    assert result.exit_code == 0, result.output
    facts = json.loads((out / "export.json").read_text())
    assert set(facts["files"]) == {
        f"{name}{suffix}" for name in facts["graphs"] for suffix in (".onnx", ".pt2")
    }
    for graph in facts["graphs"].values():
        assert graph["onnx"]["largest_difference"] <= TOLERANCE


@pytest.mark.parametrize("exists", [False, True], ids=["new", "overwritten"])
def test_a_failed_export_leaves_everything_as_it_was(
    model: RefSAM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    out = tmp_path / "out"
    if exists:
        out.mkdir()
        (out / "export.json").write_text("earlier")

    def fill_the_disk(program: object, graph: Graph, path: Path, limit: int) -> None:
        path.write_text("half")
        if graph.name == "mask_decoder":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Graph, "export", lambda self: None)
    monkeypatch.setattr("refsam.export.files._write", fill_the_disk)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        export_model(model, out, formats=["torch"], check=False, overwrite=exists)
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()] == (
        [Path("out/export.json")] if exists else []
    )


def test_results_that_differ_are_refused(model: RefSAM, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graphs_of(model)[0]
    wanted = results_of(graph, graph.module)
    monkeypatch.setattr(torch.export, "load", lambda path: SimpleNamespace(module=lambda: wrong))

    def wrong(pixels: Tensor) -> Tensor:
        return 1.001 * graph.module(pixels)

    with pytest.raises(UserError, match=r"image_encoder\.pt2: results differ by 1\.0e-03 of"):
        compare(graph, wanted, Path("image_encoder.pt2"))


def test_missing_packages_are_named(
    model: RefSAM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refsam.export.files.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs onnx, onnxscript, onnxruntime: pip install"):
        export_model(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "tflite"], "--format tflite: want onnx or torch"),
        (["--checkpoint", "micro"], "checkpoint: got 'micro', wanted a bundled name"),
        (["--image-size", "100"], "image size must be a multiple of patch size"),
        (["--out", "."], "exists; wanted a new folder, or --overwrite"),
        (["--out", "a_file/deeper"], "cannot be written"),
    ],
)
def test_the_command_refuses_in_words(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from refsam.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    result = CliRunner().invoke(main, ["export", "--out", "out", *arguments])
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


def test_models_that_cannot_be_exported(model: RefSAM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="formats: got"):
        export_model(model, tmp_path / "out", formats=["tensorrt"])
    with pytest.raises(ValueError, match=r"model: got one in training mode"):
        export_model(tiny_model().train(), tmp_path / "out")
    with pytest.raises(ValueError, match=r"model: got cpu, torch\.float64"):
        export_model(tiny_model().double(), tmp_path / "out")
