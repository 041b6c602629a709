"""A sentencepiece model as a tokenizer of `tokenizers`, with the token ids of XLM-RoBERTa."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from refsam.errors import CheckpointError

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
_FIRST_PIECE = 3  # in the sentencepiece model, behind <unk>, <s> and </s>
_UNIGRAM = 1
_PROBES = ("the dog on the left", "Two  RED cups, and a [semantic] caf\u00e9?", "\u72ac 3/4")


def read_sentencepiece(path: Path) -> Tokenizer:
    """The tokenizer: sentencepiece id p becomes p + 1, and 0 to 3 are <s>, <pad>, </s>, <unk>.

    Raises CheckpointError if the package sentencepiece is missing, the file is damaged or of another kind, or the
    result splits words otherwise than sentencepiece does.
    """
    try:
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    except ImportError:
        raise CheckpointError(
            f"{path.name} needs sentencepiece: pip install 'refsam[text]'"
        ) from None
    try:
        content = path.read_bytes()
        model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        model.ParseFromString(content)
        original = SentencePieceProcessor(model_proto=content)
    # protobuf and sentencepiece raise errors of their own.
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if model.trainer_spec.model_type != _UNIGRAM:
        raise CheckpointError(f"{path}: wanted a sentencepiece model of the kind unigram")
    tokenizer = _unigram(model)
    for probe in _PROBES:
        wanted = [
            piece + 1 if piece else SPECIAL.index("<unk>") for piece in original.encode(probe)
        ]
        if tokenizer.encode(probe).ids != wanted:
            raise CheckpointError(f"{path}: its normalisation is not understood ({probe!r})")
    return tokenizer


def _unigram(model: Any) -> Tokenizer:
    pieces = [(piece.piece, piece.score) for piece in model.pieces[_FIRST_PIECE:]]
    vocabulary = [(token, 0.0) for token in SPECIAL] + pieces
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=SPECIAL.index("<unk>")))
    steps: list[Any] = [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    if charsmap := model.normalizer_spec.precompiled_charsmap:
        steps.insert(0, normalizers.Precompiled(charsmap))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return tokenizer
