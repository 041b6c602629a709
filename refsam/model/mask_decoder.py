"""SAM's mask decoder and the part of its prompt encoder that RefSAM needs."""

import math
from collections.abc import Hashable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refsam.model.layer_norm import NORM_2D_EPS, LayerNorm2d
from refsam.model.two_way_transformer import TwoWayTransformer
from refsam_kernels import Fingerprint, is_capturing, mask_upscale, settle

# Most elements of image tokens that a CPU decodes at a time. More would leave its caches between two operators, and would be
# padded to the longest expression.
ELEMENTS = 2**20


class RandomPositionEncoding(nn.Module):
    """Sines and cosines of random frequencies (segment-anything, modeling/prompt_encoder.py).

    The last grid's encoding is kept, and given out again as the same tensor: `token_image_attention` remembers the
    products of positions that it has seen before. crops: a rectangle has the positions of the upper left part of its square.
    """

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, dim: int, crops: bool = False) -> None:
        super().__init__()
        self.crops = crops
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, dim // 2))
        self._fingerprint = Fingerprint()
        self._made: tuple[Hashable, Tensor] | None = None

    def forward(self, height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The encoding (1, height * width, dim) of a grid, computed in float32 or wider."""
        matrix = self.positional_encoding_gaussian_matrix
        # A CUDA graph's own memory must not be kept, and its replays follow the matrix.
        if is_capturing(matrix) or torch.compiler.is_compiling():
            return self._encode(height, width).to(dtype)
        key, made = (height, width, dtype, self._fingerprint([matrix])), self._made
        if made is None or made[0] != key:
            # Tensors made in inference mode could not be used outside it, and nothing made of them is remembered.
            with torch.inference_mode(False), torch.no_grad():
                made = key, self._encode(height, width).to(dtype)
            settle([made[1]])
            self._made = made
        return made[1]

    def _encode(self, height: int, width: int) -> Tensor:
        matrix = self.positional_encoding_gaussian_matrix
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        rows, columns = (max(height, width),) * 2 if self.crops else (height, width)
        y = (torch.arange(height, device=matrix.device, dtype=matrix.dtype) + 0.5) / rows
        x = (torch.arange(width, device=matrix.device, dtype=matrix.dtype) + 0.5) / columns
        grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)
        angles = 2 * math.pi * ((2 * grid - 1) @ matrix)
        return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(0, 1)[None]


class PromptEncoder(nn.Module):
    """SAM's prompt encoder without points, boxes and masks: prompts come from the text.

    with_dense: keep `no_mask_embed`, the dense prompt for the absence of a mask, which RefSAM does not use.
    """

    def __init__(self, dim: int, with_dense: bool = False, crops: bool = False) -> None:
        super().__init__()
        self.pe_layer = RandomPositionEncoding(dim, crops)
        if with_dense:
            self.no_mask_embed = nn.Embedding(1, dim)


class HeadMLP(nn.Module):
    """Linear layers with ReLU between them, named as in SAM's mask decoder."""

    def __init__(self, dim: int, hidden_dim: int, output_dim: int, num_layers: int = 3) -> None:
        super().__init__()
        widths = [dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(
            nn.Linear(width, next_width) for width, next_width in pairwise(widths)
        )

    @property
    def last(self) -> nn.Linear:
        """The layer that gives the output."""
        layer = self.layers[-1]
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., output_dim)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class MaskDecoder(nn.Module):
    """Masks from image tokens and sparse prompts (segment-anything, modeling/mask_decoder.py).

    Channels-last, any number of sparse prompts per image row. Parameter names are SAM's.
    """

    def __init__(
        self, dim: int, transformer: TwoWayTransformer, num_masks: int, iou_hidden_dim: int
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(num_masks, dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 4, kernel_size=2, stride=2),
            LayerNorm2d(dim // 4),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 4, dim // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            HeadMLP(dim, dim, dim // 8) for _ in range(num_masks)
        )
        self.iou_prediction_head = HeadMLP(dim, iou_hidden_dim, num_masks)

    def forward(
        self,
        image: Tensor,
        image_pe: Tensor,
        sparse: Tensor,
        lengths: Tensor | None,
        grid: tuple[int, int],
        num_masks: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Image tokens with dense prompts (P, N, C) and sparse prompts (P, T, C) to masks.

        image_pe (1, N, C); the first lengths (P,) sparse prompts of each row are valid, None means all.
        Returns mask logits (P, num_masks, 4h, 4w), predicted IoUs (P, num_masks) and the
        transformer's mask tokens (P, num_masks, C), for the first num_masks mask tokens.
        """
        parts = _parts(image)
        if len(parts) <= 1:
            return self._predict(image, image_pe, sparse, lengths, grid, num_masks)
        predicted = []
        for part in parts:
            prompts, valid = _trim(sparse[part], None if lengths is None else lengths[part])
            predicted.append(self._predict(image[part], image_pe, prompts, valid, grid, num_masks))
        logits, iou, mask_tokens = (torch.cat(each) for each in zip(*predicted, strict=True))
        return logits, iou, mask_tokens

    def _predict(
        self,
        image: Tensor,
        image_pe: Tensor,
        sparse: Tensor,
        lengths: Tensor | None,
        grid: tuple[int, int],
        num_masks: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `forward`."""
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([own.expand(sparse.shape[0], -1, -1), sparse], dim=1)
        lengths = None if lengths is None else lengths + len(own)
        # Without lengths every bit is segment-anything's: how many rows a product has decides its roundings.
        wanted = None if lengths is None else 1 + num_masks
        tokens, image = self.transformer(tokens, image, image_pe, lengths, wanted)
        mask_tokens = tokens[:, 1 : 1 + num_masks]
        hyper = [
            mlp(mask_tokens[:, index])
            for index, mlp in enumerate(self.output_hypernetworks_mlps[:num_masks])
        ]
        logits = mask_upscale(
            image.unflatten(1, grid),
            torch.stack(hyper, dim=1),
            *self.output_upscaling.parameters(),
            eps=NORM_2D_EPS,
        )
        return logits, self.iou_prediction_head(tokens[:, 0])[:, :num_masks], mask_tokens


def _parts(image: Tensor) -> list[slice]:
    """Slices of the expressions in (P, N, C) to compute at a time: a few on a CPU without gradients, else all."""
    if image.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return []
    size = max(1, ELEMENTS // image[0].numel())
    return [slice(start, start + size) for start in range(0, len(image), size)]


def _trim(sparse: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Cut prompts (P, T, C) to the longest row."""
    return sparse if lengths is None else sparse[:, : int(lengths.max())], lengths
