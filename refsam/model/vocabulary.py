"""The words of a small text encoder that is trained already: more of them, and those that it was not taught."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from refsam.config import SmallTextConfig
from refsam.model.refsam import RefSAM
from refsam.model.text_encoder import PADDING, UNKNOWN, SmallTextEncoder, word_tokenizer

_NOISE = 0.1  # of a new row, beside the norm of what it begins as: words of one meaning may part in training


def mark_untaught(model: RefSAM, words: Iterable[str]) -> None:
    """Have a model say of these words, and no others, that it does not know the things that they name.

    It is kept in the model's configuration. Raises ValueError for a model without a small text encoder.
    """
    sizes, encoder = model.config.text_encoder, model.text_encoder
    if not (isinstance(sizes, SmallTextConfig) and isinstance(encoder, SmallTextEncoder)):
        raise ValueError("model: has no small text encoder, so no list of words")
    ordered = tuple(sorted(set(words)))
    model.config = replace(model.config, text_encoder=replace(sizes, untaught=ordered))
    encoder.untaught = frozenset(ordered)
    encoder.clear_cache()


@torch.no_grad()
def extend_vocabulary(
    encoder: SmallTextEncoder,
    words: Iterable[str],
    relatives: Mapping[str, Sequence[str]] | None = None,
) -> list[str]:
    """Teach the encoder that these words exist; returns those that are new, in their order.

    Known words keep their identifiers and their rows, so expressions of known words mean what they meant, bit by bit. A new
    word's row begins as the mean of the rows of its `relatives`, or else of [UNK], with a little noise drawn from torch's
    default generator. Optimisers must be built after it.
    """
    old = encoder.tokenizer.get_vocab()
    new = [word for word in dict.fromkeys(w.lower() for w in words) if word not in old]
    ordered = sorted(old.keys() - {PADDING, UNKNOWN}, key=lambda word: old[word])
    encoder.tokenizer = word_tokenizer([*ordered, *new])
    identifiers = encoder.tokenizer.get_vocab()
    rows = torch.cat(
        [encoder.words.weight, encoder.words.weight.new_zeros(len(new), encoder.width)]
    )
    unknown = rows[identifiers[UNKNOWN]]
    for word in new:
        known = [identifiers[w] for w in (relatives or {}).get(word, ()) if w in old]
        begin = rows[known].mean(0) if known else unknown
        noise = torch.randn_like(begin) * (_NOISE * begin.norm() / begin.numel() ** 0.5)
        rows[identifiers[word]] = begin + noise
    encoder.words = nn.Embedding.from_pretrained(
        rows, freeze=not encoder.words.weight.requires_grad
    )
    encoder.clear_cache()
    return new
