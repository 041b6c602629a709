"""Outlines of the generated objects: star-shaped radial profiles of unit area."""

from dataclasses import dataclass

import numpy as np

ANGLES = 128
_THETA = np.linspace(-np.pi, np.pi, ANGLES, endpoint=False)


@dataclass(frozen=True)
class Shape:
    """An outline that an expression may name, or (name None) one that it may not.

    `profile (ANGLES,)` is the radius at each angle from -pi, scaled to unit area; `hole` is (x, y, radius) of a disc cut out,
    in the same units (radius 0: none); `tilt` is the largest rotation in radians for which the name stays true; `stretch` the
    largest ratio of the axes.
    """

    name: str | None
    profile: np.ndarray
    hole: tuple[float, float, float] = (0.0, 0.0, 0.0)
    tilt: float = np.pi
    stretch: float = 1.0


def _polygon(vertices: np.ndarray) -> np.ndarray:
    """The outermost point where each ray from the origin crosses the polygon, as a radius, (ANGLES,)."""
    start, end = vertices, np.roll(vertices, -1, axis=0)
    ray = np.stack([np.cos(_THETA), np.sin(_THETA)], axis=-1)[:, None]
    edge = (end - start)[None]
    cross = ray[..., 0] * edge[..., 1] - ray[..., 1] * edge[..., 0]
    cross = np.where(np.abs(cross) < 1e-9, 1e-9, cross)
    distance = (start[:, 0] * edge[..., 1] - start[:, 1] * edge[..., 0]) / cross
    along = (start[:, 0] * ray[..., 1] - start[:, 1] * ray[..., 0]) / cross
    hit = (along >= -1e-6) & (along <= 1 + 1e-6) & (distance > 0)
    return np.where(hit, distance, 0).max(axis=1).clip(0.02)


def _points(*pairs: tuple[float, float]) -> np.ndarray:
    return np.array(pairs, dtype=float)


def _regular(corners: int, inner: float | None = None) -> np.ndarray:
    """A regular polygon with one corner up; `inner` makes it a star with that inner radius."""
    count = corners if inner is None else 2 * corners
    angle = -np.pi / 2 + 2 * np.pi * np.arange(count) / count
    radius = np.ones(count) if inner is None else np.where(np.arange(count) % 2 == 0, 1.0, inner)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 80, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y - 2], axis=-1) / 16


def _superellipse(width: float, height: float, power: float) -> np.ndarray:
    cosine, sine = np.abs(np.cos(_THETA)) / width, np.abs(np.sin(_THETA)) / height
    return (cosine**power + sine**power) ** (-1 / power)


def _shape(
    name: str | None,
    profile: np.ndarray,
    hole: tuple[float, float, float] = (0.0, 0.0, 0.0),
    **limits: float,
) -> Shape:
    """A shape scaled to unit area; `limits` are `tilt` and `stretch`."""
    area = float(np.pi * np.mean(profile**2) - np.pi * hole[2] ** 2)
    return Shape(name, profile * area**-0.5, tuple(area**-0.5 * v for v in hole), **limits)


_CROSS = _points(
    (-0.35, -1), (0.35, -1), (0.35, -0.35), (1, -0.35), (1, 0.35), (0.35, 0.35),
    (0.35, 1), (-0.35, 1), (-0.35, 0.35), (-1, 0.35), (-1, -0.35), (-0.35, -0.35),
)  # fmt: skip
_ARROW = _points((1, 0), (0.1, -0.7), (0.1, -0.3), (-1, -0.3), (-1, 0.3), (0.1, 0.3), (0.1, 0.7))

