"""The vocabulary of a trained small text encoder: add words, and list words that it was not taught."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from refsam.config import SmallTextConfig
from refsam.model.refsam import RefSAM
from refsam.model.text_encoder import PADDING, UNKNOWN, SmallTextEncoder, word_tokenizer

_NOISE = 0.1  # relative to the start's norm: it lets synonyms diverge in training


def mark_untaught(model: RefSAM, words: Iterable[str]) -> None:
    """Mark exactly these words as unknown to the model: it refuses them, or answers with a note.

    The list is stored in the model's configuration. Raises ValueError for a model without a small text encoder.
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
    """Add words to the encoder's vocabulary; returns the new ones, in their order.

    Known words keep their identifiers and embeddings, so expressions of known words give the same bits. A new word's
    embedding starts as the mean of those of its `relatives`, else as that of [UNK], with a little noise from torch's
    default generator. Build optimisers afterwards.
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
