"""Auxiliary losses on every object of a generated frame, for an encoder that starts from random weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refsam.data.generated.clips import COLOUR_CLASSES, SHAPE_CLASSES
from refsam.data.generated.scene import MAX_OBJECTS
from refsam.model import ImageFeatures

# The weight of a token without an object; each token of an object of n tokens has 1 / sqrt(n).
_BACKGROUND_WEIGHT = 0.03
# The weight of "no name" among the shapes: it is by far the most frequent and says the least.
_NAMELESS_WEIGHT = 0.15
_PLACE_UNIT = 16.0  # pixels
_WEIGHTS = {
    "colour": 1.0,
    "shape": 0.5,
    "whole_shape": 1.0,
    "place": 1.0,
    "outline": 2.0,
    "order": 0.3,
}
_MOST_COUNTED = 4.0  # "the fourth from the left" has three before it; beyond that nobody counts
_SOFTNESS = {"place": 0.02, "size": 0.1}  # below these differences an object counts in part


class ObjectHead(nn.Module):
    """Linear layers that predict colour, shape, place, outline and order of objects from image tokens; removed after training.

    A mask loss alone teaches the encoder little about objects that no expression of the batch names, and nothing about
    shape for thousands of steps. `channels` is the width of the image embedding, `stride` the pixels per token.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.colour = nn.Linear(channels, len(COLOUR_CLASSES))
        self.shape = nn.Linear(channels, len(SHAPE_CLASSES))
        self.whole_shape = nn.Linear(channels, len(SHAPE_CLASSES))
        self.place = nn.Linear(channels, 5)
        self.outline = nn.Linear(channels, stride * stride)
        self.order = nn.Linear(channels, 6 * 4)
        self.target = nn.Linear(channels, 4)

    def forward(self, image: ImageFeatures, attributes: Tensor, owner: Tensor) -> dict[str, Tensor]:
        """Weighted scalar losses over B frames; attributes (B, H, W, 2) and owner (B, H, W) as generated, at the model's scale.

        `colour` and `shape` are cross entropies per token, `whole_shape` that of the mean of an object's tokens. `place` is the
        offset to the centre of the token's object, that centre in the frame, and the object's size. `outline`: which pixels
        of a token show an object. `order`: how many objects lie on each side, are smaller and are larger, among all objects and
        among those of its colour, of its shape and of both.
        """
        middle = self.stride // 2
        seen = attributes[:, middle :: self.stride, middle :: self.stride].long()
        index = owner[:, middle :: self.stride, middle :: self.stride].long() + 1  # 0: none
        tokens = image.embedding.unflatten(1, image.grid)[:, : seen.shape[1], : seen.shape[2]]
        tokens = tokens * tokens.shape[-1] ** 0.5  # unit vectors: of usual size again
        counts = _sums(index.flatten(1), torch.ones_like(index, dtype=torch.float32).flatten(1))
        share = counts.gather(1, index.flatten(1)).view(index.shape).rsqrt()
        on_object = index > 0
        weight = torch.where(on_object, share, _BACKGROUND_WEIGHT)
        shape_weight = torch.where(seen[..., 1] == 1, _NAMELESS_WEIGHT, 1.0) * weight
        place = F.smooth_l1_loss(
            self.place(tokens).float(), self._places(owner, index), reduction="none"
        )
        losses = {
            "colour": _mean(_cross_entropy(self.colour(tokens), seen[..., 0]), weight),
            "shape": _mean(_cross_entropy(self.shape(tokens), seen[..., 1]), shape_weight),
            "whole_shape": self._whole_shape(tokens, index, seen[..., 1], counts),
            "place": _mean(place.sum(-1), share * on_object),
            "outline": self._outline(tokens, owner),
            "order": self._order(tokens, owner, attributes, index, share),
        }
        return {name: _WEIGHTS[name] * loss for name, loss in losses.items()}

    def _whole_shape(self, tokens: Tensor, index: Tensor, shapes: Tensor, counts: Tensor) -> Tensor:
        """Cross entropy of the shape that the mean of each object's tokens shows."""
        members = F.one_hot(index.flatten(1), MAX_OBJECTS + 1).to(tokens.dtype)
        means = members.transpose(1, 2) @ tokens.flatten(1, 2) / counts.clamp(min=1)[..., None]
        label = torch.zeros_like(counts, dtype=torch.long)
        label = label.scatter(1, index.flatten(1), shapes.flatten(1))
        present = (counts > 0) & (torch.arange(MAX_OBJECTS + 1, device=counts.device) > 0)
        weight = torch.where(label == 1, _NAMELESS_WEIGHT, 1.0) * present
        return _mean(_cross_entropy(self.whole_shape(means), label), weight)

    def targets(self, object_token: Tensor, masks: Tensor) -> Tensor:
        """Scalar loss of place, size and presence of the P objects, predicted from their tokens.

        object_token (P, C), masks (P, H, W) bool. A mask loss alone is slow to teach which of several similar objects is meant.
        """
        read = self.target(object_token).float()
        flat = masks.flatten(1).float()
        area = flat.sum(1)
        y, x = _coordinates(masks)
        middle = [(flat @ axis.flatten()) / area.clamp(min=1) for axis in (x, y)]
        truth = torch.stack([*(2 * m - 1 for m in _shares(middle, masks)), _log_side(area)], dim=1)
        place = F.smooth_l1_loss(read[:, :3], truth, reduction="none", beta=0.3).sum(1)
        there = (area > 0).float()
        return _mean(place, there) + F.binary_cross_entropy_with_logits(read[:, 3], there)

    def _places(self, owner: Tensor, index: Tensor) -> Tensor:
        """(B, h, w, 5) from what is seen of the token's object: the way to its middle, that middle, log of its side."""
        flat = owner.flatten(1).long() + 1
        area = _sums(flat, torch.ones_like(flat, dtype=torch.float32))
        chosen = index.flatten(1)
        area_seen = area.gather(1, chosen).view(index.shape).clamp(min=1)
        start = self.stride // 2
        ways, middles = [], []
        y, x = _coordinates(owner)
        for axis, middle in zip((x, y), _middles(owner, flat, area), strict=True):
            middles.append(middle.gather(1, chosen).view(index.shape))
            ways.append(
                (middles[-1] - axis[start :: self.stride, start :: self.stride]) / _PLACE_UNIT
            )
        places = [2 * middle - 1 for middle in _shares(middles, owner)]
        return torch.stack([*ways, *places, _log_side(area_seen)], dim=-1)

    def _order(
        self, tokens: Tensor, owner: Tensor, attributes: Tensor, index: Tensor, share: Tensor
    ) -> Tensor:
        """Loss of the counts predicted from the tokens of objects with a named colour, where the counts are defined."""
        counts, defined = count_others(owner, attributes)
        chosen = index.flatten(1)[..., None].expand(-1, -1, counts.shape[-1])
        truth, weight = (t.gather(1, chosen).view(*index.shape, -1) for t in (counts, defined))
        errors = F.smooth_l1_loss(self.order(tokens).float(), truth, reduction="none", beta=0.3)
        return 6 * _mean(errors, weight * share[..., None])

    def _outline(self, tokens: Tensor, owner: Tensor) -> Tensor:
        height, width = (side * self.stride for side in tokens.shape[1:3])
        covered = (owner >= 0).float()[:, None]
        covered = F.pad(covered, (0, width - owner.shape[2], 0, height - owner.shape[1]))
        pixels = F.pixel_unshuffle(covered, self.stride).movedim(1, -1)
        return F.binary_cross_entropy_with_logits(self.outline(tokens).float(), pixels)


