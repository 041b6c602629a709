"""The generated clips: repeatable, and every expression means exactly what its mask shows."""

from dataclasses import replace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from refsam.data.generated import generate_batch, generate_clip
from refsam.data.generated.backgrounds import _HELD_OUT, _TRAINED, photographs
from refsam.data.generated.blocks import Block, letters
from refsam.data.generated.clips import COLOUR_CLASSES
from refsam.data.generated.grammar import (
    COLOUR_WORDS,
    KINDS,
    SHAPE_WORDS,
    SIDE_WORDS,
    TEMPLATES,
    Grammar,
    vocabulary,
)
from refsam.data.generated.palette import COLOURS, to_rgb
from refsam.data.generated.render import render
from refsam.data.generated.scene import MAX_OBJECTS, STYLES, Scene, is_held_out, sample_scene
from refsam.data.generated.shapes import NAMED_SHAPES, ROUNDED_SQUARE, UNNAMED_SHAPES, blob
from refsam.training.settings import StageSettings

SIZE = (72, 128)


def scenes(count: int, held_out: bool = False, frames: int = 1, style: str = "full") -> list[Scene]:
    times = np.arange(frames)
    return [
        sample_scene(np.random.default_rng(i), times, SIZE, 0, held_out, STYLES[style])
        for i in range(count)
    ]


def test_same_arguments_give_the_same_batch():
    arguments = {"clips": 2, "frames": 2, "expressions": 3, "size": SIZE}
    first, second = (generate_batch(3, 5, **arguments) for _ in range(2))
    assert torch.equal(first.frames, second.frames) and torch.equal(first.masks, second.masks)
    assert first.expressions == second.expressions
    other = generate_batch(3, 6, **arguments)
    assert not torch.equal(first.frames, other.frames)


@pytest.mark.parametrize("held_out", [False, True])
def test_batch_shapes_and_types(held_out):
    batch = generate_batch(0, 0, clips=2, frames=3, expressions=4, size=SIZE, held_out=held_out)
    assert batch.frames.shape == (2, 3, *SIZE, 3) and batch.frames.dtype == torch.uint8
    assert batch.masks.shape == (2, 4, 3, *SIZE) and batch.masks.dtype == torch.bool
    assert [len(row) for row in batch.expressions] == [4, 4]


@pytest.mark.parametrize(
    ("name", "expected"), [("hue 0", (1, 0, 0)), ("hue 120", (0, 1, 0)), ("hue 240", (0, 0, 1))]
)
def test_hues(name, expected):
    assert np.allclose(to_rgb(float(name.split()[1]), 1.0, 1.0), expected)


def test_attributes_are_those_of_the_object_that_is_seen():
    batch = generate_batch(0, 1, clips=8, frames=2, expressions=6, size=SIZE)
    assert batch.attributes.shape == (8, 2, *SIZE, 2)
    checked = 0
    for clip, expressions in enumerate(batch.expressions):
        for expression, mask in zip(expressions, batch.masks[clip], strict=True):
            words = set(expression.text.split())
            names = [name for name, synonyms in COLOUR_WORDS.items() if words & set(synonyms)]
            if expression.kind != "colour" or not mask.any():
                continue
            checked += 1
            assert {COLOUR_CLASSES[i] for i in batch.attributes[clip][mask][:, 0].unique()} == set(
                names
            )
    assert checked > 2
    assert (batch.attributes[..., 0] == 0).equal(batch.attributes[..., 1] == 0)  # the background
    assert (batch.attributes[..., 0] == 0).equal(batch.owner < 0)


def test_a_style_sets_how_many_objects_there_are_and_how_large():
    arguments = {"clips": 12, "frames": 1, "expressions": 0, "size": SIZE}
    large = generate_batch(0, 1, style="few and large", **arguments).owner
    full = generate_batch(0, 1, **arguments).owner
    assert large.max() <= 2  # three objects at most, no clutter
    assert full.max() > 2
    assert (large >= 0).float().mean() > (full >= 0).float().mean()
    crowd = generate_batch(0, 1, style="crowd", **arguments).owner
    assert (
        crowd.flatten(1).amax(1).min() >= 3 and crowd.max() > 9
    )  # a pair that is held out is left out


def test_no_style_has_more_objects_than_are_counted():
    assert set(get_args(get_type_hints(StageSettings)["style"])) == set(STYLES)
    for style in STYLES.values():
        assert len(style.counts) + len(style.clutter) - 1 <= MAX_OBJECTS
        assert abs(sum(style.counts) - 1) < 1e-9 and abs(sum(style.clutter) - 1) < 1e-9


