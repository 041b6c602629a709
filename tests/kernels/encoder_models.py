"""Tiny random models with SAM's image encoder inside, one for each library and each way of writing it."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.sam_modeling import load_sam_modeling, randomise, sam_image_encoder
from tests.timm_modeling import timm_image_encoder, torchvision_to_import

# Two blocks: one of windows that stick out of the grid of 8 x 8 tokens, one that attends globally.
SAM: dict[str, Any] = {
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "window_size": 3,
    "out_chans": 16,
}
SAM |= {"img_size": 32, "patch_size": 4, "global_attn_indexes": (1,)}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_dim": 64,
}
VISION.update(image_size=32, patch_size=4, window_size=3, global_attn_indexes=[1])


@dataclass(frozen=True)
class Example:
    """How to make a model, what it takes beside or instead of pixels, and how many attentions it has."""

    make: Callable[[], Any]
    inputs: Callable[[], dict[str, Tensor]] | None = None
    attentions: int = 2
    gives_weights: bool = False
    feature: str = "last_hidden_state"

    def features(self, model: Any, scale: float = 1.0) -> Tensor:
        """The model's features of its inputs."""
        output = self.run(model, scale)
        if isinstance(output, dict) and "last_feat" in output:
            return output["last_feat"]
        return output if isinstance(output, Tensor) else getattr(output, self.feature)

    def run(self, model: Any, scale: float = 1.0, **options: Any) -> Any:
        """The model's output for its inputs, in its dtype."""
        dtype = next(parameter.dtype for parameter in model.parameters())
        if self.inputs is None:
            return model(scale * pixels_of().to(dtype), **options)
        inputs = {name: scale * each.to(dtype) for name, each in self.inputs().items()}
        return model(**inputs, **options)


