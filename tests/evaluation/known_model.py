"""A model whose output is known: it marks the pixels of the colour that an expression names, at the frame's own size."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from refsam.errors import ExpressionError
from refsam.model.preprocessing import preprocess
from tests.data.fixtures import COLOURS

GREY = (128, 128, 128)
WORDS = {"red": 1, "blue": 2, "green": 3, "box 1": 1, "box 2": 2}


class ColourModel(nn.Module):
    """Takes RefSAM's place. Logits are +5 and -5 on the 64 x 64 pixels that the fixtures' frames fill without resizing.

    Track tokens say whose they are and for how many frames: `decode` fails where one reaches another expression or video.
    `misled`: expressions with this word get the other object's mask. `refuses`: expressions with this word raise ExpressionError.
    `fails_after`: so many frames are encoded before `failure` is raised.
    """

    image_size = 64
    is_optimized = True
    fixed_packing = None
    device = torch.device("cpu")

    def __init__(self, misled="-", refuses="-", fails_after=None, failure=KeyboardInterrupt):
        super().__init__()
        self.register_buffer("weights", torch.arange(3.0))
        self.misled = misled
        self.fails_after, self.failure = fails_after, failure
        self.seen = []
        self.text_encoder = _TextEncoder(refuses)
        self.image_encoder = SimpleNamespace(product_dtype=torch.float32)

    def optimize(self, dtype=None):
        self.image_encoder.product_dtype = dtype or torch.bfloat16
        return self

    def encode_text(self, texts):
        self.text_encoder(texts)
        return _Prompt(texts)

    def text_source(self):
        """No file but the checkpoint's."""

    def forget_text(self):
        """Nothing is kept."""

    def view(self, frames):
        """Nothing beside the pixels."""

    def preprocess(self, frames):
        self.seen.append(tuple(frames.shape[1:3]))
        if self.fails_after is not None and len(self.seen) > self.fails_after:
            raise self.failure
        return preprocess(frames, self.image_size, torch.zeros(3, 1, 1), torch.ones(3, 1, 1))

    def encode_image(self, pixels):
        return SimpleNamespace(pixels=pixels[0], embedding=pixels, grid=(16, 16))

    def decode(self, image, texts, image_index, track, track_valid):
        keys = torch.tensor([float(hash(text) % 9973) for text in texts])
        if track is None:
            track = torch.stack([keys, torch.zeros_like(keys)], dim=1)
        assert torch.equal(track[:, 0], keys), "a token of another expression"
        assert track[:, 1].unique().numel() == 1, "tokens of unequal age"
        logits = torch.stack([self._logits(image.pixels, text) for text in texts])
        track = track + torch.tensor([0.0, 1.0])
        return SimpleNamespace(logits=logits, iou=torch.ones(len(texts)), track_token=track)

    def _logits(self, pixels, text):
        colours = torch.tensor([GREY, *COLOURS.values()], dtype=torch.float32)
        nearest = (pixels[None] - colours[..., None, None]).square().sum(dim=1).argmin(dim=0)
        inside = torch.isin(nearest, torch.tensor(sorted(self.objects(text)), dtype=torch.int64))
        inside &= pixels.sum(dim=0) > 0  # the square's padding is black
        return torch.where(inside, 5.0, -5.0)

    def objects(self, text):
        """The numbers of the objects that an expression means."""
        found = {number for word, number in WORDS.items() if word in text.lower()}
        if "not red" in text:
            found = set(COLOURS) - {1}
        return {3 - number for number in found} if self.misled in text else found


class _Prompt(list):
    """The expressions themselves, in a `TextPrompt`'s place."""

    unknown = ()


class _TextEncoder:
    def __init__(self, refuses):
        self.refuses = refuses

    def __call__(self, texts):
        for text in texts:
            if self.refuses in text:
                raise ExpressionError(f"expression: knows no word of {text!r}")


def write_lossless(path, pixels):
    """In place of the fixtures' `write_image`: PNGs, whatever the suffix, so that colours are exact."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path, "PNG")
