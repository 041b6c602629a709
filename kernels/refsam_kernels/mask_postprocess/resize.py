"""SAM's two bilinear resizes as one matrix per axis, applied in bands.

Both resizes and the crop between them are linear and act on rows and columns separately, so a resized mask is `R X C^T`. A row
of R or C has at most four neighbouring non-zero entries: a band of output positions needs a few input positions only, and its
part of the matrix is small and dense. The entries come from `torch.nn.functional.interpolate` itself, applied to the identity:
PyTorch rounds positions to float32, and exact weights would be up to 6e-5 away from its.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Output positions per band, by device: small enough to skip most zeros on a CPU, one product elsewhere.
BAND_SIZES = {"cpu": 128}
WHOLE_AXIS = 2**62


@dataclass(frozen=True)
class Band:
    """Part of an axis: output[outputs] = weights @ input[inputs]."""

    outputs: slice
    inputs: slice
    weights: Tensor


@dataclass(frozen=True)
class TwoResizes:
    """The resizes of masks (p, h, w) -> (p, H, W), of rows and of columns, and their transposes."""

    low_size: tuple[int, int]
    output_size: tuple[int, int]
    row_bands: tuple[Band, ...]
    column_bands: tuple[Band, ...]

    def rows(self, masks: Tensor) -> Tensor:
        """(p, h, w) -> (p, H, w)"""
        resized = masks.new_empty(len(masks), self.output_size[0], self.low_size[1])
        for mask, out in zip(masks, resized, strict=True):
            for band in self.row_bands:
                torch.mm(band.weights, mask[band.inputs], out=out[band.outputs])
        return resized

    def columns(self, masks: Tensor) -> Tensor:
        """(p, n, w) -> (p, n, W)"""
        resized = masks.new_empty(*masks.shape[:2], self.output_size[1])
        for mask, out in zip(masks, resized, strict=True):
            for band in self.column_bands:
                torch.mm(mask[:, band.inputs], band.weights.T, out=out[:, band.outputs])
        return resized

    def rows_transposed(self, masks: Tensor) -> Tensor:
        """(p, H, w) -> (p, h, w)"""
        gathered = masks.new_zeros(len(masks), *self.low_size)
        for mask, out in zip(masks, gathered, strict=True):
            for band in self.row_bands:
                out[band.inputs].addmm_(band.weights.T, mask[band.outputs])
        return gathered

    def columns_transposed(self, masks: Tensor) -> Tensor:
        """(p, n, W) -> (p, n, w)"""
        gathered = masks.new_zeros(*masks.shape[:2], self.low_size[1])
        for mask, out in zip(masks, gathered, strict=True):
            for band in self.column_bands:
                out[:, band.inputs].addmm_(mask[:, band.outputs], band.weights)
        return gathered


@lru_cache(maxsize=32)
def two_resizes(
    low_size: tuple[int, int],
    image_size: int,
    input_size: tuple[int, int],
    output_size: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> TwoResizes:
    """The resizes low_size -> (image_size, image_size) -> crop to input_size -> output_size; kept for the next call."""
    rows, columns = (
        _bands(resize_matrix(low, image_size, cropped, output, dtype), device)
        for low, cropped, output in zip(low_size, input_size, output_size, strict=True)
    )
    return TwoResizes(low_size, output_size, rows, columns)


def resize_matrix(
    low: int, image_size: int, cropped: int, output: int, dtype: torch.dtype
) -> Tensor:
    """The matrix (output, low) of low -> image_size -> crop -> output along one axis, as PyTorch computes in `dtype`."""
    units = torch.eye(low, dtype=dtype).unsqueeze(0)
    image = F.interpolate(units, image_size, mode="linear", align_corners=False)[..., :cropped]
    return F.interpolate(image, output, mode="linear", align_corners=False).squeeze(0).T


def _bands(matrix: Tensor, device: torch.device) -> tuple[Band, ...]:
    size = BAND_SIZES.get(device.type, WHOLE_AXIS)
    bands = []
    for start in range(0, len(matrix), size):
        part = matrix[start : start + size]
        used = part.any(dim=0).nonzero()
        inputs = slice(int(used.min()), int(used.max()) + 1)
        weights = part[:, inputs].contiguous().to(device)
        bands.append(Band(slice(start, start + len(part)), inputs, weights))
    return tuple(bands)
