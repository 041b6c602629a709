"""Builds the model of a run, and checks that its text encoder can take every expression."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

import torch

from refsam import checkpoint
from refsam.checkpoint import Checkpoint
from refsam.config import RefSAMConfig, config_to_dict
from refsam.data import Expression, ReferringDataset
from refsam.data.generated.grammar import vocabulary
from refsam.data.mirroring import mirrored
from refsam.data.photographs.scenes import SceneDrawer
from refsam.data.photographs.words import load_words
from refsam.errors import ConfigError, ExpressionError, UserError, named
from refsam.model import RefSAM, SmallTextEncoder, word_tokenizer
from refsam.model.detector_weights import load_detector
from refsam.model.text_encoder import CachedTextEncoder
from refsam.model.trunk_weights import load_trunk
from refsam.model.vocabulary import extend_vocabulary, mark_untaught
from refsam.training.batches import open_photographs
from refsam.training.configuration import leaves
from refsam.training.module import TrainingModule
from refsam.training.settings import TrainingSettings

_NAMED = 8


def build_model(
    settings: TrainingSettings, datasets: Sequence[ReferringDataset], drawer: SceneDrawer | None
) -> RefSAM:
    """Build a new model or load the one to start from; a small text encoder learns every word of the data.

    With `init_from`, the entries of `model` are put over that checkpoint's configuration. Raises UserError where its weights
    do not fit them.
    """
    words = [] if drawer is None else drawer.folder.vocabulary()
    known = [*vocabulary(), *words, *_words(datasets)]
    if settings.init_from is None:
        model = RefSAM(settings.architecture, tokenizer=word_tokenizer(known))
        if settings.trunk is not None:
            load_trunk(model, settings.trunk)
        if settings.detector is not None:
            load_detector(model, settings.detector)
        return model
    stored = checkpoint.load(settings.init_from, sam=settings.sam)
    model = RefSAM.from_checkpoint(_changed(stored, settings, known))
    if isinstance(model.text_encoder, SmallTextEncoder) and stored.tokenizer is not None:
        mark_untaught(model, ())  # training may teach anything
        new = [*words, *_words(datasets)]
        if drawer is not None:
            extend_vocabulary(model.text_encoder, new, load_words().relatives())
        elif not model.text_encoder.tokenizer.get_vocab().keys() >= set(new):
            extend_vocabulary(model.text_encoder, new)
    return model


def _changed(stored: Checkpoint, settings: TrainingSettings, known: Sequence[str]) -> Checkpoint:
    """The checkpoint with the entries of `model` put over its configuration."""
    config = settings.changed_architecture(stored.config)
    assert isinstance(stored.config, RefSAMConfig)
    if stored.kind == "sam":
        is_small = config.text_encoder.kind == "small"
        tokenizer = word_tokenizer(known).to_str() if is_small else None
        return replace(stored, config=config, tensors=_fitted(stored, config), tokenizer=tokenizer)
    before, now = (leaves(config_to_dict(each)) for each in (stored.config, config))
    different = [key for key in before if now[key] != before[key]]
    try:
        tensors, expected = _fitted(stored, config), RefSAM.expected_tensors(config)
        vocabulary_size = ("text_encoder.words.weight",)
        checkpoint.check_keys(
            {key: value for key, value in tensors.items() if key not in vocabulary_size},
            {key: value for key, value in expected.items() if key not in vocabulary_size},
        )
    except UserError as error:
        raise ConfigError(
            f"model: {', '.join(different)} cannot be changed in the trained {settings.init_from}: {error}"
        ) from None
    sources = dict(stored.sources)
    if config.text_encoder != stored.config.text_encoder:
        sources.pop("text_encoder", None)
    return replace(stored, config=config, tensors=tensors, sources=sources)


def _fitted(stored: Checkpoint, config: RefSAMConfig) -> dict[str, torch.Tensor]:
    if config.image_encoder.image_size == stored.config.image_encoder.image_size:
        return stored.tensors
    return checkpoint.resize_positions(stored.tensors, config)


def _words(datasets: Sequence[ReferringDataset]) -> list[str]:
    """Every word of the datasets' expressions."""
    texts = (expression.text.lower() for expression in _expressions(datasets))
    return sorted({word for text in texts for word in re.findall(r"\w+", text)})


def check_expressions(encoder: CachedTextEncoder, datasets: Sequence[ReferringDataset]) -> None:
    """Raise UserError with every expression that the text encoder cannot take, before one of them ends the run."""
    refused = [
        f"{dataset.name} {dataset.split} {each.video}/{each.expression_id} {each.text!r} ({reason})"
        for dataset in datasets
        for video in dataset.videos
        for each in dataset.expressions(video.name)
        if (reason := _refusal(encoder, each.text))
    ]
    if refused:
        raise UserError(
            f"data: {len(refused)} expressions cannot be trained on: {named(refused, _NAMED)}; correct them or leave them out"
        )


def _refusal(encoder: CachedTextEncoder, text: str) -> str | None:
    if not text.strip():
        return "it is empty"
    if not isinstance(encoder, SmallTextEncoder):
        return None
    try:
        encoder.tokenize(text)
    except ExpressionError as error:
        return str(error)
    return None


def every_expression(settings: TrainingSettings, datasets: Sequence[ReferringDataset]) -> list[str]:
    """All expressions of training and validation, and their mirrored forms where those exist."""
    entry = settings.validation.dataset if settings.validation.every is not None else None
    validated_on = [] if entry is None else [entry.open()]
    texts = [expression.text for expression in _expressions([*datasets, *validated_on])]
    return [*dict.fromkeys([*texts, *filter(None, map(mirrored, texts))])]


def _expressions(datasets: Iterable[ReferringDataset]) -> Iterator[Expression]:
    for dataset in datasets:
        yield from chain.from_iterable(dataset.expressions_by_video.values())


def encode_text(settings: TrainingSettings, advance: Callable[[], None] = lambda: None) -> int:
    """Encode every expression of a run with its frozen text encoder into `text_cache`; returns the number of new ones.

    Raises UserError where the run has no such encoder or folder.
    """
    if settings.text_cache is None:
        raise UserError("text_cache: not set in this configuration, want a folder")
    datasets = [entry.open() for entry in settings.data.datasets]
    model = build_model(settings, datasets, open_photographs(settings.data.photographs))
    features = TrainingModule(model, settings).features
    if features is None:
        raise UserError(
            "text_cache: the text encoder of this configuration is trained, so its output cannot be kept"
        )
    return features.encode_all(every_expression(settings, datasets), advance)
