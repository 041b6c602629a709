"""Pixels and masks of scenes, batched in torch on any device."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from refsam.data.generated.blocks import Block, letters
from refsam.data.generated.scene import Background, Scene
from refsam.data.generated.shapes import ANGLES

_CANVAS = 1.25  # the background is drawn larger than the frame, so that the camera can move
_LUMINANCE = (0.299, 0.587, 0.114)


def render(
    scenes: Sequence[Scene], photographs: Sequence[Tensor], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw the scenes, all of one size and number of frames.

    Returns frames (B, T, H, W, 3) uint8 RGB and owner (B, T, H, W) int8: the object that is seen at a pixel, -1 for none.
    The device is the generator's.
    """
    device = generator.device
    height, width = scenes[0].size
    image = _draw_backgrounds(scenes, photographs, device).flatten(0, 1)
    owner = torch.full((len(image), height, width), -1, dtype=torch.int8, device=device)
    texture = _texture(image, generator)
    tables = _tables(scenes, device)
    for index in range(tables["place"].shape[1]):
        table = {key: value[:, index] for key, value in tables.items()}
        image, owner = _draw_object(image, owner, texture, index, table)
    image = _degrade(image, len(scenes), generator)
    frames = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    shape = (len(scenes), -1, height, width)
    return frames.reshape(*shape, 3), owner.reshape(shape)


def _tables(scenes: Sequence[Scene], device: torch.device) -> dict[str, Tensor]:
    """The objects' parameters as (B*T, O, ·) tensors, where O is the largest number in a scene; missing objects have no area."""
    frames = len(scenes[0].camera)
    objects = max(len(scene.objects) for scene in scenes)
    rows = [
        [_row(scene, index, t) for index in range(objects)]
        for scene in scenes
        for t in range(frames)
    ]
    values = {key: [[row[key] for row in each] for each in rows] for key in rows[0][0]}
    return {k: torch.tensor(v, dtype=torch.float32, device=device) for k, v in values.items()}


def _row(scene: Scene, index: int, t: int) -> dict[str, list[float]]:
    height, width = scene.size
    item = scene.objects[min(index, len(scene.objects) - 1)]
    shift_x, shift_y, zoom = scene.camera[t]
    area = item.area if index < len(scene.objects) else 0.0
    return {
        "place": [
            ((item.centre[t, 0] - 0.5) * zoom + 0.5 + shift_x) * width,
            ((item.centre[t, 1] - 0.5) * zoom + 0.5 + shift_y) * height,
            max(1e-3, (area * height * width) ** 0.5 * zoom),
            float(item.rotation[t]),
            item.stretch**0.5,
            float(area > 0),
        ],
        "profile": item.shape.profile.tolist(),
        "hole": list(item.shape.hole),
        "rgb": item.rgb.tolist(),
        "decal": [*item.decal, *item.decal_rgb],
        "look": [*item.shading, *item.texture, item.mottle, item.shadow],
        "block": _block_row(item.block),
    }


def _block_row(block: Block | None) -> list[float]:
    if block is None:
        return [0.0] * 14
    colours = (*block.panel_rgb, *block.letter_rgb, *block.side_rgb)
    return [block.panel, block.letter, block.letter_size, *block.side, *colours]


