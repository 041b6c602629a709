"""segment-anything's `SamAutomaticMaskGenerator`: from the decoder's logits to run lengths, without maps of the frame's size."""

from typing import Any

import torch
from torch import Tensor

from refsam_kernels.integrations.replacement import Replacement
from refsam_kernels.integrations.segment_anything_masks import (
    decode,
    inherits,
    makes_masks,
    of_predictor,
)
from refsam_kernels.mask_postprocess.packed import mask_runs

BATCH = ("points", "im_size", "crop_box", "orig_size")
Box = list[int]  # left, top, right, bottom; the last two lie outside


def of_generator(generator: Any, path: str) -> list[Replacement]:
    """The replacements for a `SamAutomaticMaskGenerator` and its `SamPredictor`; a sub-class's own way to masks stays."""
    found = of_predictor(generator.predictor, f"{path}.predictor")
    is_its_own = inherits(generator, "_process_batch", "SamAutomaticMaskGenerator")
    if is_its_own and makes_masks(generator.predictor):
        found.append(Replacement(path, generator, _process_batch, "_process_batch", BATCH))
    return found


def _process_batch(
    generator: Any, points: Any, im_size: Any, crop_box: Box, orig_size: tuple[int, ...]
) -> Any:
    """`SamAutomaticMaskGenerator._process_batch`; only masks of a wanted IoU leave the decoder's size.

    `points` are (n, 2) float64 in pixels of the crop, as numpy has them.
    """
    own = type(generator)._process_batch.__globals__  # its helpers, which decide the same here
    if generator.stability_score_offset < 0:
        return type(generator)._process_batch(generator, points, im_size, crop_box, orig_size)
    logits, iou = _decode_points(generator.predictor, points, im_size)
    data = own["MaskData"](
        logits=logits.flatten(0, 1),
        iou_preds=iou.flatten(),
        points=torch.as_tensor(points.repeat(logits.shape[1], axis=0)),
    )
    if generator.pred_iou_thresh > 0.0:
        data.filter(data["iou_preds"] > generator.pred_iou_thresh)
    _add_masks(generator, data)
    if generator.stability_score_thresh > 0.0:
        data.filter(data["stability_score"] >= generator.stability_score_thresh)
    if not data["ends"]:
        data["boxes"] = data["boxes"].float()  # as there: of no masks they are floating point
    full = [0, 0, orig_size[1], orig_size[0]]
    near_edge = own["is_box_near_crop_edge"](data["boxes"], crop_box, full)
    if near_edge.any():
        data.filter(~near_edge)
    data["rles"] = [run_lengths(ends, crop_box, orig_size) for ends in data["ends"]]
    del data["ends"]
    return data


def _decode_points(predictor: Any, points: Any, im_size: Any) -> tuple[Tensor, Tensor]:
    """Logits (P, M, 4h, 4w) and predicted IoUs (P, M) of points, each a prompt of its own."""
    coordinates = predictor.transform.apply_coords(points, im_size)
    coordinates = torch.as_tensor(coordinates, device=predictor.device)[:, None]
    labels = torch.ones(coordinates.shape[:2], dtype=torch.int, device=coordinates.device)
    return decode(
        predictor.model, predictor.features, (coordinates, labels), None, None, multimask_output=True
    )  # fmt: skip


def _add_masks(generator: Any, data: Any) -> None:
    """Puts where the masks' runs end, their boxes and stability in the place of their logits."""
    predictor = generator.predictor
    ends, _, statistics = mask_runs(
        data["logits"],
        predictor.model.image_encoder.img_size,
        (predictor.input_size[0], predictor.input_size[1]),
        (predictor.original_size[0], predictor.original_size[1]),
        predictor.model.mask_threshold,
        generator.stability_score_offset,
    )
    del data["logits"]
    area, certain, possible, *box = statistics.to(data["iou_preds"].device).unbind(dim=1)
    # As there: NaN where nothing is possible, and boxes whose right and bottom are inside.
    data["stability_score"] = certain.int() / possible.int()
    boxes = torch.stack(box, dim=1)
    boxes[:, 2:] -= (area > 0).unsqueeze(1).long()
    data["boxes"], data["ends"] = boxes, list(ends)


def run_lengths(ends: Tensor, crop_box: Box, size: tuple[int, ...]) -> dict[str, list[int]]:
    """Convert the ends of all runs but the last of a crop's mask to uncompressed run lengths in the frame (height, width)."""
    (left, top, right, bottom), (height, width) = crop_box, size[:2]
    rows, ends = bottom - top, ends.long()
    if len(ends) % 2:  # the last run is of pixels inside
        ends = torch.cat([ends, ends.new_tensor([rows * (right - left)])])
    starts, stops = ends[::2], ends[1::2]
    if rows < height:
        starts, stops = _in_taller_columns(starts, stops, rows, height)
    bounds = torch.stack([starts, stops], dim=1).flatten() + (left * height + top)
    pixels = height * width
    bounds = bounds[bounds < pixels]
    lengths = torch.cat([bounds.new_zeros(1), bounds, bounds.new_tensor([pixels])]).diff()
    return {"size": [height, width], "counts": lengths.tolist()}


def _in_taller_columns(
    starts: Tensor, stops: Tensor, rows: int, height: int
) -> tuple[Tensor, Tensor]:
    """Runs in columns of `rows` pixels, in columns of `height`: each ends where its column does."""
    first, last = starts // rows, (stops - 1) // rows
    pieces = last - first + 1
    before = pieces.cumsum(0) - pieces
    columns = torch.arange(int(pieces.sum())) + (first - before).repeat_interleave(pieces)
    starts = torch.maximum(starts.repeat_interleave(pieces), columns * rows)
    stops = torch.minimum(stops.repeat_interleave(pieces), (columns + 1) * rows)
    return starts + columns * (height - rows), stops + columns * (height - rows)
