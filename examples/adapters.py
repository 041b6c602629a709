"""SAM ViT-B fine-tuned through adapters, in little memory.

    refsam convert sam sam_vit_b_01ec64.pth --out sam_vit_b
    python examples/adapters.py --sam sam_vit_b
    python examples/adapters.py --image-size 64 --depth 2 --steps 5       # random weights, seconds

SAM's ViT stays as it is; the adapters in its second half learn, with the mask decoder and what stands between
expression and mask. Nothing is kept for the backward before the first adapter; from there on each block keeps its
input only (`activation_checkpointing`); the loss is taken from the low-resolution logits. The clips are drawn: put your own
frames, expressions and masks in the place of `generate_clip`.
"""

import argparse
import resource
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from refsam import RefSAM, RefSAMConfig, checkpoint
from refsam.data.generated import generate_clip
from refsam.data.generated.grammar import vocabulary
from refsam.model import word_tokenizer
from refsam_kernels import mask_loss


def build(sam: Path | None, image_size: int, depth: int) -> RefSAM:
    """A RefSAM on SAM's weights, or on random ones, with a small text encoder that trains from nothing."""
    small_text, tokenizer = "text_encoder={kind: small}", word_tokenizer(vocabulary())
    if sam:
        stored = checkpoint.load(sam, image_size=image_size)
        config = stored.config.override(small_text)
        return RefSAM.from_checkpoint(replace(stored, config=config, tokenizer=tokenizer.to_str()))
    config = RefSAMConfig.preset("vit_b").override(
        small_text,
        f"image_encoder.image_size={image_size}",
        f"image_encoder.depth={depth}",
        f"image_encoder.global_blocks=[{depth - 1}]",
    )
    return RefSAM(config, tokenizer)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains on drawn clips, one frame a step; prints losses and the peak of the memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sam", type=Path, help="SAM converted by `refsam convert sam`")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=12, help="blocks, without --sam")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = build(options.sam, options.image_size, options.depth).train()
    model.text_encoder.requires_grad_(True)
    model.image_encoder.activation_checkpointing = True
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4)
    print(f"{sum(p.numel() for p in trained) / 1e6:.1f} M of "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters are trained")  # fmt: skip
    for step in range(options.steps):
        clip = generate_clip(seed=step % 4, frames=1)
        pixels, size = model.preprocess(clip.frames)
        output = model.decode(model.encode_image(pixels), model.encode_text(clip.expressions))
        focal, dice = mask_loss(
            output.logits, clip.masks[:, 0], image_size=model.image_size, input_size=size.resized
        )
        loss = 20 * focal.mean() + dice.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"at most {peak:.0f} MiB were used, weights and libraries included")


if __name__ == "__main__":
    main()
