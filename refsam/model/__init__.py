"""RefSAM: what is computed between a frame, a sentence and a mask."""

from refsam.model.refsam import FrameSize, ImageFeatures, MaskOutput, RefSAM, TextPrompt
from refsam.model.text_encoder import (
    EncodedText,
    SmallTextEncoder,
    T5TextEncoder,
    TextEncoder,
    word_tokenizer,
)

__all__ = [
    "EncodedText",
    "FrameSize",
    "ImageFeatures",
    "MaskOutput",
    "RefSAM",
    "SmallTextEncoder",
    "T5TextEncoder",
    "TextEncoder",
    "TextPrompt",
    "word_tokenizer",
]
