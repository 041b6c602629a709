"""An existing SAM made faster in place: same outputs, same weights, one line.

    python examples/faster_sam.py --model facebook/sam-vit-base
    python examples/faster_sam.py --image-size 256 --depth 4         # random weights, nothing is downloaded

Needs transformers; segment-anything's Sam and timm's SAM go the same way.
"""

import argparse
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import SamVisionConfig, SamVisionModel

from refsam_kernels.integrations import optimize


def load(name: str | None, image_size: int, depth: int) -> SamVisionModel:
    """The named model, or one of ViT-B's width with random weights."""
    if name:
        return SamVisionModel.from_pretrained(name).eval()
    last = [depth // 2 - 1, depth - 1]
    config = SamVisionConfig(
        image_size=image_size, num_hidden_layers=depth, global_attn_indexes=last
    )
    return SamVisionModel(config).eval()


def seconds(model: SamVisionModel, pixels: Tensor, repeats: int) -> tuple[float, Tensor]:
    """The quickest of some calls after a first one, and the features."""
    features = model(pixels).last_hidden_state
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        model(pixels)
        times.append(time.perf_counter() - start)
    return min(times), features


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    """Times the image encoder before and after, and says how far the features differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a Hub id or folder; random weights if not given")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    model = load(options.model, options.image_size, options.depth)
    pixels = torch.randn(1, 3, model.config.image_size, model.config.image_size)
    before, theirs = seconds(model, pixels, options.repeats)
    with optimize(model):
        after, ours = seconds(model, pixels, options.repeats)
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    print(f"{before:.2f} s -> {after:.2f} s, {before / after:.2f}x as fast")
    print(f"features differ by {difference:.1e} of the largest value")


if __name__ == "__main__":
    main()