NAMED_SHAPES = (
    _shape("circle", np.ones(ANGLES), stretch=1.06),
    _shape("square", _polygon(_regular(4) @ _points((0.707, 0.707), (-0.707, 0.707))), tilt=0.3),
    _shape(
        "rectangle", _polygon(_points((-1, -0.5), (1, -0.5), (1, 0.5), (-1, 0.5))), stretch=1.15
    ),
    _shape("triangle", _polygon(_regular(3)), stretch=1.2),
    _shape("diamond", _polygon(_points((0, -1), (0.75, 0), (0, 1), (-0.75, 0))), tilt=0.15),
    _shape("oval", _superellipse(1.0, 0.6, 2.0), stretch=1.1),
    _shape("star", _polygon(_regular(5, 0.42)), stretch=1.1),
    _shape("heart", _polygon(_heart()), tilt=0.6, stretch=1.15),
    _shape("cross", _polygon(_CROSS), stretch=1.1),
    _shape("ring", np.ones(ANGLES), (0.0, 0.0, 0.58), stretch=1.15),
    _shape("hexagon", _polygon(_regular(6)), stretch=1.05),
    _shape("crescent", np.ones(ANGLES), (0.45, 0.0, 0.72), stretch=1.1),
    _shape("arrow", _polygon(_ARROW), stretch=1.1),
)

ROUNDED_SQUARE = _shape("square", _superellipse(1.0, 1.0, 8.0), tilt=0.3)

_SILHOUETTES = (
    _points(  # bottle
        (-0.12, -1), (0.12, -1), (0.12, -0.5), (0.32, -0.25), (0.32, 0.95), (-0.32, 0.95),
        (-0.32, -0.25), (-0.12, -0.5),
    ),
    _points(  # backpack
        (-0.2, -1), (0.2, -1), (0.3, -0.8), (0.55, -0.65), (0.65, 0), (0.75, 0.2), (0.7, 0.9),
        (-0.7, 0.9), (-0.75, 0.2), (-0.65, 0), (-0.55, -0.65), (-0.3, -0.8),
    ),
    _points(  # cup with a handle
        (-0.6, -0.8), (0.5, -0.8), (0.48, -0.4), (0.85, -0.35), (0.85, 0.25), (0.44, 0.35),
        (0.4, 0.8), (-0.5, 0.8),
    ),
    _points(  # car
        (-1, 0.4), (-1, 0), (-0.6, -0.1), (-0.35, -0.45), (0.35, -0.45), (0.65, -0.1), (1, 0),
        (1, 0.4),
    ),
    _points(  # shirt
        (-0.3, -0.8), (0.3, -0.8), (1, -0.3), (0.8, 0.05), (0.45, -0.15), (0.45, 0.9),
        (-0.45, 0.9), (-0.45, -0.15), (-0.8, 0.05), (-1, -0.3),
    ),
    _points(  # person, arms down
        (-0.15, -1), (0.15, -1), (0.18, -0.7), (0.38, -0.6), (0.4, 0.1), (0.25, 0.2), (0.25, 1),
        (0.03, 1), (0, 0.35), (-0.03, 1), (-0.25, 1), (-0.25, 0.2), (-0.4, 0.1), (-0.38, -0.6),
        (-0.18, -0.7),
    ),
    _points((0, -1), (0.6, 0.4), (0.15, 0.4), (0.15, 0.9), (-0.15, 0.9), (-0.15, 0.4), (-0.6, 0.4)),  # tree
    _points((-0.9, 0), (-0.3, -0.4), (0.4, -0.25), (0.9, -0.5), (0.75, 0), (0.9, 0.5), (0.4, 0.25), (-0.3, 0.4)),  # fish
    _points((0, -0.9), (0.9, -0.2), (0.65, -0.2), (0.65, 0.8), (-0.65, 0.8), (-0.65, -0.2), (-0.9, -0.2)),  # house
    _points((-0.95, 0.3), (-0.5, 0.15), (-0.4, -0.5), (0.4, -0.5), (0.5, 0.15), (0.95, 0.3), (0.9, 0.5), (-0.9, 0.5)),  # hat
)  # fmt: skip


UNNAMED_SHAPES = (
    *(_shape(None, _polygon(outline), tilt=0.5, stretch=1.4) for outline in _SILHOUETTES),
    _shape(None, _superellipse(1.0, 0.75, 5.0), stretch=1.5),
    _shape(None, _superellipse(1.0, 0.35, 4.0), stretch=1.5),
)


def blob(random: np.random.Generator) -> Shape:
    """A smooth random outline without a name."""
    profile = np.ones(ANGLES)
    for order in range(2, 7):
        amplitude = random.normal() * 0.28 / order**0.8
        profile += amplitude * np.cos(order * _THETA + random.uniform(0, 2 * np.pi))
    return _shape(None, profile.clip(0.25), stretch=1.5)
