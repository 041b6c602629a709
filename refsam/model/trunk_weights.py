"""Gives a new model's trunk the published weights, and their class scores to the names that nouns are compared with."""

from pathlib import Path

import torch

from refsam.checkpoint.files import check_keys, read_safetensors
from refsam.errors import CheckpointError
from refsam.model.refsam import RefSAM
from refsam.model.trunk import TRUNK_CLASSES

SCORE_SCALE = 0.2  # of the published scores among the names
_NAME_SCALE = 0.1  # of the names without a class
# How much the match weighs in the logits: models trained on figures firmly reject every unknown noun.
_GAIN = 3.0
_CLASSIFIER = "classifier."


@torch.no_grad()
def load_trunk(model: RefSAM, path: str | Path) -> None:
    """Begin with the weights of `mobilenet_v2_deeplab_voc`, a safetensors file.

    The first names become the published class scores, and masks are raised where they match the noun. Raises
    CheckpointError where the file cannot be read or is of another network, or the model has no trunk.
    """
    if model.trunk is None or model.noun_match is None or model.outlines is None:
        raise CheckpointError("trunk: the model has none, want image_encoder.trunk_width over 0")
    tensors = read_safetensors(Path(path))
    network = model.trunk.network
    classifier = {k: t for k, t in tensors.items() if k.startswith(_CLASSIFIER)}
    features = {k: t for k, t in tensors.items() if k not in classifier}
    names = model.trunk.names
    weight, bias = (classifier.get(f"{_CLASSIFIER}{kind}") for kind in ("weight", "bias"))
    if weight is None or bias is None or len(bias) != len(TRUNK_CLASSES):
        raise CheckpointError(
            f"{path}: wanted class scores of {len(TRUNK_CLASSES)} classes (classifier.weight, .bias)"
        )
    try:
        check_keys(features, network.state_dict())
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    network.load_state_dict(features)
    names.weight.mul_(_NAME_SCALE)
    names.bias.zero_()
    count, context = weight.shape[:2]
    names.weight[:count] = 0
    names.weight[:count, -context:] = SCORE_SCALE * weight.flatten(1)
    names.bias[:count] = SCORE_SCALE * bias
    model.outlines.condition.last.bias[-1] = _GAIN