def test_the_style_blocks_has_scenes_of_one_shape_and_prints_on_most_objects():
    drawn = scenes(60, style="blocks")
    alike = [len({item.shape_index for item in scene.objects}) == 1 for scene in drawn]
    assert 10 < sum(alike) < 55
    coloured = [item for scene in drawn for item in scene.objects if item.colour_index is not None]
    share = sum(item.block is not None for item in coloured) / len(coloured)
    assert 0.7 < share < 0.9
    muted = {"brown", "black", "white", "grey"}
    assert not any(COLOURS[item.colour_index].name in muted for item in coloured)


def one_object(block: Block | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (H, W, 3) in 0..1 and owner (H, W) of a red circle in the middle, 144 x 144."""
    scene = next(scene for scene in scenes(50) if scene.objects[0].shape.hole[2] == 0)
    plain = {"decal": (0.0, 0.0, 0.0), "shading": (0.0,) * 3, "texture": (0.0,) * 3}
    item = replace(
        scene.objects[0], shape=NAMED_SHAPES[0], rgb=np.array([1.0, 0, 0]), area=0.1, stretch=1.0,
        centre=np.full((1, 2), 0.5), rotation=np.zeros(1), mottle=0.0, shadow=0.0, block=block, **plain,
    )  # fmt: skip
    scene = Scene((item,), (144, 144), np.array([[0.0, 0.0, 1.0]]), scene.background)
    frames, owner = render([scene], (), torch.Generator().manual_seed(0))
    return frames[0, 0].float() / 255, owner[0, 0]


def block(letter: int, panel: float = 0.8) -> Block:
    white, red, brown = np.ones(3), np.array([1.0, 0, 0]), np.array([0.4, 0.25, 0.1])
    return Block(panel, white, letter, 0.3, red, (0.5, 0.0), brown)


def test_a_block_is_its_face_and_its_side_belongs_to_no_object():
    (bare, owner), (printed, face) = one_object(None), one_object(block(0))
    assert torch.equal(owner, face)
    changed = (printed - bare).abs().amax(2) > 0.25
    left, right = (owner < 0) & changed, changed.clone()
    left[:, 72:] = False
    right[:, :72] = False
    right &= owner < 0
    assert right.sum() > 300 and left.sum() < 20  # the back lies to the right
    panel = (printed - bare)[face == 0][:, 1:].mean()
    assert panel > 0.2  # white where it was red


def test_letters_differ_and_are_printed_in_the_colour_of_the_block():
    assert len({tuple(letter.flatten().tolist()) for letter in letters()}) == 26
    assert letters().mean(dim=(1, 2)).min() > 0.05 and letters().mean(dim=(1, 2)).max() < 0.6
    first, second = (one_object(block(letter))[0] for letter in (0, 23))
    assert ((first - second).abs().amax(2) > 0.25).sum() > 50
    (bare, owner), (red_on_red, _) = one_object(None), one_object(block(0, panel=0.0))
    assert (red_on_red - bare)[owner == 0].abs().mean() < 0.05  # a red letter and no panel


def test_outlines_have_unit_area():
    random = np.random.default_rng(0)
    y, x = np.mgrid[-2:2:400j, -2:2:400j]
    angle, radius = np.arctan2(y, x), np.hypot(x, y)
    for shape in (*NAMED_SHAPES, ROUNDED_SQUARE, *UNNAMED_SHAPES, blob(random)):
        grid = np.linspace(-np.pi, np.pi, len(shape.profile) + 1)
        inside = radius < np.interp(angle, grid, np.append(shape.profile, shape.profile[0]))
        inside &= np.hypot(x - shape.hole[0], y - shape.hole[1]) >= shape.hole[2]
        area = inside.mean() * 16
        limit = (
            0.25 if shape.name == "crescent" else 0.06
        )  # a crescent's disc is cut out beyond its rim too
        assert abs(area - 1) < limit, (shape.name, area)


def test_sentences_of_colour_and_shape_single_their_target_out():
    found = 0
    for index, scene in enumerate(scenes(60)):
        grammar = Grammar(np.random.default_rng(index), held_out=False)
        for kind in ("colour", "shape", "colour and shape"):
            expression = grammar.expression(scene, kind)
            if expression is None:
                continue
            found += 1
            (target,) = expression.targets
            item = scene.objects[target]
            twins = [
                other
                for other in scene.objects
                if (kind == "shape" or other.colour_index == item.colour_index)
                and (kind == "colour" or other.shape_index == item.shape_index)
            ]
            assert len(twins) == 1
            words = set(expression.text.split())
            if "colour" in kind:
                assert words & set(COLOUR_WORDS[COLOURS[item.colour_index].name])
            if "shape" in kind:
                assert words & set(SHAPE_WORDS[NAMED_SHAPES[item.shape_index].name])
    assert found > 60


@pytest.mark.parametrize(
    ("side", "axis", "sign"), [("left", 0, 1), ("right", 0, -1), ("top", 1, 1), ("bottom", 1, -1)]
)
def test_positions_hold_in_every_frame(side, axis, sign):
    found = 0
    for index, scene in enumerate(scenes(300, frames=6)):
        expression = Grammar(np.random.default_rng(index), held_out=False).expression(
            scene, "position"
        )
        if expression is None or not set(SIDE_WORDS[side]) & set(expression.text.split()):
            continue
        found += 1
        colours = [
            name
            for name, words in COLOUR_WORDS.items()
            if set(words) & set(expression.text.split())
        ]
        shapes = [
            name for name, words in SHAPE_WORDS.items() if set(words) & set(expression.text.split())
        ]
        rivals = [
            i
            for i, item in enumerate(scene.objects)
            if (
                not colours
                or (item.colour_index is not None and COLOURS[item.colour_index].name in colours)
            )
            and (
                not shapes
                or (item.shape_index is not None and NAMED_SHAPES[item.shape_index].name in shapes)
            )
        ]
        along = np.stack([sign * scene.objects[i].centre[:, axis] for i in rivals])
        assert (along.argmin(axis=0) == rivals.index(expression.targets[0])).all(), expression.text
    assert found >= 5


def test_absent_sentences_mean_nothing_that_is_there():
    for index, scene in enumerate(scenes(60)):
        expression = Grammar(np.random.default_rng(index), held_out=False).expression(
            scene, "absent"
        )
        assert expression is not None and expression.targets == ()
        words = set(expression.text.split())
        for item in scene.objects:
            colour = item.colour_index is not None and words & set(
                COLOUR_WORDS[COLOURS[item.colour_index].name]
            )
            shape = item.shape_index is not None and words & set(
                SHAPE_WORDS[NAMED_SHAPES[item.shape_index].name]
            )
            names_shape = any(words & set(v) for v in SHAPE_WORDS.values())
            names_colour = any(words & set(v) for v in COLOUR_WORDS.values())
            assert not ((colour or not names_colour) and (shape or not names_shape)), (
                expression.text
            )


def test_vocabulary_holds_every_word_but_the_made_up_one():
    known = set(vocabulary()) | {"unheard-of"}
    for held_out in (False, True):
        for index, scene in enumerate(scenes(80, held_out)):
            grammar = Grammar(np.random.default_rng(index), held_out)
            for kind in (*KINDS, *([] if held_out else ["plural"])):
                expression = grammar.expression(scene, kind)
                assert expression is None or set(expression.text.split()) <= known, expression


@pytest.mark.parametrize("style", STYLES)
def test_training_never_sees_the_benchmarks_pairs(style):
    for scene in scenes(200, style=style):
        for item in scene.objects:
            if item.shape_index is not None and item.colour_index is not None:
                assert not is_held_out(item.shape_index, item.colour_index)


def test_training_never_sees_the_benchmarks_templates_or_photographs():
    for trained, kept in TEMPLATES.values():
        assert not set(trained) & set(kept)
    assert not set(_TRAINED) & set(_HELD_OUT)
    assert len(photographs(True)) == len(_HELD_OUT)


def test_coloured_photographs_come_in_every_order_of_colours_for_training():
    brightness = [image.double().sum(0) for image in photographs(False)]
    alike = [sum(torch.equal(one, other) for other in brightness) for one in brightness]
    assert set(alike) == {1, 6}
    assert alike.count(1) + alike.count(6) // 6 == len(_TRAINED)


def test_drawn_areas_are_the_objects_areas():
    for scene in scenes(20):
        alone = Scene(scene.objects[-1:], (144, 256), scene.camera, scene.background)
        inside = alone.objects[0].centre[0]
        if (np.abs(inside - 0.5) > 0.25).any() or alone.objects[0].shape.name == "crescent":
            continue
        _, owner = render([alone], (), torch.Generator().manual_seed(0))
        area = float((owner == 0).float().mean()) / alone.camera[0, 2] ** 2
        assert area == pytest.approx(alone.objects[0].area, rel=0.15)


def test_a_clip_has_a_sentence_of_each_kind_about_different_objects():
    clip = generate_clip(seed=1, frames=4, size=SIZE, kinds=("colour", "position", "absent"))
    assert clip.kinds == ["colour", "position", "absent"]
    assert clip.masks[0].any() and clip.masks[1].any() and not clip.masks[2].any()
    assert not (clip.masks[0] & clip.masks[1]).any()
