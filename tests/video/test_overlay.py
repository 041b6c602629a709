"""The overlay tints what is masked, leaves the rest, and tells expressions apart."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as arrays

from refsam.video import captions, draw_overlay
from refsam.video.captions import caption
from refsam.video.overlay import expression_colour


def disk(height: int = 60, width: int = 80) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return (rows - 30) ** 2 + (columns - 40) ** 2 < 15**2


@settings(max_examples=50, deadline=None)
@given(
    image=arrays.arrays(np.uint8, (9, 12, 3)),
    mask=arrays.arrays(bool, (9, 12)),
)
def test_only_masked_pixels_change_towards_the_colour(image: np.ndarray, mask: np.ndarray) -> None:
    before = image.copy()
    drawn = draw_overlay(image, mask[None])
    assert (image == before).all()
    assert (drawn[~mask] == image[~mask]).all()
    colour = np.array(expression_colour(0), int)
    old, new = np.abs(image[mask] - colour), np.abs(drawn[mask] - colour)
    assert (new <= old + 3).all()  # whole-number arithmetic may miss by the lost bits


def test_contour_is_the_full_colour_and_the_inside_shows_the_picture() -> None:
    mask = disk()
    image = np.full((60, 80, 3), 100, np.uint8)
    drawn = draw_overlay(image, mask[None])
    colour = list(expression_colour(0))
    assert drawn[30, 40 - 14].tolist() == colour
    inside = drawn[30, 40].astype(int)
    assert inside.tolist() != colour
    assert np.abs(inside - (100 * 9 + np.array(colour) * 7) / 16).max() <= 3


def test_empty_masks_leave_the_frame_alone() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    assert (draw_overlay(image, np.zeros((2, 20, 30), bool)) == image).all()
    assert (draw_overlay(image, np.zeros((0, 20, 30), bool)) == image).all()


def test_mask_may_touch_every_edge_and_fill_the_frame() -> None:
    drawn = draw_overlay(np.zeros((20, 30, 3), np.uint8), np.ones((1, 20, 30), bool))
    assert (drawn == drawn[0, 0]).all()  # no contour where the object goes on beyond the frame


def test_colours_are_distinct_for_many_expressions() -> None:
    colours = np.array([expression_colour(index) for index in range(16)], int)
    distances = np.abs(colours[:, None] - colours[None]).sum(axis=2)
    assert distances[~np.eye(16, dtype=bool)].min() > 30


def test_captions_stay_within_the_frame_and_are_told_apart() -> None:
    image = np.full((120, 200, 3), 128, np.uint8)
    masks = np.zeros((2, 120, 200), bool)
    texts = ["the red backpack   0.93", "a caption that is far too long for so narrow a frame " * 3]
    drawn = draw_overlay(image, masks, texts)
    changed = (drawn != image).any(axis=2)
    assert changed[:60].any()
    assert not changed[60:].any()
    assert (draw_overlay(image, masks, ["", ""]) != drawn).any()


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2), (12, 12)])
def test_frame_too_small_for_captions(size: tuple[int, int]) -> None:
    image = np.zeros((*size, 3), np.uint8)
    drawn = draw_overlay(image, np.ones((1, *size), bool), ["the red backpack"])
    assert drawn.shape == image.shape


def test_rejects_shapes_that_do_not_belong_together() -> None:
    image = np.zeros((4, 5, 3), np.uint8)
    with pytest.raises(ValueError, match=r"masks: got shape \(1, 5, 4\), want \(E, 4, 5\)"):
        draw_overlay(image, np.zeros((1, 5, 4), bool))
    with pytest.raises(ValueError, match="captions: got 2, want 1"):
        draw_overlay(image, np.zeros((1, 4, 5), bool), ["a", "b"])


# Letters


def label(text: str) -> np.ndarray:
    return draw_overlay(
        np.zeros((120, 400, 3), np.uint8), np.ones((1, 120, 400), bool), [caption(text, 0.5, True)]
    )[:24]


@pytest.fixture
def fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The folders in which fonts are looked for, to be changed."""
    folders: list[str] = []
    monkeypatch.setattr(captions, "_FONT_FOLDERS", folders)
    caches = (captions._installed, captions._font_with, captions._printable, captions._label)
    for cache in caches:
        cache.cache_clear()
    yield folders
    for cache in caches:
        cache.cache_clear()


def test_letters_come_from_a_font_that_has_them(fonts: list[str]) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    fonts.append(f"{matplotlib.get_data_path()}/fonts/ttf")
    assert caption("красная чашка", 0.5, True) == "красная чашка   0.50"
    different = (label("красная") != label("зелёная")).any()
    assert different  # boxes in place of letters are all the same


def test_letters_that_no_font_has_give_way_to_the_number(fonts: list[str]) -> None:
    assert caption("赤いカップ", 0.5, True, 3) == "expression 3   0.50"


def test_line_breaks_and_control_characters_do_not_spill(fonts: list[str]) -> None:
    assert caption("the\nred\t\r\n cup\x07", 0.5, True) == "the red cup   0.50"
    changed = (label("the red\ncup\nand\nmore") != label("")).any(axis=(1, 2))
    assert changed[:20].any()
