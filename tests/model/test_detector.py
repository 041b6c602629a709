"""The detector: the published network's boxes, and what they say of places."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from refsam.config import RefSAMConfig
from refsam.data.photographs.words import load_words
from refsam.errors import CheckpointError, ConfigError
from refsam.model.detector import DETECTOR_CLASSES, Boxes, Detector, box_maps
from refsam.model.detector_weights import load_detector
from refsam.model.trunk import TRUNK_CLASSES, Conv, pack_convolutions
from refsam.model.vocabulary import extend_vocabulary
from refsam.training.noun_loss import NounLoss
from tests.tiny_model import tiny_detecting_model, tiny_model, tiny_trunk_model

# Where the published graph lies; it is no part of the project.
WEIGHTS = os.environ.get("REFSAM_DETECTOR_WEIGHTS")


def write_graph(path: Path, detector: Detector) -> Path:
    """A graph with the detector's convolutions, blue first as in the published one."""
    onnx = pytest.importorskip("onnx")
    nodes, tensors = [], []
    for number, conv in enumerate(m for m in detector.modules() if isinstance(m, Conv)):
        assert conv.bias is not None
        weight = conv.weight.detach()
        if number == 0:
            weight = weight.unflatten(1, (4, 3)).flip(2).flatten(1, 2)
        for kind, tensor in (("w", weight), ("b", conv.bias.detach())):
            tensors.append(onnx.numpy_helper.from_array(tensor.numpy(), f"{kind}{number}"))
        names = ["x", f"w{number}", f"b{number}"]
        nodes.append(onnx.helper.make_node("Conv", names, [f"y{number}"]))
    graph = onnx.helper.make_graph(nodes, "detector", [], [], tensors)
    onnx.save(onnx.helper.make_model(graph), str(path))
    return path


def test_parameters_and_classes_are_those_published() -> None:
    assert sum(p.numel() for p in Detector().parameters()) == 904_463
    assert len(set(DETECTOR_CLASSES)) == 80
    assert set(DETECTOR_CLASSES) <= set(load_words().classes)


@pytest.mark.skipif(not WEIGHTS, reason="REFSAM_DETECTOR_WEIGHTS names no published graph")
@torch.no_grad()
def test_boxes_are_those_of_the_published_graph() -> None:
    runtime = pytest.importorskip("onnxruntime")
    model = tiny_detecting_model()
    load_detector(model, str(WEIGHTS))
    pixels = 255 * torch.rand(1, 3, 416, 416, generator=torch.Generator().manual_seed(0))
    session = runtime.InferenceSession(WEIGHTS, providers=["CPUExecutionProvider"])
    published = torch.from_numpy(session.run(None, {"images": pixels.flip(1).numpy()})[0])
    found = model.trunk.detector(pixels)
    torch.testing.assert_close(
        found.scores, published[..., 4:5] * published[..., 5:], atol=1e-5, rtol=1e-5
    )
    places = [
        (x * stride, y * stride, stride)
        for stride in (8, 16, 32)
        for y in range(416 // stride)
        for x in range(416 // stride)
    ]
    x, y, stride = torch.tensor(places).float().T[:, None]
    middle = published[..., :2] * stride[..., None] + torch.stack([x, y], -1)
    half = published[..., 2:4].exp() * stride[..., None] / 2
    wanted = torch.cat([middle - half, middle + half], -1)
    torch.testing.assert_close(found.corners, wanted, atol=1e-2, rtol=1e-4)


@torch.no_grad()
def test_a_graph_is_read_and_another_network_s_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(3)
    source, model = Detector(), tiny_detecting_model()
    path = write_graph(tmp_path / "detector.onnx", source)
    load_detector(model, path)
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.trunk.detector.state_dict()[name], tensor), name
    with pytest.raises(CheckpointError, match="the model has none"):
        load_detector(tiny_trunk_model(), path)
    with pytest.raises(CheckpointError, match="the model has none"):
        load_detector(tiny_model(), path)
    source.stem = Conv(12, 8, 3)
    with pytest.raises(CheckpointError, match="wanted YOLOX-Nano's 113"):
        load_detector(model, write_graph(path, source))
    path.write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match="cannot be read as ONNX"):
        load_detector(model, path)
    with pytest.raises(CheckpointError, match="nowhere"):
        load_detector(model, tmp_path / "nowhere.onnx")


