"""Gives a new model's detector the published weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refsam.errors import CheckpointError
from refsam.model.refsam import RefSAM
from refsam.model.trunk import Conv


@torch.no_grad()
def load_detector(model: RefSAM, path: str | Path) -> None:
    """Load the weights of `yolox_nano.onnx` (Apache-2.0), whose convolutions have the same order as `Detector`'s.

    Raises CheckpointError if the file cannot be read or is of another network, or if the model has no detector.
    """
    if model.trunk is None or model.trunk.detector is None:
        raise CheckpointError("detector: the model has none, want image_encoder.detector true")
    weights = _convolutions(Path(path))
    layers = [module for module in model.trunk.detector.modules() if isinstance(module, Conv)]
    shapes = [(w.shape, b.shape) for w, b in weights]
    if shapes != [(conv.weight.shape, conv.bias.shape) for conv in layers if conv.bias is not None]:
        raise CheckpointError(
            f"{path}: got {len(weights)} convolutions, wanted YOLOX-Nano's {len(layers)} with their sizes"
        )
    for conv, (weight, bias) in zip(layers, weights, strict=True):
        assert conv.bias is not None
        conv.weight.copy_(weight)
        conv.bias.copy_(bias)
    stem = model.trunk.detector.stem.weight
    # It was published for blue, green, red.
    stem.copy_(stem.unflatten(1, (-1, 3)).flip(2).flatten(1, 2))


def _convolutions(path: Path) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of each convolution of a graph, in its order."""
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    except ImportError as error:
        raise CheckpointError(
            f"detector: reading {path} needs onnx ({error}): pip install 'refsam[export]'"
        ) from error
    try:
        graph = onnx.load(str(path)).graph
    except (OSError, DecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as ONNX ({error})") from None
    stored = {tensor.name: tensor for tensor in graph.initializer}
    names = [node.input[1:] for node in graph.node if node.op_type == "Conv"]
    if any(len(row) != 2 or not stored.keys() >= set(row) for row in names):
        raise CheckpointError(f"{path}: has convolutions without stored weight and bias")
    return [(_tensor(stored[weight]), _tensor(stored[bias])) for weight, bias in names]


def _tensor(stored: Any) -> Tensor:
    from onnx import numpy_helper

    return torch.tensor(numpy_helper.to_array(stored))
