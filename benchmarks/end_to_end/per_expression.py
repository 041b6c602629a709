"""The authors' loop: encode each frame again for every expression, by segment-anything's modules in eager PyTorch.

Their structure (arXiv 2307.00997, figure 2, and their code) with the weights of one of our models, so that both must give the
same masks. As in our sessions, text is encoded once, padding is left out and the embedding is normalised.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.end_to_end.encoder import random_sam
from refsam import RefSAM
from refsam.model.adapter import Adapter
from refsam.model.block import ADAPTER_SCALE, Block
from refsam.model.features import TextPrompt
from tests.sam_modeling import load_sam_modeling


class AdaptedBlock(nn.Module):
    """segment-anything's block with the adapters of one of ours, which see the padding of windows too."""

    block: Any
    space: Adapter | None
    parallel: Adapter | None

    def __init__(self, block: nn.Module, ours: Block) -> None:
        super().__init__()
        self.modeling, self.block = load_sam_modeling().image_encoder, block
        self.space, self.parallel = ours.Space_Adapter, ours.MLP_Adapter

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (1, h, w, D) to the same shape."""
        block, size = self.block, self.block.window_size
        attended = block.norm1(x)
        if size:
            attended, padded = self.modeling.window_partition(attended, size)
        attended = block.attn(attended)
        if self.space is not None:
            attended = attended + self.space(attended)
        if size:
            attended = self.modeling.window_unpartition(attended, size, padded, x.shape[1:3])
        x = x + attended
        normed = block.norm2(x)
        x = x + block.mlp(normed)
        return x if self.parallel is None else x + ADAPTER_SCALE * self.parallel(normed)


def adapted_blocks(encoder: Any, model: RefSAM) -> list[AdaptedBlock]:
    """The blocks of segment-anything's encoder with the model's adapters."""
    ours = cast(list[Block], model.image_encoder.blocks)
    return [AdaptedBlock(*pair) for pair in zip(encoder.blocks, ours, strict=True)]


class PerExpressionLoop:
    """The loop around segment-anything's modules; one track token for each expression is its state.

    `autocast` is the dtype of the encoder's products, None for float32's eager kernels.
    """

    def __init__(self, model: RefSAM, autocast: torch.dtype | None = None) -> None:
        self.model, self.autocast = model, autocast
        modeling, config = load_sam_modeling(), model.config
        with torch.device("meta"):
            self.encoder: Any = random_sam(model.config)
            self.decoder = plain_decoder(model).eval()
            self.positions = modeling.prompt_encoder.PositionEmbeddingRandom(config.prompt_dim // 2)
        copied: tuple[tuple[Any, nn.Module], ...] = (
            (self.encoder, model.image_encoder),
            (self.decoder, model.mask_decoder),
            (self.positions, model.prompt_encoder.pe_layer),
        )
        for theirs, ours in copied:
            theirs.load_state_dict(
                ours.state_dict(), strict=theirs is not self.encoder, assign=True
            )
        self.blocks = [block.eval() for block in adapted_blocks(self.encoder, model)]
        self.decoder.transformer.register_forward_hook(self._keep_object_token)
        self.object_token = torch.empty(0)
        self.tracks: dict[int, Tensor] = {}

    @torch.no_grad()
    def step(self, frame: Tensor, prompts: list[TextPrompt]) -> tuple[Tensor, Tensor]:
        """The next frame (H, W, 3) uint8 RGB with prompts of one expression each: logits and masks, both (P, H, W)."""
        logits = torch.cat([self._expression(frame, *pair) for pair in enumerate(prompts)])
        return logits, logits > 0

    def _expression(self, frame: Tensor, index: int, prompt: TextPrompt) -> Tensor:
        """Logits (1, H, W) of one expression, from the pixels on."""
        pixels, size = self.model.preprocess(frame[None])
        embedding, dense = self._encode(pixels, prompt)
        track = self.tracks.get(index)
        sparse = prompt.words if track is None else torch.cat([prompt.words, track[:, None]], 1)
        logits, _ = self.decoder(
            image_embeddings=embedding,
            image_pe=self.positions(embedding.shape[-2:])[None],
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        self.tracks[index] = self.model.tracking(self.object_token, track)
        square = (self.model.image_size, self.model.image_size)
        logits = F.interpolate(logits, square, mode="bilinear", align_corners=False)
        logits = logits[..., : size.resized[0], : size.resized[1]]
        return F.interpolate(logits, size.original, mode="bilinear", align_corners=False)[0]

    def _encode(self, pixels: Tensor, prompt: TextPrompt) -> tuple[Tensor, Tensor]:
        """The embedding and the dense prompts, both (1, C, h, w), of pixels (1, 3, S, S)."""
        encoder, intermediates = self.encoder, []
        autocast = torch.autocast(pixels.device.type, self.autocast, bool(self.autocast))
        with autocast:
            x = encoder.patch_embed(pixels) + encoder.pos_embed
            for index, block in enumerate(self.blocks):
                x = block(x)
                if index in self.model.image_encoder.intermediate_blocks:
                    intermediates.append(x.permute(0, 3, 1, 2).float())
            embedding = F.normalize(encoder.neck(x.permute(0, 3, 1, 2)).float(), dim=1)
        return embedding, self._dense_prompts(embedding, intermediates, prompt)

    def _dense_prompts(
        self, embedding: Tensor, intermediates: list[Tensor], prompt: TextPrompt
    ) -> Tensor:
        """Hierarchical dense attention level by level, as the paper writes it (section 3.4)."""
        attention = self.model.dense_attention
        text = torch.cat([prompt.words, prompt.sentence[:, None]], 1)[0]  # (T, C)
        levels = [embedding]
        if attention.projection is not None:
            levels += [F.normalize(attention.projection(x), dim=1) for x in intermediates]
        dense = torch.zeros_like(embedding)
        for share, level in zip(attention.level_logits.softmax(0), levels, strict=True):
            pixels = level.flatten(2).transpose(1, 2)  # (1, N, C)
            attended = (pixels @ text.T * attention.log_scale.exp()).softmax(-1) @ text
            attended = attended.transpose(1, 2).unflatten(2, level.shape[2:])
            dense = dense + share * attention.conv(torch.cat([level, attended], 1))
        return dense

    def _keep_object_token(self, _: nn.Module, __: object, output: tuple[Tensor, Tensor]) -> None:
        """The transformer's output for mask token 0, which segment-anything's decoder does not return."""
        self.object_token = output[0][:, 1]


def plain_decoder(model: RefSAM) -> Any:
    """segment-anything's mask decoder in the model's sizes, its weights as they come."""
    modeling, sizes, dim = load_sam_modeling(), model.config.mask_decoder, model.config.prompt_dim
    transformer = modeling.TwoWayTransformer(
        depth=sizes.depth,
        embedding_dim=dim,
        num_heads=sizes.num_heads,
        mlp_dim=sizes.mlp_dim,
        attention_downsample_rate=sizes.downsample_rate,
    )
    return modeling.MaskDecoder(
        transformer_dim=dim,
        transformer=transformer,
        num_multimask_outputs=sizes.num_masks - 1,
        iou_head_hidden_dim=sizes.iou_hidden_dim,
    )