@torch.no_grad()
def test_places_learn_of_the_boxes_that_they_lie_in() -> None:
    """One sure dog over the left half of a frame of 4 x 2 places, a weak cat over the right one."""
    scores = torch.zeros(1, 2, 80)
    dog, cat = DETECTOR_CLASSES.index("dog"), DETECTOR_CLASSES.index("cat")
    scores[0, 0, dog], scores[0, 1, cat] = 0.9, 0.5
    corners = torch.tensor([[[-8.0, -8, 32, 40], [32, -8, 72, 40]]])
    maps = box_maps(Boxes(corners, scores), 32, 64, 16)
    names = maps.names.view(2, 4, 80)
    torch.testing.assert_close(names[:, 0, dog], torch.full((2,), 4 * (0.9 - 0.2)))
    torch.testing.assert_close(names[:, 2:, dog], torch.full((2, 2), 4 * (0.0 - 0.2)))
    torch.testing.assert_close(names[:, 3, cat], torch.full((2,), 4 * (0.5 - 0.2)))
    # The trunk has no score for forks: the detector's counts three times as much.
    torch.testing.assert_close(
        names[..., DETECTOR_CLASSES.index("fork")], torch.full((2, 4), 12 * (0.0 - 0.2))
    )
    best = maps.best.view(2, 4, 7)
    torch.testing.assert_close(best[0, 0, 0], torch.tensor(0.9))
    # Middle at (12, 16) of 64 x 32, sides of 40 and 48; the first place's middle lies at (8, 8).
    wanted = torch.tensor([12 / 64 - 0.5, 0, 40 / 64, 48 / 32, -4 / 40, -8 / 48])
    torch.testing.assert_close(best[0, 0, 1:], 0.9 * wanted)


@pytest.mark.parametrize("size", [(48, 64), (16, 64), (64, 32)])
@torch.no_grad()
def test_a_detector_changes_no_token_at_first_and_adds_names(size: tuple[int, int]) -> None:
    model, bare = tiny_detecting_model(), tiny_trunk_model()
    torch.nn.init.zeros_(model.trunk.boxes.weight)
    common = {
        k: v for k, v in model.state_dict().items() if "detector" not in k and "boxes" not in k
    }
    bare.load_state_dict({k: v for k, v in common.items() if ".classes." not in k})
    pixels = torch.randn(1, 3, *size)
    found, wanted = model.encode_image(pixels), bare.encode_image(pixels)
    assert torch.equal(found.levels, wanted.levels)
    assert torch.equal(found.names[..., :128], wanted.names)
    assert found.names.shape == (1, size[0] * size[1] // 256, 208)


@torch.no_grad()
def test_packed_convolutions_find_the_same() -> None:
    torch.manual_seed(2)
    detector = Detector().eval()
    pixels = 255 * torch.rand(1, 3, 64, 96)
    plain = detector(pixels)
    pack_convolutions(detector)
    for found, wanted in zip(detector(pixels), plain, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_nothing_of_the_detector_is_trained() -> None:
    model = tiny_detecting_model().train()
    image = model.encode_image(torch.randn(1, 3, 32, 64))
    model.noun_match(
        model.encode_text(["the dog"]), image.names, torch.zeros(1).long()
    ).sum().backward()
    assert not any(p.requires_grad for p in model.trunk.detector.parameters())
    assert model.noun_match.classes.last.weight.grad.abs().sum() > 0


def test_nouns_ask_for_their_class_of_the_detector() -> None:
    model = tiny_detecting_model().train()
    extend_vocabulary(model.text_encoder, load_words().vocabulary())
    loss = NounLoss(model)
    wanted = {
        text: row.nonzero().flatten().tolist()
        for text, row in zip(loss.texts, loss.wanted, strict=True)
    }
    assert wanted["the fork"] == [21 + DETECTOR_CLASSES.index("fork")]
    assert wanted["the swan"] == [
        0,
        TRUNK_CLASSES.index("bird"),
        21 + DETECTOR_CLASSES.index("bird"),
    ]
    assert wanted["the shirt"] == []
    before = loss(model)
    before.backward()
    optimiser = torch.optim.SGD(model.noun_match.parameters(), 1e-2)
    optimiser.step()
    assert loss(model) < before


def test_a_detector_wants_a_trunk() -> None:
    with pytest.raises(ConfigError, match="detector must be beside a trunk"):
        RefSAMConfig.preset("vit_b").override("image_encoder.detector=true")


@torch.no_grad()
def test_a_dilated_convolution_for_training_is_the_same() -> None:
    torch.manual_seed(4)
    conv = Conv(6, 6, 3, dilation=2, groups=6, activation="relu6")
    for size in ((8, 10), (7, 9)):
        x = torch.randn(2, 6, *size)
        with torch.enable_grad():
            y = conv(x.requires_grad_())
            (gradient,) = torch.autograd.grad(y.sum(), x)
        wanted = F.relu6(F.conv2d(x, conv.weight, conv.bias, 1, 2, 2, 6))
        np.testing.assert_allclose(y.numpy(force=True), wanted.numpy(force=True), atol=1e-5)
        with torch.enable_grad():
            plain = F.relu6(F.conv2d(x, conv.weight, conv.bias, 1, 2, 2, 6))
            (same,) = torch.autograd.grad(plain.sum(), x)
        torch.testing.assert_close(gradient, same, atol=1e-5, rtol=1e-5)
