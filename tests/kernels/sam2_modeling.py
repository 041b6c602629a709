"""Stand-ins for the `sam2` library's classes: its names, members and methods, on segment-anything's parts, tiny and random."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.sam_modeling import load_sam_modeling, randomise

DIM, GRID = 32, 6


def mask_decoder(high_resolution: bool = True, scores: bool = True) -> Any:
    """A `MaskDecoder` with two more addends and a token of the object's score, or without either."""
    modeling: Any = load_sam_modeling()
    parent: Any = modeling.MaskDecoder

    class MaskDecoder(parent):
        def forward(
            self, multimask_output: bool, **inputs: Any
        ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            masks, iou, tokens, score = self.predict_masks(**inputs)
            chosen = slice(1, None) if multimask_output else slice(0, 1)
            return masks[:, chosen], iou[:, chosen], tokens[:, :1], score

        def predict_masks(
            self,
            image_embeddings: Tensor,
            image_pe: Tensor,
            sparse_prompt_embeddings: Tensor,
            dense_prompt_embeddings: Tensor,
            repeat_image: bool,
            high_res_features: Any = None,
        ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            count = len(sparse_prompt_embeddings)
            weights = [self.iou_token.weight, self.mask_tokens.weight]
            if scores:
                weights.insert(0, self.obj_score_token.weight)
            tokens = torch.cat(
                [torch.cat(weights).repeat(count, 1, 1), sparse_prompt_embeddings], 1
            )
            image = image_embeddings.repeat(count, 1, 1, 1) if repeat_image else image_embeddings
            image = image + dense_prompt_embeddings
            tokens, pixels = self.transformer(image, image_pe.repeat(count, 1, 1, 1), tokens)
            pixels = pixels.mT.reshape(image.shape)
            conv1, norm, act1, conv2, act2 = self.output_upscaling
            feat_s0, feat_s1 = high_res_features if high_resolution else (0, 0)
            pixels = act2(conv2(act1(norm(conv1(pixels) + feat_s1))) + feat_s0)
            of_masks = tokens[:, 1 + int(scores) :][:, :4]
            hyper = [
                mlp(each)
                for mlp, each in zip(
                    self.output_hypernetworks_mlps, of_masks.unbind(1), strict=True
                )
            ]
            masks = torch.einsum("pmc,pchw->pmhw", torch.stack(hyper, 1), pixels)
            iou = self.iou_prediction_head(tokens[:, int(scores)])
            score = (
                self.pred_obj_score_head(tokens[:, 0]) if scores else torch.full((count, 1), 10.0)
            )
            return masks, iou, of_masks, score

    transformer = modeling.TwoWayTransformer(depth=2, embedding_dim=DIM, num_heads=4, mlp_dim=DIM)
    decoder: Any = MaskDecoder(
        transformer_dim=DIM, transformer=transformer, iou_head_hidden_dim=DIM
    )
    decoder.use_high_res_features, decoder.pred_obj_scores = high_resolution, scores
    if high_resolution:
        decoder.conv_s0, decoder.conv_s1 = nn.Conv2d(DIM, DIM // 8, 1), nn.Conv2d(DIM, DIM // 4, 1)
    if scores:
        decoder.obj_score_token = nn.Embedding(1, DIM)
        decoder.pred_obj_score_head = nn.Linear(DIM, 1)
    randomise(decoder)
    if scores:
        nn.init.ones_(decoder.pred_obj_score_head.bias)  # no score is near zero
    return decoder


def decoder_inputs(
    images: int, prompts: int, repeat_image: bool, grad: bool = False
) -> dict[str, Any]:
    """Arguments of the decoder; with `repeat_image` one image has all prompts, else each prompt has its image."""
    generator = torch.Generator().manual_seed(2)

    def normal(count: int, width: int, *size: int) -> Tensor:
        return torch.randn(count, width, *size, generator=generator).requires_grad_(grad)

    return {
        "image_embeddings": normal(images, DIM, GRID, GRID),
        "image_pe": normal(1, DIM, GRID, GRID),
        "sparse_prompt_embeddings": normal(prompts, 2, DIM),
        "dense_prompt_embeddings": normal(prompts, DIM, GRID, GRID),
        "repeat_image": repeat_image,
        "high_res_features": [
            normal(images, DIM // 8, 4 * GRID, 4 * GRID),
            normal(images, DIM // 4, 2 * GRID, 2 * GRID),
        ],
    }


def base() -> Any:
    """A `SAM2Base` with a prompt encoder and a mask decoder; its image encoder is another than SAM's."""
    modeling = load_sam_modeling()
    model: Any = type("SAM2Base", (nn.Module,), {})()
    model.image_encoder = nn.Conv2d(3, DIM, 4, stride=4)
    model.sam_prompt_encoder = randomise(
        modeling.PromptEncoder(DIM, (GRID, GRID), (4 * GRID, 4 * GRID), mask_in_chans=4)
    )
    model.sam_mask_decoder = mask_decoder()
    return model.eval()


class Transforms(nn.Module):
    """From logits to the frame's size."""

    max_hole_area = max_sprinkle_area = 0.0

    def postprocess_masks(self, masks: Tensor, orig_hw: tuple[int, int]) -> Tensor:
        if self.max_hole_area > 0:
            masks = torch.where(masks > -1, masks.clamp(min=1), masks)
        return F.interpolate(masks.float(), orig_hw, mode="bilinear", align_corners=False)


class SAM2ImagePredictor:
    """With the features of an image already set."""

    def __init__(self, mask_threshold: float = 0.0) -> None:
        self.model, self._transforms = base(), Transforms()
        self.mask_threshold, self._orig_hw = mask_threshold, [(31, 45)]
        inputs = decoder_inputs(1, 1, False)
        high = inputs["high_res_features"]
        self._features = {"image_embed": inputs["image_embeddings"], "high_res_feats": high}

    @torch.no_grad()
    def _predict(
        self,
        point_coords: Tensor | None,
        point_labels: Tensor | None,
        boxes: Tensor | None = None,
        mask_input: Tensor | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        img_idx: int = -1,
    ) -> tuple[Tensor, Tensor, Tensor]:
        points = None if point_coords is None else (point_coords, point_labels)
        sparse, dense = self.model.sam_prompt_encoder(points, boxes, mask_input)
        logits, iou, _, _ = self.model.sam_mask_decoder(
            image_embeddings=self._features["image_embed"][img_idx, None],
            image_pe=self.model.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask_output,
            repeat_image=len(sparse) > 1,
            high_res_features=[each[img_idx, None] for each in self._features["high_res_feats"]],
        )
        masks = self._transforms.postprocess_masks(logits, self._orig_hw[img_idx])
        if not return_logits:
            masks = masks > self.mask_threshold
        return masks, iou, logits.clamp(-32.0, 32.0)


def generator() -> Any:
    """A `SAM2AutomaticMaskGenerator` that holds a predictor."""
    kind = type("SAM2AutomaticMaskGenerator", (SimpleNamespace,), {})
    return kind(predictor=SAM2ImagePredictor())