def _draw_object(
    image: Tensor, owner: Tensor, texture: Tensor, index: int, table: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Lay one object of every frame over image (F, 3, H, W) and owner (F, H, W)."""
    x, y, scale, present = _object_coordinates(table["place"], owner.shape[1:])
    radius = _radius(x, y, table["profile"])
    coverage = _coverage(x, y, radius, scale, table) * present
    image = image * (1 - _shadow(x, y, table["look"][:, 7], present) * (1 - coverage))[:, None]
    _draw_sides(image, owner, table)
    colour = _surface(x, y, radius, texture, table)
    image = torch.lerp(image, colour, coverage[:, None])
    return image, owner.masked_fill(coverage > 0.5, index)


def _object_coordinates(
    place: Tensor, size: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coordinates (F, H, W) of each pixel in units of the object's outline, and its scale and presence (F, 1, 1)."""
    columns = place[:, :, None, None].unbind(1)
    centre_x, centre_y, scale, rotation, stretch, present = columns
    x = torch.arange(size[1], device=place.device)[None, None, :] + 0.5 - centre_x
    y = torch.arange(size[0], device=place.device)[None, :, None] + 0.5 - centre_y
    cosine, sine = rotation.cos(), rotation.sin()
    along = (x * cosine + y * sine) / (scale * stretch)
    across = (y * cosine - x * sine) * (stretch / scale)
    return along, across, scale, present


def _draw_sides(image: Tensor, owner: Tensor, table: dict[str, Tensor]) -> None:
    """Draw the bare sides of blocks, the outline swept to the position of the back, over image and owner in place."""
    frames, rows = _blocks(table)
    if not len(frames):
        return
    side = rows["block"][:, 3:5] * rows["place"][:, 2:3]
    swept = torch.zeros_like(image[frames, 0])
    for depth in (0.5, 1):
        place = torch.cat([rows["place"][:, :2] + depth * side, rows["place"][:, 2:]], dim=1)
        x, y, scale, present = _object_coordinates(place, owner.shape[1:])
        radius = _radius(x, y, rows["profile"])
        swept = torch.maximum(swept, _coverage(x, y, radius, scale, rows) * present)
    colour = rows["block"][:, 11:14, None, None]
    image[frames] = torch.lerp(image[frames], colour, swept[:, None])
    owner[frames] = owner[frames].masked_fill(swept > 0.5, -1)


def _blocks(table: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The frames where the object is a toy block (its letter has a size), and the table's rows of those frames."""
    frames = table["block"][:, 2].nonzero()[:, 0]
    return frames, {key: value[frames] for key, value in table.items()}


def _coverage(
    x: Tensor, y: Tensor, radius: Tensor, scale: Tensor, table: dict[str, Tensor]
) -> Tensor:
    """The share of each pixel that the outline covers, 0..1, soft over one pixel."""
    inside = ((radius - torch.hypot(x, y)) * scale + 0.5).clamp(0, 1)
    hole_x, hole_y, hole_radius = (v[:, None, None] for v in table["hole"].unbind(1))
    outside_hole = ((torch.hypot(x - hole_x, y - hole_y) - hole_radius) * scale + 0.5).clamp(0, 1)
    return inside * torch.where(hole_radius > 0, outside_hole, 1.0)


def _radius(x: Tensor, y: Tensor, profile: Tensor) -> Tensor:
    """The outline's radius, (F, H, W), in the direction of each pixel."""
    place = (torch.atan2(y, x) / (2 * torch.pi) + 0.5) * ANGLES
    lower = place.floor()
    first = (lower.long() & (ANGLES - 1)).flatten(1)
    second = (first + 1) & (ANGLES - 1)
    begin, end = (profile.gather(1, index).view_as(x) for index in (first, second))
    return torch.lerp(begin, end, place - lower)


def _shadow(x: Tensor, y: Tensor, strength: Tensor, present: Tensor) -> Tensor:
    """Darkness, 0..1, of a soft shadow below and beside the object."""
    # exp of a smaller number than -8 is slow and practically 0.
    distance = ((x - 0.15) ** 2 + (y - 0.2) ** 2).clamp(max=8)
    return strength[:, None, None] * present * torch.exp(-2.5 * distance)


def _surface(
    x: Tensor, y: Tensor, radius: Tensor, texture: Tensor, table: dict[str, Tensor]
) -> Tensor:
    """The object's colour (F, 3, H, W): base, stripes, shading, a decal or a block's print, and a photograph's texture."""
    slope_x, slope_y, highlight, frequency, angle, contrast, mottle, _ = (
        v[:, None, None] for v in table["look"].unbind(1)
    )
    light = 1 + slope_x * x + slope_y * y
    light = light * (1 + contrast * torch.sin(frequency * (x * angle.cos() + y * angle.sin())))
    colour = table["rgb"][:, :, None, None] * light[:, None]
    decal_x, decal_y, decal_radius = (v[:, None, None] for v in table["decal"][:, :3].unbind(1))
    on_decal = (torch.hypot(x - decal_x, y - decal_y) < decal_radius)[:, None]
    colour = torch.where(on_decal, table["decal"][:, 3:, None, None] * light[:, None], colour)
    frames, rows = _blocks(table)
    if len(frames):
        printed = _print(x[frames], y[frames], radius[frames], rows)
        colour = colour.index_copy(0, frames, printed * light[frames, None])
    colour = colour * (1 + mottle[:, None] * (texture - 1))
    shine = highlight * torch.exp(-14 * ((x + 0.2) ** 2 + (y + 0.22) ** 2).clamp(max=1))
    return (colour + shine[:, None]).clamp(0, 1)


def _print(x: Tensor, y: Tensor, radius: Tensor, table: dict[str, Tensor]) -> Tensor:
    """The faces of blocks, (F, 3, H, W), without light: base, panel and letter."""
    panel, letter, letter_size = (v[:, None, None] for v in table["block"][:, :3].unbind(1))
    base, panel_rgb, letter_rgb = (
        v[:, :, None, None] for v in (table["rgb"], table["block"][:, 5:8], table["block"][:, 8:11])
    )
    scale = table["place"][:, 2, None, None]
    edge = (radius * panel - torch.hypot(x, y)) * scale
    on_panel = (edge + 0.5).clamp(0, 1) * (panel > 0)
    shapes = letters().to(x.device)[letter.long().flatten()][:, None]
    places = torch.stack([x, y], dim=3) / letter_size[..., None]
    on_letter = F.grid_sample(shapes, places, align_corners=False)
    return base.lerp(panel_rgb, on_panel[:, None]).lerp(letter_rgb, on_letter)


def _texture(image: Tensor, generator: torch.Generator) -> Tensor:
    """A factor around 1, (F, 1, H, W), taken from another part of the background's brightness."""
    weight = torch.tensor(_LUMINANCE, device=image.device)
    luminance = torch.einsum("c,fchw->fhw", weight, image)[:, None]
    shift = torch.randint(0, min(image.shape[2:]), (2,), generator=generator, device=image.device)
    rolled = luminance.roll(shift.tolist(), dims=(2, 3))
    return (rolled / rolled.mean(dim=(2, 3), keepdim=True).clamp(min=0.05)).clamp(0.2, 2.0)


def _draw_backgrounds(
    scenes: Sequence[Scene], photographs: Sequence[Tensor], device: torch.device
) -> Tensor:
    """(B, T, 3, H, W) in 0..1: each scene's background, seen by its moving camera."""
    height, width = scenes[0].size
    size = int(height * _CANVAS), int(width * _CANVAS)
    canvas = [_draw_background(scene.background, photographs, size) for scene in scenes]
    camera = torch.stack([torch.from_numpy(scene.camera) for scene in scenes]).to(device).float()
    theta = torch.zeros(*camera.shape[:2], 2, 3, device=device)
    for axis in range(2):
        theta[..., axis, axis] = 1 / (_CANVAS * camera[..., 2])
        theta[..., axis, 2] = -2 * camera[..., axis] / (_CANVAS * camera[..., 2])
    frames = camera.shape[1]
    shape = [len(theta) * frames, 3, height, width]
    grid = F.affine_grid(theta.flatten(0, 1), shape, align_corners=False)
    drawn = torch.stack(canvas).to(device).repeat_interleave(frames, 0)
    moved = F.grid_sample(drawn, grid, padding_mode="reflection", align_corners=False)
    return moved.unflatten(0, (len(scenes), frames))


def _draw_background(
    background: Background, photographs: Sequence[Tensor], size: tuple[int, int]
) -> Tensor:
    """(3, h, w) in 0..1."""
    if background.photograph is None:
        image = _draw_pattern(background, size)
    else:
        image = _crop_photograph(photographs[background.photograph], background, size)
    luminance = torch.einsum("c,chw->hw", torch.tensor(_LUMINANCE), image)
    image = luminance + (image - luminance) * background.saturation
    period, strength = background.grid
    if strength:
        step = max(4, round(period * max(size)))
        image[:, ::step] += strength
        image[:, :, ::step] += strength
    return image.clamp(0, 1)


def _crop_photograph(photograph: Tensor, background: Background, size: tuple[int, int]) -> Tensor:
    left, top, scale = background.crop
    height, width = photograph.shape[1:]
    rows = slice(int(top * height), int((top + scale) * height))
    columns = slice(int(left * width), int((left + scale) * width))
    crop = photograph[:, rows, columns]
    crop = crop.flip(2) if background.flip else crop
    return F.interpolate(crop[None], size=size, mode="bilinear", antialias=True)[0]


def _draw_pattern(background: Background, size: tuple[int, int]) -> Tensor:
    """Smooth noise of several scales and a slope, as a mixture of two colours."""
    random = torch.Generator().manual_seed(background.seed)
    mixture = torch.zeros(1, 1, *size)
    for cells, weight in ((2, 1.0), (5, 0.6), (14, 0.3), (60, 0.12)):
        noise = torch.randn(1, 1, cells, cells, generator=random) * weight
        mixture += F.interpolate(noise, size=size, mode="bicubic", align_corners=False)
    amount = torch.sigmoid(mixture[0, 0] * float(torch.rand((), generator=random) * 2.5))
    first, second = (torch.from_numpy(rgb).float()[:, None, None] for rgb in background.rgb)
    return first + (second - first) * amount


def _degrade(image: Tensor, clips: int, generator: torch.Generator) -> Tensor:
    """Light, white balance and noise of each clip; blur, lost resolution and compression of the whole batch; all at random."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, device=image.device)

    def per_clip(low: float, high: float, channels: int = 1) -> Tensor:
        return uniform(low, high, clips, channels, 1, 1).repeat_interleave(len(image) // clips, 0)

    image = image.clamp(1e-3, 1) ** per_clip(0.75, 1.35)
    image = image * per_clip(0.75, 1.12) * per_clip(0.93, 1.07, channels=3)
    choice = uniform(0, 1, 3).tolist()
    if choice[0] < 0.5:
        image = _blur(image, float(uniform(0.3, 1.2, 1)))
    elif choice[0] < 0.65:
        size = image.shape[2:]
        small = F.interpolate(image, scale_factor=0.5, mode="bilinear", antialias=True)
        image = F.interpolate(small, size=size, mode="bilinear")
    if choice[1] < 0.7:
        noise = torch.randn(image.shape, generator=generator, device=image.device)
        image = image + noise * per_clip(0, 0.04)
    if choice[2] < 0.4:
        image = _compress(image.clamp(0, 1), float(uniform(0.02, 0.12, 1)))
    return image


def _blur(image: Tensor, sigma: float) -> Tensor:
    reach = 3
    offsets = torch.arange(-reach, reach + 1, device=image.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    image = F.conv2d(F.pad(image, (reach, reach, 0, 0), mode="replicate"), kernel, groups=3)
    return F.conv2d(F.pad(image, (0, 0, reach, reach), mode="replicate"), kernel.mT, groups=3)


def _compress(image: Tensor, step: float) -> Tensor:
    """Quantise the 8 x 8 cosine transform, coarser for higher frequencies, as JPEG and H.264 do."""
    height, width = image.shape[2:]
    padded = F.pad(image, (0, -width % 8, 0, -height % 8), mode="replicate")
    k = torch.arange(8, device=image.device)
    basis = torch.cos((2 * k[None] + 1) * k[:, None] * torch.pi / 16) * 0.5
    basis[0] *= 0.5**0.5
    blocks = padded.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
    transformed = basis @ blocks @ basis.T
    quantum = step * (1 + k[:, None] + k[None])
    restored = basis.T @ ((transformed / quantum).round() * quantum) @ basis
    return restored.transpose(3, 4).flatten(4, 5).flatten(2, 3)[..., :height, :width]
