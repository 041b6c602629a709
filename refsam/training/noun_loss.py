"""Teaches which of the trunk's published classes a noun means, without any picture."""

import torch
from torch import Tensor, nn

from refsam.data.photographs.words import load_words, split_words
from refsam.model import RefSAM, SmallTextEncoder
from refsam.model.trunk_features import NAME_CHANNELS
from refsam.model.trunk_weights import TRUNK_CLASSES


class NounLoss:
    """Loss that makes "the swan" ask for the score of birds over that of the background; a mask loss alone learns it late.

    Of the list's nouns those count of which the text encoder knows every word.
    """

    def __init__(self, encoder: nn.Module) -> None:
        number = {name: index for index, name in enumerate(TRUNK_CLASSES)}
        rows: list[tuple[str, list[int]]] = []
        for noun in load_words().nouns:
            known = [number[name] for name in noun.classes if name in number]
            rows += [(f"the {noun.word}", known), (f"the {noun.plural}", known)]
        if isinstance(encoder, SmallTextEncoder):
            words = encoder.tokenizer.get_vocab()
            rows = [(text, known) for text, known in rows if words.keys() >= {*split_words(text)}]
        self.texts = [text for text, _ in rows]
        self.wanted = torch.zeros(len(rows), len(TRUNK_CLASSES))
        for row, (_, known) in zip(self.wanted, rows, strict=True):
            row[known] = 1.0
            row[0] = -1.0 if known else 0.0

    def __call__(self, model: RefSAM) -> Tensor:
        """Scalar: squared errors of the wanted scores, summed over the classes, mean over the nouns."""
        assert model.noun_match is not None
        wanted = self.wanted.to(model.device)
        scores = torch.eye(NAME_CHANNELS, device=model.device)[: len(TRUNK_CLASSES)]
        image = torch.zeros(len(self.texts), dtype=torch.long, device=model.device)
        found = model.noun_match(model.encode_text(self.texts), scores[None], image)
        return (found - wanted).square().sum(1).mean()
