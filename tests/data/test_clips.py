"""Training clips: sampling, cutting, moving, mirroring and colour keep picture, masks and expressions together."""

import colorsys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from refsam.data import DataError, open_dataset
from refsam.data.augmentation import (
    Augmentation,
    Geometry,
    Motion,
    draw_colour,
    draw_geometry,
    draw_motion,
)
from refsam.data.clips import ClipBatch, ClipMixture, ClipSampler, sample_frames
from refsam.data.colour import adjust_colour
from refsam.data.dataset import UnreadableError, read_image
from refsam.data.mirroring import mirrored
from tests.data import fixtures

# No deadline: the machine may be busy.
BRIEF = settings(max_examples=50, deadline=None)
# Sizes that suit frames of 48 x 64.
SMALL = Augmentation(crop_from=(44, 52), crop_sides=(36, 60), short_sides=(40, 56), long_side=80)
STILL = Augmentation(
    flip=0, crop=0, short_sides=(48,), long_side=64, colour=0, rotation=0, shift=0, zoom=0
)


@BRIEF
@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 40), st.data())
def test_frames_are_of_the_video_in_order_around_the_anchor(seed, wanted, length, data) -> None:
    anchor = data.draw(st.integers(0, length - 1))
    positions = sample_frames(np.random.default_rng(seed), anchor, wanted, length)
    assert len(positions) == wanted and positions == sorted(positions)
    assert anchor in positions and positions[0] >= 0 and positions[-1] < length
    if wanted <= 3:
        assert max(abs(position - anchor) for position in positions) <= 3
    if wanted > 3 and length >= wanted + 7:
        assert len(set(positions)) >= wanted - 2  # only clamping at an end repeats a frame


def test_two_frames_may_follow_or_precede_the_anchor() -> None:
    draws = [sample_frames(np.random.default_rng(seed), 10, 2, 20) for seed in range(20)]
    assert {draw.index(10) for draw in draws} == {0, 1}


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("the left dog", "the right dog"),
        ("Left of the RIGHT man", "Right of the LEFT man"),
        ("leftmost, right-most and rightmost", "rightmost, left-most and leftmost"),
        ("on the left-hand side, lefthand", "on the right-hand side, righthand"),
        ("moving rightward, then leftwards", "moving leftward, then rightwards"),
        ("the bright upright copyright sign", "the bright upright copyright sign"),
        ("a dog leaving right now", "a dog leaving right now"),
        ("the bag left behind on the left", "the bag left behind on the right"),
        ("the last slice that is left", "the last slice that is left"),
        ("he is left of the tree", "he is right of the tree"),
        ("man on the right next to the car", "man on the left next to the car"),
        ("man @ left", "man @ right"),
        ("the man right next to the car", None),
        ("turning clockwise", None),
        ("2nd from lft", None),
        ("left now", None),  # would become "right now"
        ("no side", "no side"),
    ],
)
def test_mirrored_sentences(text: str, want: str | None) -> None:
    assert mirrored(text) == want


@BRIEF
@given(
    st.lists(st.sampled_from("Left right leftmost now behind the is of next bright RIGHT".split()))
)
def test_mirroring_twice_changes_nothing(words: list[str]) -> None:
    text = " ".join(words)
    other = mirrored(text)
    assert other is None or mirrored(other) == text


SIZES = st.tuples(st.integers(90, 700), st.integers(90, 700))


@BRIEF
@given(st.integers(0, 2**32), SIZES)
def test_geometry_stays_inside_and_keeps_the_aspect(seed: int, size: tuple[int, int]) -> None:
    random = np.random.default_rng(seed)
    geometry = draw_geometry(random, Augmentation(), size, may_flip=False)
    left, top, right, bottom = geometry.box
    assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1 and not geometry.flipped
    height, width = geometry.size
    assert min(height, width) <= 512 and max(height, width) <= 640
    ratio = (height / width) / ((bottom - top) * size[0] / ((right - left) * size[1]))
    assert ratio == pytest.approx(1, abs=1.5 / min(height, width))
    assert all(a <= b for a, b in zip(geometry.decoded_size(size), size, strict=True))


