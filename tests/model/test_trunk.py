"""The trunk: the published network's features, what it adds at first, packing, and rectangles against squares."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from refsam.config import RefSAMConfig
from refsam.errors import ConfigError
from refsam.model import RefSAM
from refsam.model.trunk import Trunk

_SMALL = ("padding=square", "trunk_width=0", "detector=false", "image_size=64", "patch_size=16", "embed_dim=32", "depth=2",
          "num_heads=2", "window_size=2", "global_blocks=[0,1]")  # fmt: skip
# Where the published weights lie, with what the published network makes of them; they are no part of the project.
WEIGHTS = os.environ.get("REFSAM_TRUNK_WEIGHTS")


def small_model(*changes: str, seed: int = 0) -> RefSAM:
    """A tiny nano with a trunk of half width, in eval mode."""
    sizes = [f"image_encoder.{entry}" for entry in (*_SMALL, *changes)]
    torch.manual_seed(seed)
    return RefSAM(RefSAMConfig.preset("nano").override(*sizes)).eval()


def with_trunk(*changes: str) -> RefSAM:
    return small_model("trunk_width=0.5", "padding=none", *changes)


@pytest.mark.parametrize("width", [0.5, 1.0])
@torch.no_grad()
def test_maps_have_their_strides_and_channels(width: float) -> None:
    maps = Trunk(width).eval()(torch.randn(2, 3, 64, 96))
    sizes = {name: tuple(map_.shape[1:]) for name, map_ in maps._asdict().items()}
    assert sizes == {
        "stride_4": (int(24 * width), 16, 24),
        "stride_8": (int(32 * width), 8, 12),
        "stride_16": (int(96 * width), 4, 6),
        "last": (int(320 * width), 4, 6),
        "context": (256, 4, 6),
    }


def test_parameters_are_as_many_as_published() -> None:
    """Features and head; the table of the published weights says 1,795,936 and 295,680 at width 1."""
    counts = [
        [sum(p.numel() for p in part.parameters()) for part in (trunk.features, trunk.aspp)]
        for trunk in (Trunk(1.0), Trunk(0.5))
    ]
    assert counts == [[1_795_936, 295_680], [469_200, 213_760]]


@pytest.mark.skipif(not WEIGHTS, reason="REFSAM_TRUNK_WEIGHTS names no file of published weights")
@torch.no_grad()
def test_features_are_those_of_the_published_network() -> None:
    """Against its plain definition, layer by layer as its names say, at 1e-5."""
    weights = {name: tensor.float() for name, tensor in load_file(Path(str(WEIGHTS))).items()}
    trunk = Trunk(weights["features.0.conv.weight"].shape[0] / 32).eval()
    trunk.load_state_dict({k: v for k, v in weights.items() if not k.startswith("classifier")})
    pixels = torch.rand(1, 3, 113, 193, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels = F.pad(pixels, (0, 15, 0, 15))
    maps, wanted = trunk(pixels), published(weights, pixels)
    for name, map_ in maps._asdict().items():
        torch.testing.assert_close(map_, wanted[name], atol=1e-5, rtol=1e-5, msg=name)


def published(weights: dict[str, torch.Tensor], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """MobileNetV2 and its head as the table of the published weights describes them."""

    def conv(name: str, x: torch.Tensor, stride: int = 1, dilation: int = 1) -> torch.Tensor:
        weight = weights[f"{name}.weight"]
        padding = dilation * (weight.shape[-1] // 2)
        groups = x.shape[1] // weight.shape[1]
        return F.conv2d(x, weight, weights[f"{name}.bias"], stride, padding, dilation, groups)

    strides = {2: 2, 4: 2, 7: 2}
    dilations = {15: 2, 16: 2, 17: 2}
    x, found = F.relu6(conv("features.0.conv", x, 2)), {}
    for layer in range(1, 18):
        y = x
        if layer > 1:
            y = F.relu6(conv(f"features.{layer}.expand", y))
        at = strides.get(layer, 1), dilations.get(layer, 1)
        y = conv(f"features.{layer}.project", F.relu6(conv(f"features.{layer}.depthwise", y, *at)))
        x = x + y if layer in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16) else y
        found[layer] = x
    pooled = F.relu(conv("aspp.pool", x.mean((2, 3), keepdim=True)))
    here = F.relu(conv("aspp.conv", x))
    context = F.relu(conv("aspp.project", torch.cat([pooled.expand_as(here), here], 1)))
    names = ("stride_4", "stride_8", "stride_16", "last")
    return {name: found[layer] for name, layer in zip(names, (3, 6, 13, 17), strict=True)} | {
        "context": context
    }


@torch.no_grad()
def test_a_trunk_changes_no_token_at_first() -> None:
    model = with_trunk()
    bare = small_model("padding=none")
    bare.image_encoder.load_state_dict(model.image_encoder.state_dict())
    pixels = torch.randn(1, 3, 48, 64)
    assert torch.equal(model.encode_image(pixels).embedding, bare.encode_image(pixels).embedding)


@torch.no_grad()
def test_an_optimised_trunk_computes_the_same() -> None:
    model = with_trunk()
    assert model.trunk is not None
    pixels = torch.randn(1, 3, 48, 64)
    plain = model.encode_image(pixels)
    same = model.optimize(torch.float32).encode_image(pixels)
    half = model.optimize(torch.bfloat16).encode_image(pixels)
    for name in ("names", "fine"):
        torch.testing.assert_close(getattr(same, name), getattr(plain, name), atol=1e-4, rtol=1e-4)
        assert (
            F.cosine_similarity(
                getattr(half, name).flatten(), getattr(plain, name).flatten(), dim=0
            )
            > 0.999
        )
        assert getattr(half, name).dtype == torch.float32
    assert torch.equal(model.deoptimize().encode_image(pixels).names, plain.names)


@torch.no_grad()
def test_changed_trunk_weights_are_heeded_when_optimised() -> None:
    model = with_trunk().optimize()
    pixels = torch.randn(1, 3, 48, 64)
    before = model.encode_image(pixels).names
    model.trunk.names.bias.add_(1.0)
    assert not torch.allclose(model.encode_image(pixels).names, before)


def test_everything_about_the_trunk_learns() -> None:
    model = with_trunk()
    torch.nn.init.normal_(model.trunk.tokens.weight, std=0.1)
    torch.nn.init.normal_(model.outlines.condition.layers[-1].weight, std=0.1)
    torch.nn.init.normal_(model.noun_match.prompt)
    image = model.encode_image(torch.randn(2, 3, 48, 64))
    text = model.encode_text(["the red dog", "a cup on the left"])
    output = model.decode(image, text, torch.tensor([0, 1]))
    (output.logits.sum() + output.iou.sum()).backward()
    parts = ("trunk.", "noun_match.", "outlines.")
    still = [n for n, p in model.named_parameters() if n.startswith(parts) and p.grad is None]
    assert still == []


@torch.no_grad()
def test_a_rectangle_is_the_upper_left_of_its_square() -> None:
    """Windows alone see no padding, so that the tokens of a frame are the same in both."""
    sizes = ("window_size=2", "global_blocks=[]", "depth=1")
    cut, whole = small_model("padding=none", *sizes), small_model(*sizes)
    whole.load_state_dict(cut.state_dict())
    frame = torch.randint(0, 256, (1, 36, 72, 3), dtype=torch.uint8)
    (pixels, size), (square, same_size) = cut.preprocess(frame), whole.preprocess(frame)
    assert pixels.shape == (1, 3, 32, 64) and square.shape == (1, 3, 64, 64)
    assert size == same_size
    assert torch.equal(pixels, square[:, :, :32])
    tokens = cut.image_encoder.patch_embed(pixels) + cut.image_encoder.position_table(2, 4)
    same = whole.image_encoder.patch_embed(square) + whole.image_encoder.position_table(4, 4)
    assert torch.equal(tokens, same[:, :2])
    # The neck's convolution reaches over the edge, so the second row would differ.
    features, squares = cut.image_encoder(pixels)[0], whole.image_encoder(square)[0]
    torch.testing.assert_close(features[:, :1], squares[:, :1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_distances_in_a_rectangle_are_those_of_its_square() -> None:
    """A global block on a rectangle with keys behind it masked out of the square gives the same attention."""
    from refsam.model.block import attend

    model = small_model("padding=none", "global_blocks=[0,1]")
    for block in model.image_encoder.blocks:
        torch.nn.init.normal_(block.attn.rel_pos_h)
        torch.nn.init.normal_(block.attn.rel_pos_w)
    weights = model.image_encoder.blocks[0].weights()
    qkv = torch.randn(1, 4, 4, 96)
    rectangle = attend(weights, qkv[:, :2])
    # Keys far below every score drop out: their k part is made to point against each query's direction.
    q, k, v = qkv.unflatten(-1, (3, 2, 16)).unbind(3)
    logits = torch.einsum("byxhc,bvuhc->bhyxvu", q, k) / 4
    y, x = torch.arange(4), torch.arange(4)
    rel_h = weights.rel_pos_h[y[:, None] - y[None] + 3]
    rel_w = weights.rel_pos_w[x[:, None] - x[None] + 3]
    logits = logits + torch.einsum("byxhc,yvc->bhyxv", q, rel_h)[..., None]
    logits = logits + torch.einsum("byxhc,xuc->bhyxu", q, rel_w)[..., None, :]
    seen = logits[:, :, :2, :, :2].flatten(4).softmax(-1)
    wanted = torch.einsum("bhyxn,bnhc->byxhc", seen, v[:, :2].flatten(1, 2)).flatten(3)
    torch.testing.assert_close(rectangle, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "size", [(36, 64), (64, 36), (64, 64), (16, 64), (9, 16), (1, 200), (300, 301)]
)
@torch.no_grad()
def test_frames_of_every_shape_get_masks_over_the_square(size: tuple[int, int]) -> None:
    model = with_trunk()
    pixels, sizes = model.preprocess(torch.zeros(1, *size, 3, dtype=torch.uint8))
    assert max(pixels.shape[2:]) == 64 and not any(side % 16 for side in pixels.shape[2:])
    assert all(0 <= p - r < 16 for p, r in zip(pixels.shape[2:], sizes.resized, strict=True))
    output = model.decode(model.encode_image(pixels), model.encode_text(["the dog", "a red cup"]))
    assert output.logits.shape == (2, 16, 16) and output.logits.isfinite().all()


def test_a_trunk_wants_patches_of_its_stride() -> None:
    with pytest.raises(ConfigError, match="patch size must be 16 with a trunk"):
        RefSAMConfig.preset("nano").override(
            "image_encoder.trunk_width=1.0", "image_encoder.patch_size=8"
        )


@torch.no_grad()
def test_words_behind_the_sentence_do_not_change_the_match() -> None:
    model = with_trunk()
    image = model.encode_image(torch.randn(1, 3, 48, 64))
    alone = model.encode_text(["the dog"])
    padded = model.encode_text(["the dog", "the small red cup on the left"]).select([0])
    index = torch.zeros(1, dtype=torch.long)
    torch.testing.assert_close(
        model.noun_match(alone, image.names, index),
        model.noun_match(padded, image.names, index),
        atol=1e-5,
        rtol=1e-5,
    )
