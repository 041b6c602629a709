"""`python -m benchmarks.end_to_end.evf --out FILE`: EVF-SAM at its real size with random weights, on this machine.

The other side is EVF-SAM's arrangement: one whole pass per expression, by segment-anything's image encoder and plain
layers. Both must give the same logits first.
"""

import json
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.end_to_end.encoder import random_sam
from benchmarks.measure import resident, take_turns
from benchmarks.programs import make_parser, write_result
from refsam.config import EVFConfig
from refsam.model import EVFSAM, ImageFeatures, TextPrompt
from refsam.runtime.device import choose_device

FRAME = (720, 1280, 3)
TOKENS = 8  # of an expression, including <s> and </s>
EXPRESSIONS = 4
TOLERANCE = 0.1  # of the largest logit: bfloat16 products through 32 blocks, random weights


def random_text(model: EVFSAM, count: int) -> TextPrompt:
    """Expressions of random words."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, model.config.beit3.vocabulary_size, (count, TOKENS), generator=generator)
    return model.embed_text(ids, torch.full((count,), TOKENS))


class PerExpression:
    """EVF-SAM's arrangement: everything is computed again for each expression."""

    def __init__(self, model: EVFSAM, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        with torch.device("meta"):
            self.encoder: Any = random_sam(model.config)
        self.encoder.load_state_dict(model.image_encoder.state_dict(), assign=True)
        self.encoder.eval()

    def __call__(self, frame: Tensor, text: TextPrompt) -> Tensor:
        """Logits (P, 4h, 4w)."""
        return torch.cat([self._one(frame, text.select([i])) for i in range(len(text))])

    def _one(self, frame: Tensor, text: TextPrompt) -> Tensor:
        model = self.model
        pixels, _ = model.preprocess(frame[None])
        enabled = self.dtype != torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled):
            features = self.encoder(pixels).float()
            patches = model.beit3.embed_patches(model.view(frame[None]))
            embedding = features.flatten(2).transpose(1, 2)
            grid = features.shape[2], features.shape[3]
            image = ImageFeatures(embedding, embedding[None], grid, patches)
            return model.decode(image, text).logits.float()


def ours(model: EVFSAM, frame: Tensor, text: TextPrompt) -> Tensor:
    """The same through the model's own interface: one encoding, all expressions."""
    pixels, _ = model.preprocess(frame[None])
    image = model.encode_image(pixels, model.view(frame[None]))
    return model.decode(image, text, torch.zeros(len(text), dtype=torch.int64)).logits


@torch.no_grad()
def measure(config: EVFConfig, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Seconds of a frame with 1 and 4 expressions, of BEiT-3 per expression, and peak memory."""
    torch.manual_seed(0)
    model = EVFSAM(config).eval()
    frame = torch.randint(0, 256, FRAME, dtype=torch.uint8)
    text, one = random_text(model, EXPRESSIONS), random_text(model, 1)
    theirs = PerExpression(model, dtype)
    start = time.perf_counter()
    wanted = theirs(frame, text)
    loop = time.perf_counter() - start
    model.optimize(dtype)
    error = float((ours(model, frame, text) - wanted).abs().max() / wanted.abs().max())
    if error > TOLERANCE:
        raise SystemExit(f"logits differ by {error:.2g} of the largest: nothing is timed")
    patches = model.beit3.embed_patches(model.view(frame[None]))
    calls = {
        "frame_1_s": lambda: ours(model, frame, one),
        "frame_4_s": lambda: ours(model, frame, text),
        "beit3_1_s": lambda: model.beit3(patches, one.words, one.lengths),
    }
    times = take_turns(calls, rounds)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "error": error,
        "per_expression_4_s": loop,
        **{name: 1e-3 * each.median_ms for name, each in times.items()},
        "peak_rss_bytes": resident("VmHWM"),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def main() -> None:
    """Measure and write."""
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    choose_device("cpu")
    row = measure(EVFConfig(), getattr(torch, options.dtype), options.rounds)
    write_result(options, row)
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    main()
