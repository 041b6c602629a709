"""segment-anything's `modeling` package, for comparison: its own `__init__` would need torchvision."""

import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn


def load_sam_modeling() -> ModuleType:
    """The package `segment_anything.modeling`, under a name of its own."""
    if "sam_modeling" not in sys.modules:
        package = importlib.util.find_spec("segment_anything")
        assert package is not None and package.origin is not None
        folder = Path(package.origin).parent / "modeling"
        spec = importlib.util.spec_from_file_location(
            "sam_modeling", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules["sam_modeling"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["sam_modeling"])
    return sys.modules["sam_modeling"]


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter, the position tables included, with seeded random numbers, drawn on the GPU if they are there."""
    is_on_gpu = any(parameter.is_cuda for parameter in module.parameters())
    device = torch.device("cuda" if is_on_gpu else "cpu")
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=device)
            noise = noise.to(parameter.device)  # a module without storage stays without
            is_matrix = parameter.ndim > 1
            scale = parameter[0].numel() ** -0.5 if is_matrix else 0.1
            parameter.copy_(scale * noise if is_matrix else parameter + scale * noise)
    return module.eval()


def sam_image_encoder(seed: int = 0, **sizes: Any) -> nn.Module:
    """segment-anything's image encoder with SAM's options, these sizes and random weights."""
    modeling = load_sam_modeling()
    norm = partial(nn.LayerNorm, eps=1e-6)
    encoder = modeling.ImageEncoderViT(
        **sizes, norm_layer=norm, use_rel_pos=True, qkv_bias=True, mlp_ratio=4
    )
    return randomise(encoder, seed)


def sam_mask_decoder(seed: int = 0, dim: int = 64, mlp_dim: int = 128, heads: int = 8) -> nn.Module:
    """segment-anything's mask decoder with random weights."""
    modeling = load_sam_modeling()
    transformer = modeling.TwoWayTransformer(
        depth=2, embedding_dim=dim, num_heads=heads, mlp_dim=mlp_dim
    )
    decoder = modeling.MaskDecoder(
        transformer_dim=dim, transformer=transformer, iou_head_hidden_dim=dim
    )
    return randomise(decoder, seed)