def pixels_of(height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def of_transformers(
    module: str, config: str, model: str, changes: dict[str, Any], attention: str = "eager"
) -> Callable[[], Any]:
    """A model of one of transformers' modules, of the sizes in `VISION` unless others are given."""

    def make() -> Any:
        pytest.importorskip("transformers")
        folder = f"transformers.models.{module}"
        # The oldest tested version lacks the newest models.
        pytest.importorskip(folder, reason=f"this transformers has no {module}")
        modeling = importlib.import_module(f"{folder}.modeling_{module}")
        configuration = importlib.import_module(f"{folder}.configuration_{module}")
        sizes = changes if "image_size" in changes else VISION | changes
        made = getattr(configuration, config)(**sizes)
        return randomise(getattr(modeling, model)._from_config(made, attn_implementation=attention))

    return make


def processor_of(library: str) -> Any:
    """The image processor of "sam2" or "sam3"; its import needs torchvision, of which `post_process_masks` uses nothing."""
    importlib.import_module("transformers.models.auto.image_processing_auto")
    with torchvision_to_import():
        folder = f"transformers.models.{library}"
        module = importlib.import_module(f"{folder}.image_processing_{library}")
    kind = getattr(module, f"{library.capitalize()}ImageProcessor")
    return kind.__new__(kind)


def deepseek_vl_hybrid() -> Any:
    """The high-resolution tower of DeepSeek-VL's hybrid: a `SamVisionModel` beside another tower."""
    high = of_transformers("sam", "SamVisionConfig", "SamVisionModel", {}, "sdpa")()
    tower: Any = type(
        "DeepseekVLHybridModel",
        (nn.Module,),
        {"forward": lambda self, x: self.high_res_vision_model(x)},
    )()
    tower.high_res_vision_model, tower.vision_model = high, nn.Linear(4, 4)
    return tower.eval()


class DeepseekAttention(nn.Module):
    """As DeepSeek-OCR's own code writes it: torch's SDPA with the whole bias."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads, self.scale, self.use_rel_pos = attention.num_heads, attention.scale, True
        self.qkv, self.proj = attention.qkv, attention.proj
        self.rel_pos_h, self.rel_pos_w = attention.rel_pos_h, attention.rel_pos_w

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        tokens = height * width
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind()
        encoder = load_sam_modeling().image_encoder
        q_grid = q.unflatten(2, (height, width))
        rows = encoder.get_rel_pos(height, height, self.rel_pos_h)
        columns = encoder.get_rel_pos(width, width, self.rel_pos_w)
        bias = torch.einsum("bnhwc,hkc->bnhwk", q_grid, rows)[..., None]
        bias = bias + torch.einsum("bnhwc,wkc->bnhwk", q_grid, columns)[..., None, :]
        attended = F.scaled_dot_product_attention(
            q, k, v, bias.reshape(*q.shape[:2], tokens, tokens)
        )
        return self.proj(attended.transpose(1, 2).reshape(x.shape))


def deepseek_ocr() -> Any:
    """segment-anything's encoder with DeepSeek-OCR's attention, between two more convolutions."""
    encoder: Any = sam_image_encoder(**SAM)
    for block in encoder.blocks:
        block.attn = DeepseekAttention(block.attn)
        type(block.attn).__name__ = "Attention"
    return nn.Sequential(encoder, nn.Conv2d(16, 8, 3, 2, 1)).eval()


def cellpose(patch: int = 4, **changes: Any) -> Any:
    """Cellpose-SAM: smaller patches, a part of the positions, every block global with the tables of windows."""
    sizes = SAM | {"img_size": 64} | changes
    encoder: Any = sam_image_encoder(**sizes)
    width = sizes["embed_dim"]
    encoder.patch_embed.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
    encoder.pos_embed = nn.Parameter(encoder.pos_embed[:, ::2, ::2])
    for block in encoder.blocks:
        block.window_size = 0
    forward = {"forward": lambda self, x: self.out(self.encoder(x))}
    model: Any = type("Transformer", (nn.Module,), forward)()
    model.encoder, model.out = encoder, nn.Conv2d(sizes["out_chans"], 3 * patch**2, 1)
    return randomise(model)


def low_rank(encoder: Any) -> nn.Module:
    """The encoder, frozen, with trainable low-rank layers beside each qkv, as in LoRA."""

    class LowRank(nn.Module):
        def __init__(self, base: nn.Linear, rank: int = 4) -> None:
            super().__init__()
            self.base_layer = base
            self.down = nn.Linear(base.in_features, rank, bias=False)
            self.up = nn.Linear(rank, base.out_features, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.up(self.down(x))

    encoder.requires_grad_(False)
    for block in encoder.blocks:
        block.attn.qkv = LowRank(block.attn.qkv)
    return encoder.train()


class ResidualBlock(nn.Module):
    """As ViTDet's in detectron2: one `drop_path` for both branches, and convolutions behind."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = block.norm1, block.attn, block.norm2
        self.mlp, self.drop_path, self.window_size = block.mlp, nn.Identity(), block.window_size
        self.residual = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        shortcut, x = x, self.norm1(x)
        encoder = load_sam_modeling().image_encoder
        if self.window_size > 0:
            sizes = x.shape[1:3]
            x, padded = encoder.window_partition(x, self.window_size)
        x = self.attn(x)
        if self.window_size > 0:
            x = encoder.window_unpartition(x, self.window_size, padded, tuple(sizes))
        x = shortcut + self.drop_path(x)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x + self.residual(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Mlp(nn.Module):
    """timm's, as detectron2 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.0)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(64, 32), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


def detectron2_vit() -> Any:
    """detectron2's `ViT`, whose result is a dictionary."""
    encoder: Any = sam_image_encoder(**SAM)
    for block in encoder.blocks:
        block.mlp = Mlp()
    encoder.blocks = nn.ModuleList(map(ResidualBlock, encoder.blocks))

    def forward(self: Any, x: Tensor) -> dict[str, Tensor]:
        x = self.patch_embed(x) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return {"last_feat": x.permute(0, 3, 1, 2)}

    model: Any = type("ViT", (nn.Module,), {"forward": forward})()
    model.patch_embed, model.pos_embed, model.blocks = (
        encoder.patch_embed,
        encoder.pos_embed,
        encoder.blocks,
    )
    return randomise(model)


def sam_hq() -> Any:
    """SAM-HQ's encoder: it also returns what its global blocks make."""
    encoder: Any = sam_image_encoder(**SAM)

    def forward(self: Any, x: Tensor) -> Tensor:
        x, between = self.patch_embed(x) + self.pos_embed, []
        for block in self.blocks:
            x = block(x)
            if block.window_size == 0:
                between.append(x)
        assert len(between) == 1
        return self.neck(x.permute(0, 3, 1, 2)) + between[0].mean()

    encoder.__class__ = type("ImageEncoderViT", (type(encoder),), {"forward": forward})
    return encoder


def micro_sam_lora() -> Any:
    """A copy of segment-anything with low-rank layers for q and v, as micro-sam puts them in."""
    encoder: Any = sam_image_encoder(**SAM)

    class LowRankSurgery(nn.Module):
        def __init__(self, qkv: nn.Linear) -> None:
            super().__init__()
            self.qkv_proj, self.dim = qkv, qkv.in_features
            self.down, self.up = nn.Linear(32, 2, bias=False), nn.Linear(2, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv_proj(x).chunk(3, -1)
            for_q, for_v = self.up(self.down(x)).chunk(2, -1)
            return torch.cat([q + for_q, k, v + for_v], -1)

    for block in encoder.blocks:
        block.attn.qkv = LowRankSurgery(block.attn.qkv)
    return randomise(encoder)


def timm() -> Any:
    if not importlib.util.find_spec("timm"):
        pytest.skip("timm is not installed: pip install --no-deps timm")
    sizes = {name: size for name, size in SAM.items() if name != "out_chans"}
    return timm_image_encoder(**sizes, neck_chans=16)


def seggpt_inputs() -> dict[str, Tensor]:
    return {
        name: pixels_of(32, 32) for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")
    }


VITDET: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
}
VITDET.update(
    pretrain_image_size=32,
    window_size=3,
    window_block_indices=[0],
    residual_block_indices=[1],
)
VITDET |= {"use_relative_position_embeddings": True}
SEGGPT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": (64, 32),
    "patch_size": 4,
}
SEGGPT |= {"pretrain_image_size": 32, "mlp_dim": 64, "merge_index": 0, "intermediate_hidden_state_indices": [1, 2]}  # fmt: skip
FORMULA = {
    "post_conv_in_channels": 16,
    "post_conv_out_channels": 16,
    "post_conv_mid_channels": 16,
    "decoder_hidden_size": 8,
}

DEEPSEEK = {"downsample_channels": [8, 8]}

# transformers' module, the names of its configuration and of its model, and changes to the sizes in `VISION`.
EAGER: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "Sam": ("sam", "SamVisionConfig", "SamVisionModel", {}),
    "SamHQ": ("sam_hq", "SamHQVisionConfig", "SamHQVisionModel", {}),
    "GotOcr2": ("got_ocr2", "GotOcr2VisionConfig", "GotOcr2VisionEncoder", {}),
    "DeepseekOcr2": (
        "deepseek_ocr2",
        "DeepseekOcr2SamVisionConfig",
        "DeepseekOcr2SamVisionEncoder",
        DEEPSEEK,
    ),
    "UnlimitedOcr": (
        "unlimited_ocr",
        "UnlimitedOcrSamVisionConfig",
        "UnlimitedOcrSamVisionEncoder",
        DEEPSEEK,
    ),
    "PPFormulaNet": (
        "pp_formulanet",
        "PPFormulaNetVisionConfig",
        "PPFormulaNetVisionModel",
        FORMULA,
    ),
    "SLANeXt": ("slanext", "SLANeXtVisionConfig", "SLANeXtVisionEncoder", {}),
    "VitDet": ("vitdet", "VitDetConfig", "VitDetModel", VITDET),
}
SDPA = {f"{name}, SDPA": EAGER[name] for name in ("Sam", "SamHQ", "DeepseekOcr2")}

MODELS = {
    "segment-anything": Example(lambda: sam_image_encoder(**SAM)),
    "SAM-HQ's own": Example(sam_hq),
    "micro-sam's LoRA": Example(micro_sam_lora),
    "DeepSeek-OCR's own": Example(deepseek_ocr),
    "Cellpose-SAM": Example(cellpose),
    "detectron2": Example(detectron2_vit),
    "timm": Example(timm),
    "DeepseekVLHybrid": Example(deepseek_vl_hybrid),
    "SegGpt": Example(
        of_transformers("seggpt", "SegGptConfig", "SegGptModel", SEGGPT),
        seggpt_inputs,
        attentions=3,
        gives_weights=True,
    ),
    **{name: Example(of_transformers(*each), gives_weights=True) for name, each in EAGER.items()},
    **{name: Example(of_transformers(*each, attention="sdpa")) for name, each in SDPA.items()},
}
