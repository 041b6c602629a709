"""Teaches, without pictures, which published classes of the trunk and the detector a noun means."""

from collections.abc import Sequence

import torch
from torch import Tensor

from refsam.data.photographs.words import load_words, split_words
from refsam.model import RefSAM, SmallTextEncoder
from refsam.model.detector import DETECTOR_CLASSES
from refsam.model.trunk import TRUNK_CLASSES
from refsam.model.trunk_features import NAME_CHANNELS, name_channels

_SURE = 1e-3


class NounLoss:
    """Loss that ties "the swan" to the score of birds minus that of the background; a mask loss alone learns this late.

    Only nouns of the list whose every word the text encoder knows are used.
    """

    def __init__(self, model: RefSAM) -> None:
        encoder = model.text_encoder
        rows = [
            (f"the {text}", n.classes) for n in load_words().nouns for text in (n.word, n.plural)
        ]
        if isinstance(encoder, SmallTextEncoder):
            words = encoder.tokenizer.get_vocab()
            rows = [(text, known) for text, known in rows if words.keys() >= {*split_words(text)}]
        self.texts = [text for text, _ in rows]
        of_trunk = torch.stack([_marked(TRUNK_CLASSES, known) for _, known in rows])
        of_trunk[:, 0] = -of_trunk.any(1).float()  # less the background's score
        self.wanted = of_trunk
        if model.config.image_encoder.detector:
            of_boxes = torch.stack([_marked(DETECTOR_CLASSES, known) for _, known in rows])
            self.wanted = torch.cat([of_trunk, of_boxes], 1)

    def __call__(self, model: RefSAM) -> Tensor:
        """Scalar: squared errors of the trunk's scores plus cross entropy of the detector's classes, averaged over the nouns."""
        assert model.noun_match is not None
        wanted = self.wanted.to(model.device)
        channels = name_channels(model.config.image_encoder.detector)
        of_trunk = torch.arange(len(TRUNK_CLASSES), device=model.device)
        of_boxes = torch.arange(NAME_CHANNELS, channels, device=model.device)
        scores = torch.eye(channels, device=model.device)[torch.cat([of_trunk, of_boxes])]
        image = torch.zeros(len(self.texts), dtype=torch.long, device=model.device)
        found = model.noun_match(model.encode_text(self.texts), scores[None], image)
        count = len(TRUNK_CLASSES)
        errors = (found - wanted)[:, :count].square().sum(1)
        return (errors + _surprise(found[:, count:].float(), wanted[:, count:]).sum(1)).mean()


def _surprise(chances: Tensor, wanted: Tensor) -> Tensor:
    """Binary cross entropy of chances in 0..1, whose gradient stays finite at both ends."""
    chances = _SURE + (1 - 2 * _SURE) * chances
    return -torch.where(wanted > 0, chances, 1 - chances).log()


def _marked(classes: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """One for each of the classes that is wanted, else zero."""
    return torch.tensor([float(name in wanted) for name in classes])
