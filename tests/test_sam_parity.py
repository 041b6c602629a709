"""Equal to segment-anything's own modules on random weights: `reference` in every bit, `fallback` closely.

Which bits a matrix product gives depends on how its operands lie in memory, so the decoder is given its image tokens
with the strides that they have inside segment-anything.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refsam.model.image_encoder import ImageEncoder
from refsam.model.mask_decoder import MaskDecoder, RandomPositionEncoding
from refsam.model.two_way_transformer import TwoWayTransformer
from refsam_kernels import use_backend
from tests.sam_modeling import load_sam_modeling, sam_image_encoder, sam_mask_decoder

BACKENDS = ["reference", "fallback"]
TINY = {"depth": 4, "global_attn_indexes": (1, 3), "window_size": 4, "out_chans": 32}
VIT_B = {"depth": 12, "global_attn_indexes": (2, 5, 8, 11), "window_size": 14, "out_chans": 256}


def assert_parity(found: Tensor, wanted: Tensor, backend: str) -> None:
    """Bit-equal for `reference`, else 1e-5 of the largest value: sums are taken in another order."""
    if backend == "reference":
        assert torch.equal(found, wanted)
    else:
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def encoder_pair(
    image_size: int, embed_dim: int, num_heads: int, adapter_dim: int = 0, **sizes: Any
) -> tuple[ImageEncoder, nn.Module]:
    """Our encoder and segment-anything's, with the same random weights."""
    sam = sam_image_encoder(
        img_size=image_size, patch_size=16, embed_dim=embed_dim, num_heads=num_heads, **sizes
    )
    ours = ImageEncoder(
        image_size,
        16,
        embed_dim,
        sizes["depth"],
        num_heads,
        4 * embed_dim,
        sizes["window_size"],
        sizes["global_attn_indexes"],
        adapter_dim,
        sizes["out_chans"],
    )
    missing = ours.load_state_dict(sam.state_dict(), strict=False).missing_keys
    assert all("_Adapter." in key for key in missing)
    return ours.eval(), sam


@torch.no_grad()
def check_encoder(ours: ImageEncoder, sam: nn.Module, pixels: Tensor, backend: str) -> None:
    with use_backend(backend):
        found, _ = ours(pixels)
    assert_parity(found.permute(0, 3, 1, 2), sam(pixels), backend)


@pytest.mark.parametrize("adapter_dim", [0, 12], ids=["bare", "adapters"])
@pytest.mark.parametrize("head_dim", [16, 80])
@pytest.mark.parametrize("backend", BACKENDS)
def test_image_encoder(backend: str, head_dim: int, adapter_dim: int) -> None:
    ours, sam = encoder_pair(160, 3 * head_dim, 3, adapter_dim, **TINY)
    check_encoder(ours, sam, torch.randn(2, 3, 160, 160), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_image_encoder_on_a_padded_grid_of_13_by_9(backend: str) -> None:
    """Windows of 4 stick out of both sides, and relative tables made for 13 are interpolated to 9."""
    ours, sam = encoder_pair(208, 48, 3, 12, **TINY)
    ours.pos_embed = nn.Parameter(ours.pos_embed[:, :, :9].clone())
    sam.pos_embed = nn.Parameter(sam.pos_embed[:, :, :9].clone())
    check_encoder(ours, sam, torch.randn(1, 3, 208, 144), backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_image_encoder_of_vit_b(backend: str) -> None:
    ours, sam = encoder_pair(1024, 768, 12, 192, **VIT_B)
    check_encoder(ours, sam, torch.randn(1, 3, 1024, 1024), backend)


@pytest.mark.parametrize("grid", [(10, 10), (13, 9), (64, 64)])
@pytest.mark.parametrize("dim", [64, 256])
def test_position_encoding(dim: int, grid: tuple[int, int]) -> None:
    sam = load_sam_modeling().prompt_encoder.PositionEmbeddingRandom(dim // 2)
    ours = RandomPositionEncoding(dim)
    ours.load_state_dict(sam.state_dict())
    assert torch.equal(ours(*grid), sam(grid).flatten(1).T[None])


@torch.no_grad()
def check_decoder(dim: int, mlp_dim: int, count: int, grid: tuple[int, int], backend: str) -> None:
    sam = sam_mask_decoder(dim=dim, mlp_dim=mlp_dim)
    ours = MaskDecoder(dim, TwoWayTransformer(2, dim, 8, mlp_dim), 4, dim).eval()
    ours.load_state_dict(sam.state_dict())
    embedding, image_pe = torch.randn(2, 1, dim, *grid).unbind()
    dense, sparse = torch.randn(count, dim, *grid), torch.randn(count, 7, dim)
    masks, iou = sam.predict_masks(embedding, image_pe, sparse, dense)
    image = embedding.repeat_interleave(count, dim=0) + dense
    as_tokens: Callable[[Tensor], Tensor] = lambda x: x.flatten(2).transpose(1, 2)  # noqa: E731
    with use_backend(backend):
        found = ours(as_tokens(image), as_tokens(image_pe), sparse, None, grid, num_masks=4)
    assert_parity(found[0], masks, backend)
    assert_parity(found[1], iou, backend)


@pytest.mark.parametrize("grid", [(10, 10), (13, 9)])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_decoder(backend: str, count: int, grid: tuple[int, int]) -> None:
    check_decoder(64, 128, count, grid, backend)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_decoder_of_sam(backend: str, count: int) -> None:
    check_decoder(256, 2048, count, (64, 64), backend)
