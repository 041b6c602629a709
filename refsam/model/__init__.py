"""RefSAM and EVF-SAM: from a frame and an expression to a mask."""

from refsam.model.evf_sam import EVFSAM
from refsam.model.features import FrameSize, ImageFeatures, MaskOutput, TextPrompt
from refsam.model.loading import load_model
from refsam.model.pretrained_text_encoder import T5TextEncoder
from refsam.model.prompted_sam import PromptedSAM
from refsam.model.refsam import RefSAM
from refsam.model.text_encoder import (
    EncodedText,
    SmallTextEncoder,
    word_tokenizer,
)

__all__ = [
    "EVFSAM",
    "EncodedText",
    "FrameSize",
    "ImageFeatures",
    "MaskOutput",
    "PromptedSAM",
    "RefSAM",
    "SmallTextEncoder",
    "T5TextEncoder",
    "TextPrompt",
    "load_model",
    "word_tokenizer",
]