def count_others(owner: Tensor, attributes: Tensor) -> tuple[Tensor, Tensor]:
    """Number of other objects left, right, above and below each object, smaller and larger, and where that is defined.

    owner (B, H, W) and attributes (B, H, W, 2) as generated. Returns two tensors (B, MAX_OBJECTS + 1, 24), object i in row
    i + 1: counts up to four, in part where it is close, and 1.0 where they count. The six are counted among all objects whose
    colour has a name, among those of the object's own colour, of its own shape, and of both.
    """
    flat = owner.flatten(1).long() + 1
    area = _sums(flat, torch.ones_like(flat, dtype=torch.float32))
    x_share, y_share = _shares(_middles(owner, flat, area), owner)
    colour, shape = (
        torch.zeros_like(area, dtype=torch.long).scatter(1, flat, a.flatten(1).long())
        for a in attributes.unbind(-1)
    )
    seen = (area > 0) & (colour > 1)
    same_colour, same_shape = (t[:, :, None] == t[:, None, :] for t in (colour, shape))
    groups = torch.stack(
        [torch.ones_like(same_colour), same_colour, same_shape, same_colour & same_shape]
    )
    is_other = ~torch.eye(seen.shape[1], dtype=torch.bool, device=owner.device)
    groups = groups & (seen[:, :, None] & seen[:, None, :] & is_other)
    beyond = [
        torch.sigmoid((t[:, :, None] - t[:, None, :]) / softness)
        for t, softness in (
            (x_share, _SOFTNESS["place"]),
            (y_share, _SOFTNESS["place"]),
            (_log_side(area), _SOFTNESS["size"]),
        )
    ]
    sides = torch.stack([side for b in beyond for side in (b, 1 - b)])
    counts = torch.einsum("gbij,sbij->bisg", groups.float(), sides).clamp(max=_MOST_COUNTED)
    has_shape = shape > 1
    defined = torch.stack([seen, seen, seen & has_shape, seen & has_shape], dim=-1)
    return counts.flatten(2), defined[:, :, None].expand(-1, -1, 6, -1).flatten(2).float()


def _middles(owner: Tensor, flat: Tensor, area: Tensor) -> list[Tensor]:
    """x and y in pixels, (B, MAX_OBJECTS + 1) each, of the middle of what is seen; flat (B, N) numbers it, area counts it."""
    y, x = _coordinates(owner)
    return [_sums(flat, axis.flatten().expand(flat.shape)) / area.clamp(min=1) for axis in (x, y)]


def _coordinates(frames: Tensor) -> tuple[Tensor, Tensor]:
    """y and x, both (H, W), of the middles of the pixels of (..., H, W)."""
    ranges = (torch.arange(side, device=frames.device) + 0.5 for side in frames.shape[-2:])
    y, x = torch.meshgrid(*ranges, indexing="ij")
    return y, x


def _shares(middle: list[Tensor], frames: Tensor) -> list[Tensor]:
    """x and y in pixels as shares of the width and height of (..., H, W)."""
    height, width = frames.shape[-2:]
    return [middle[0] / width, middle[1] / height]


def _log_side(area: Tensor) -> Tensor:
    """Around 0 for the areas, in pixels, of usual objects."""
    return area.clamp(min=1).log() / 2 - 3


def _sums(index: Tensor, values: Tensor) -> Tensor:
    """(B, MAX_OBJECTS + 1) sums of values (B, N) by index (B, N)."""
    return values.new_zeros(len(index), MAX_OBJECTS + 1).scatter_add(1, index, values)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().movedim(-1, 1), labels, reduction="none")


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).sum() / weight.sum().clamp(min=1e-6)