@BRIEF
@given(st.integers(0, 2**32), st.booleans())
def test_masks_move_with_their_picture(seed: int, moving: bool) -> None:
    """Red where the mask is: after cut, scale, flip and motion the two still agree but for the border."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:120, :160]
    mask = (y - 70) ** 2 + (x - 60) ** 2 < 40**2
    pixels = np.where(mask[..., None], (255, 0, 0), (0, 0, 255)).astype(np.uint8)
    image, truth = Image.fromarray(pixels), Image.fromarray(mask.view(np.uint8))
    if moving:
        motion = draw_motion(random, Augmentation(), frames=3)
        image, truth = motion.moved(image, 2), motion.moved(truth, 2)
    geometry = draw_geometry(random, Augmentation(), (120, 160), may_flip=True)
    colours, cut = geometry.of_image(image), geometry.of_mask(truth)
    assert colours.shape[:2] == cut.shape == geometry.size
    red = colours[..., 0].astype(int) - colours[..., 2]
    assert np.mean((red > 60) != cut) < 0.03  # the grey that a motion uncovers is a little red


def test_a_flip_mirrors_the_result_exactly() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    plain = Geometry((0.1, 0.2, 0.9, 0.8), (30, 50), False).of_image(image)
    flipped = Geometry((0.1, 0.2, 0.9, 0.8), (30, 50), True).of_image(image)
    assert np.array_equal(flipped, plain[:, ::-1])


def test_a_large_jpeg_is_decoded_smaller_to_the_same_cut(tmp_path: Path) -> None:
    """An image decoded at a reduced size has the same content at the same positions."""
    y, x = np.mgrid[:480, :640]
    pixels = np.stack([(x * 255 // 640), (y * 255 // 480), np.full_like(x, 90)], -1)
    path = tmp_path / "large.jpg"
    fixtures.write_image(path, pixels.astype(np.uint8))
    geometry = Geometry((0.25, 0.1, 0.95, 0.8), (84, 112), False)
    whole, size = read_image(path)
    small, same_size = read_image(path, geometry.decoded_size)
    assert size == same_size == (480, 640) and small.size == (160, 120)
    difference = geometry.of_image(small).astype(int) - geometry.of_image(whole)
    assert np.abs(difference).max() <= 4


def test_a_still_image_moves_evenly_and_none_at_no_motion() -> None:
    image = Image.fromarray(fixtures.picture(fixtures.numbers_at(0, 2)))
    rest = Motion(np.array([[0.0, 1, 0, 0]] * 2), 3)
    assert np.array_equal(np.asarray(rest.moved(image, 1)), np.asarray(image))
    shift = Motion(
        np.array([[0.0, 1, 0, 0], [0, 1, 0.25, 0]]), 3
    )  # a quarter of 64 pixels to the right
    moved = np.asarray(shift.moved(image, 1))
    assert np.array_equal(moved[:, 8:], np.asarray(image)[:, :-8])
    assert (moved[:, :8] == (124, 116, 104)).all()


def test_colour_without_change_is_exact() -> None:
    frames = torch.randint(0, 256, (2, 3, 8, 9, 3), dtype=torch.uint8)
    factors = torch.tensor([[1.0, 1, 1, 0]] * 2)
    assert torch.equal(adjust_colour(frames, factors, [(8, 9)] * 2), frames)


def test_colour_follows_its_formulas() -> None:
    frames = torch.randint(100, 150, (1, 2, 8, 9, 3), dtype=torch.uint8)
    luma = torch.tensor([0.299, 0.587, 0.114])

    def changed(*factors: float) -> torch.Tensor:
        return adjust_colour(frames, torch.tensor([factors]), [(8, 9)]).float()

    pixels = frames.float()
    grey = (pixels @ luma)[..., None]
    assert (changed(0.7, 1, 1, 0) - 0.7 * pixels).abs().max() <= 0.51
    assert (changed(1, 0.5, 1, 0) - (pixels + grey.mean()) / 2).abs().max() <= 0.51
    assert (changed(1, 1, 0, 0) - grey).abs().max() <= 0.51
    half_turn = 2 * grey - changed(1, 1, 1, 0.5)  # hues opposite, luma kept
    assert (half_turn.clamp(0, 255) - pixels).abs().max() <= 0.51
    small = colorsys.rgb_to_hsv(*changed(1, 1, 1, 0.05)[0, 0, 0, 0].tolist())
    assert abs(small[0] - colorsys.rgb_to_hsv(*pixels[0, 0, 0, 0].tolist())[0]) < 0.12


def test_colour_of_a_clip_is_the_same_in_any_batch() -> None:
    """Padding counts for no mean, and every frame of a clip is changed alike."""
    frame = torch.randint(0, 256, (1, 1, 6, 7, 3), dtype=torch.uint8)
    factors = torch.tensor([[1.2, 0.6, 1.4, 0.07]])
    alone = adjust_colour(frame.expand(1, 3, 6, 7, 3), factors, [(6, 7)])
    assert torch.equal(alone[:, 0], alone[:, 2])
    padded = torch.zeros(2, 3, 10, 12, 3, dtype=torch.uint8)
    padded[1, :, :6, :7] = frame[0]
    both = adjust_colour(padded, torch.cat([factors * 0.5, factors]), [(10, 12), (6, 7)])
    assert torch.equal(both[1, :, :6, :7], alone[0])


def test_colour_is_drawn_with_its_probability() -> None:
    random = np.random.default_rng(0)
    drawn = np.stack([draw_colour(random, Augmentation(colour=0.7)) for _ in range(2000)])
    changed = (drawn != np.array([1, 1, 1, 0], np.float32)).mean(axis=0)
    assert changed == pytest.approx([0.7] * 4, abs=0.04)
    assert (drawn[:, :3] >= 0.5).all() and (drawn[:, :3] <= 1.5).all()
    assert (np.abs(drawn[:, 3]) <= 0.1).all()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixtures.write_ref_youtube_vos(tmp_path_factory.mktemp("ytvos"), frames=8)


def test_a_clip_without_augmentation_is_the_dataset(videos: Path) -> None:
    dataset = open_dataset("ref-youtube-vos", videos, "train")
    sampler = ClipSampler(dataset, frames=3, augmentation=STILL)
    # 4 + 2 expressions, 8 frames in stretches of three.
    assert len(sampler) == 6 * 3
    clip = sampler.clip(seed=0, epoch=0, index=0)
    name, expression, frames = (
        clip.name.split(", ")[0].split()[-1],
        "0",
        clip.name.split()[-1].split(","),
    )
    assert clip.texts == (fixtures.EXPRESSIONS[1],) and "expressions 0," in clip.name
    (first, *_) = [e for e in dataset.expressions(name) if e.expression_id == expression]
    for time, frame in enumerate(frames):
        assert np.array_equal(clip.frames[time], dataset.frame(name, frame))
        assert np.array_equal(clip.masks[0, time], dataset.mask(first, frame))


def test_clips_depend_on_seed_epoch_and_index_alone(videos: Path) -> None:
    dataset = open_dataset("ref-youtube-vos", videos, "train")
    first, second = (ClipSampler(dataset, 3, 2, SMALL) for _ in range(2))
    for index in range(3):
        second.clip(5, 1, index)  # other draws in between change nothing
        a, b = first.clip(5, 0, index), second.clip(5, 0, index)
        assert a.name == b.name and a.texts == b.texts
        assert np.array_equal(a.frames, b.frames) and np.array_equal(a.masks, b.masks)
    names = {first.clip(5, epoch, 0).name for epoch in range(6)}
    assert len(names) > 1


def test_every_clip_shows_its_object_and_tells_the_side_as_it_is(videos: Path) -> None:
    """The red box is "on the left"; in a flipped clip it is not, and the expression says so."""
    dataset = open_dataset("ref-youtube-vos", videos, "train")
    sampler = ClipSampler(dataset, 3, 1, SMALL)
    sides = set()
    for index in range(len(sampler)):
        clip = sampler.clip(0, 0, index)
        assert clip.masks[0].any() and clip.frames.shape[:3] == clip.masks.shape[1:]
        seen = clip.frames[clip.masks[0]].astype(int)
        if "red" in clip.texts[0]:
            sides.add(clip.texts[0].split()[-1])
            assert np.mean(seen[:, 0] > seen[:, 2]) > 0.9
        else:
            assert np.mean(seen[:, 2] > seen[:, 0]) > 0.9
    assert sides == {"left", "right"}


def test_several_expressions_share_a_clip(videos: Path) -> None:
    sampler = ClipSampler(open_dataset("ref-youtube-vos", videos, "train"), 2, 5, STILL)
    clip = sampler.clip(0, 0, 0)
    assert len(clip.texts) == 5 == len(clip.masks)
    assert sorted(clip.name.split("expressions ")[1].split(", frames")[0].split(","))[:2] == [
        "0",
        "0",
    ]


def test_images_become_clips(tmp_path: Path) -> None:
    dataset = open_dataset("refcoco", fixtures.write_refcoco(tmp_path), "train")
    clip = ClipSampler(dataset, frames=3, augmentation=SMALL).clip(0, 0, 0)
    assert clip.frames.shape[0] == 3 and clip.masks.shape[:2] == (1, 3)
    assert not np.array_equal(clip.frames[0], clip.frames[2])
    single = ClipSampler(dataset, frames=1, augmentation=STILL).clip(0, 0, 0)
    assert np.array_equal(
        single.frames[0], dataset.frame(dataset.videos[0].name, dataset.videos[0].name)
    )


def test_sentences_about_nothing_are_kept(tmp_path: Path) -> None:
    dataset = open_dataset("mevis", fixtures.write_mevis(tmp_path), "train")
    clips = [ClipSampler(dataset, 4, 1, STILL).clip(0, 0, index) for index in range(3)]
    assert [clip.masks.any() for clip in clips] == [True, True, False]
    assert clips[2].texts == ("a dog that runs",)


def test_an_object_that_is_nowhere_gives_way_to_another_sample(tmp_path: Path) -> None:
    root = fixtures.write_ref_youtube_vos(tmp_path)
    path = root / "meta_expressions/train/meta_expressions.json"
    path.write_text(path.read_text().replace('"obj_id": "2"', '"obj_id": "9"'))
    sampler = ClipSampler(open_dataset("ref-youtube-vos", root, "train"), 4, 1, STILL)
    absent = [i for i, (_, e, _) in enumerate(sampler.samples) if e.object_ids == (9,)]
    assert all(sampler.clip(0, 0, index).masks.any() for index in absent)
    path.write_text(path.read_text().replace('"obj_id": "1"', '"obj_id": "9"'))
    nothing = ClipSampler(open_dataset("ref-youtube-vos", root, "train"), 4, 1, STILL)
    with pytest.raises(DataError, match="refsam data check"):
        nothing.clip(0, 0, 0)


def test_unreadable_frames_stop_or_are_skipped(tmp_path: Path) -> None:
    root = fixtures.write_ref_youtube_vos(tmp_path)
    for frame in (root / "train/JPEGImages/0062f687f1").iterdir():
        frame.write_bytes(frame.read_bytes()[:500])
    dataset = open_dataset("ref-youtube-vos", root, "train")
    with pytest.raises(UnreadableError, match="0062f687f1"):
        ClipSampler(dataset, 4, 1, STILL, unreadable="stop").clip(0, 0, 0)
    clip = ClipSampler(dataset, 4, 1, STILL, unreadable="skip").clip(0, 0, 0)
    assert "00a23ccf53" in clip.name and clip.skipped
    assert all("0062f687f1" in message for message in clip.skipped)
    assert ClipBatch.of([clip, clip]).skipped == clip.skipped * 2


def test_a_split_without_truth_is_refused(videos: Path) -> None:
    with pytest.raises(DataError, match="no frame has a mask"):
        ClipSampler(open_dataset("ref-youtube-vos", videos, "valid"), 3)


def test_a_batch_pads_clips_of_other_sizes(videos: Path) -> None:
    sampler = ClipSampler(open_dataset("ref-youtube-vos", videos, "train"), 2, 1, SMALL)
    clips = [sampler.clip(0, 0, index) for index in range(4)]
    batch = ClipBatch.of(clips)
    assert len(set(batch.sizes)) > 1
    assert batch.colour is not None and batch.colour.shape == (4, 4)
    for index, ((height, width), clip) in enumerate(zip(batch.sizes, clips, strict=True)):
        assert torch.equal(batch.frames[index, :, :height, :width], torch.from_numpy(clip.frames))
        assert torch.equal(batch.masks[index, :, :, :height, :width], torch.from_numpy(clip.masks))
        assert (
            not batch.frames[index, :, height:].any() and not batch.masks[index, ..., width:].any()
        )


def test_a_mixture_goes_through_its_datasets_by_weight(videos: Path, tmp_path: Path) -> None:
    first = ClipSampler(open_dataset("ref-youtube-vos", videos, "train"), 3, 1, STILL)
    second = ClipSampler(
        open_dataset("folder", fixtures.write_folder(tmp_path), "train"), 3, 1, STILL
    )
    mixture = ClipMixture([first, second], [1.0, 0.5], seed=3)
    assert len(mixture) == len(first) + round(len(second) / 2)
    order = mixture._draw_order(0)
    assert sorted(order[order[:, 0] == 0, 1]) == list(range(len(first)))
    assert not np.array_equal(order, mixture._draw_order(1))
    again = ClipMixture([first, second], [1.0, 0.5], seed=3)
    position = len(mixture) + 2
    assert again.clip(position).name == mixture.clip(position).name
