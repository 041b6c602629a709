"""Photographs with class masks: how a folder is read, that composites' truth is exact, and that every expression is true."""

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from refsam.data import DataError
from refsam.data.generated.grammar import COLOUR_WORDS
from refsam.data.generated.palette import COLOURS, sample
from refsam.data.photographs.clips import draw_times, photograph_batch
from refsam.data.photographs.colours import NAMES, colour_of, name_pixels
from refsam.data.photographs.expressions import PhotoExpression, PhotoGrammar
from refsam.data.photographs.folder import PhotoFolder, open_folder
from refsam.data.photographs.layers import Layer, PhotoClip, draw
from refsam.data.photographs.pictures import Picture, Thing, cut_out, read_picture
from refsam.data.photographs.sample import sample_clip
from refsam.data.photographs.scenes import SceneDrawer
from tests.data.photograph_fixtures import (
    BLUE,
    DRESS,
    GREEN,
    ONE_CAT,
    RED,
    WHITE,
    write_lines,
    write_photograph,
    write_photographs,
)

SIZE = (60, 96)
Drawn = list[tuple[PhotoClip, list[PhotoExpression]]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def folder(root: Path) -> PhotoFolder:
    return open_folder(root, "train")


@pytest.fixture(scope="module")
def drawn(folder: PhotoFolder) -> Drawn:
    """Clips of one and three frames with expressions, half of them composites."""
    drawer = SceneDrawer(folder, composites=0.5)
    clips = []
    for seed in range(60):
        random = np.random.default_rng(seed)
        clip = drawer.clip(random, draw_times(random, 1 + 2 * (seed % 2)), SIZE)
        clips.append((clip, PhotoGrammar(random, folder, clip).draw(6)))
    return clips


def picture_of(folder: PhotoFolder, name: str) -> Picture:
    return read_picture(folder, next(p for p in folder.photographs if name in p.image))


# The folder


def test_folder_is_read_by_split_with_everyday_names(root: Path) -> None:
    train, val = open_folder(root, "train"), open_folder(root, "val")
    assert len(train.photographs) == 16 and len(val.photographs) == 1
    assert {k: len(v) for k, v in train.by_class.items()} == {"cat": 6, "dog": 8, "person": 2}
    assert train.names[3] == "airplane" and train.backgrounds[0].mistaken == ("airplane",)
    assert train.garments[14] == "dress" and train.garments[25] == "trousers"
    assert "drone" in train.vocabulary() and "airplanes" in train.vocabulary()


def test_classes_that_a_list_leaves_out_are_counted(tmp_path: Path) -> None:
    import json

    root = write_photographs(tmp_path)
    lines = (root / "manifest.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k != "classes"} for line in lines]
    (root / "manifest.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    counted = open_folder(root, "train").photographs
    for row, photograph in zip(map(json.loads, lines), counted, strict=False):
        assert photograph.classes == pytest.approx(
            {open_folder(root, "train").names[int(n)]: s for n, s in row["classes"].items()}
        )


@pytest.mark.parametrize(
    ("spoil", "wanted"),
    [
        (lambda root: (root / "classes.json").unlink(), "classes.json"),
        (lambda root: (root / "manifest.jsonl").write_text("{]"), "line 1: not JSON"),
        (lambda root: (root / "manifest.jsonl").write_text('{"split": "train"}'), "no label"),
        (
            lambda root: (root / "manifest.jsonl").write_text(
                '{"split": "train", "image": "a", "label": "b", "classes": {"99": 1}}'
            ),
            "class 99",
        ),
        (lambda root: (root / "manifest.jsonl").write_text("[1]"), "want an object"),
    ],
)
def test_broken_folder_is_told_in_one_line(tmp_path: Path, spoil, wanted: str) -> None:
    spoil(write_photographs(tmp_path))
    with pytest.raises(DataError, match=wanted) as caught:
        open_folder(tmp_path, "train")
    assert "\n" not in str(caught.value)


def test_no_folder_and_no_split_are_told(tmp_path: Path, root: Path) -> None:
    with pytest.raises(DataError, match="no folder"):
        open_folder(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match="split 'test'"):
        open_folder(root, "test")


def test_picture_numbers_instances_and_keeps_what_is_unsure(folder: PhotoFolder) -> None:
    cats, cat = picture_of(folder, "cats0"), picture_of(folder, "cat1")
    assert cats.things == (Thing("cat", True),) * 3
    for number, colour in enumerate((RED, BLUE, GREEN), 1):
        assert (cats.image[cats.owner == number] == colour).all()
    assert cat.things == (Thing("cat", True),)
    top, left, bottom, right = ONE_CAT[0][2:]
    assert (cat.owner == 1).sum() == (bottom - top) * (right - left)
    assert (cat.owner[top - 2 : top, left:right] == 255).all()


def test_class_in_two_pieces_is_no_single_object(folder: PhotoFolder) -> None:
    photograph = next(p for p in folder.photographs if "cats0" in p.image)
    from dataclasses import replace

    together = read_picture(folder, replace(photograph, instances=None))
    assert together.things == (Thing("cat", False),)
    assert cut_out(together, 1) is None


def test_piece_that_stands_out_is_an_object_of_its_own(tmp_path: Path) -> None:
    boxes = ((1, WHITE, 10, 10, 60, 50), (1, RED, 20, 70, 36, 86))
    write_lines(tmp_path / "manifest.jsonl", [write_photograph(tmp_path, "two", boxes)])
    (tmp_path / "classes.json").write_text('{"1": "dog"}')
    folder = open_folder(tmp_path, "train")
    picture = read_picture(folder, folder.photographs[0])
    assert picture.things == (Thing("dog", True), Thing("dog", False))
    assert (picture.image[picture.owner == 1] == WHITE).all() and (picture.owner == 2).sum() == 256
    clip = draw([Layer(picture, np.array([[0.5, 0.5, 1.0, 0.0]]), False)], (72, 96))
    for seed in range(12):
        for s in PhotoGrammar(np.random.default_rng(seed), folder, clip).draw(4):
            if s.kind == "class" and not s.mask[clip.owner == 2].any():
                assert s.ignore[clip.owner == 2].all()  # it may belong to the dog


# Draw by class


def test_scenes_are_drawn_by_class_not_by_photograph(tmp_path: Path) -> None:
    folder = open_folder(write_photographs(tmp_path, dogs=40, cats=0), "train")
    random = np.random.default_rng(0)
    names = [SceneDrawer(folder, balance=0.0).draw_class(random) for _ in range(600)]
    shares = {name: names.count(name) / 600 for name in ("dog", "cat", "person")}
    assert all(abs(share - 1 / 3) < 0.07 for share in shares.values()), shares
    names = [SceneDrawer(folder, balance=1.0).draw_class(random) for _ in range(600)]
    assert abs(names.count("dog") / 600 - 40 / 44) < 0.07


def test_source_that_is_no_scene_is_only_cut_out(folder: PhotoFolder) -> None:
    drawer = SceneDrawer(folder, composites=0.0, balance=0.0, only_cut_out=("dogs",))
    for seed in range(20):
        clip = drawer.clip(np.random.default_rng(seed), np.zeros(1), SIZE)
        whole = [t for t in clip.things if t.name == "dog"]
        assert (
            not whole or not clip.complete
        )  # a dog is pasted onto something that is no list of everything


# Composites


def test_composite_shows_at_each_pixel_the_thing_that_its_truth_names() -> None:
    """Flat colours without gain, shadow and blur: every pixel that is not at an edge has exactly its thing's colour."""
    random = np.random.default_rng(0)
    colours = [(10, 20, 30), (200, 10, 10), (10, 200, 10), (10, 10, 200), (200, 200, 10)]
    layers = []
    for number, colour in enumerate(colours):
        image = np.full((40, 30, 3), colour, np.uint8)
        owner = np.zeros((40, 30), np.uint8)
        if number:
            owner[4:36, 4:26] = 1
        path = np.stack(
            [
                random.uniform(0, 1, 5),
                random.uniform(0, 1, 5),
                random.uniform(0.2, 0.7, 5) if number else np.full(5, 6.0),
                random.uniform(-40, 40, 5) * bool(number),
            ],
            axis=1,
        )
        if not number:
            path[:, :2] = 0.5
        things = (Thing("cat", True),) if number else ()
        layers.append(
            Layer(Picture(image, owner, things), path, bool(number), number or 1, softness=0)
        )
    clip = draw(layers, (160, 256))
    assert set(np.unique(clip.owner)) <= {0, 1, 2, 3, 4, 255}
    table = np.array(colours)
    nearest = np.abs(clip.frames[..., None, :].astype(int) - table).sum(-1).argmin(-1)
    for number, colour in enumerate(colours):
        shown = clip.owner == number
        assert shown.sum() > 1000 and (nearest[shown] == number).mean() > 0.97
        inner = ndimage.binary_erosion(shown, np.ones((1, 9, 9)))
        assert (clip.frames[inner] == colour).all()
    assert (clip.owner == 255).mean() < 0.01


def test_upper_layers_hide_lower_ones_and_things_leave_the_frame() -> None:
    def square(colour: int, first: int, x: tuple[float, ...]) -> Layer:
        image = np.full((10, 10, 3), colour, np.uint8)
        path = np.array([[place, 0.5, 0.5, 0.0] for place in x])
        picture = Picture(image, np.ones((10, 10), np.uint8), (Thing("cat", True),))
        return Layer(picture, path, True, first, softness=0)

    clip = draw([square(50, 1, (0.5, 0.5, 0.5)), square(200, 2, (0.5, -1.0, 0.5))], SIZE)
    assert [(frame == 1).sum() for frame in clip.owner] == [0, 900, 0]
    assert [(frame == 2).sum() for frame in clip.owner] == [900, 0, 900]


def test_cut_out_is_alone_and_refused_where_it_is_not_whole(folder: PhotoFolder) -> None:
    cats = picture_of(folder, "cats0")
    alone = cut_out(cats, 2)
    assert alone is not None and set(np.unique(alone.owner)) == {0, 1}
    assert (alone.image[alone.owner == 1] == BLUE).all()
    middle = cats.crop(0, 72, 45, 60)  # cuts the second cat on both sides
    assert cut_out(middle, 2) is None


def test_covered_thing_is_seen_hidden_and_seen_again(folder: PhotoFolder) -> None:
    drawer = SceneDrawer(folder, composites=1.0)
    times = np.arange(24.0)
    found = 0
    for seed in range(12):
        random = np.random.default_rng(seed)
        clip = drawer.covered(random, times, SIZE)
        target = (clip.owner == 1).sum((1, 2))
        hidden = target == 0
        assert target[0] > 0 and target[-1] > 0, seed
        assert hidden.sum() == 10 and np.ptp(np.flatnonzero(hidden)) == 9, seed
        found += 1
    assert found == 12


# Expressions


def test_batch_is_drawn_from_seed_and_index_alone(folder: PhotoFolder) -> None:
    arguments = {"clips": 3, "frames": 2, "expressions": 4, "size": SIZE}
    first, second = (photograph_batch(SceneDrawer(folder), 3, 5, **arguments) for _ in range(2))
    other = photograph_batch(SceneDrawer(folder), 3, 6, **arguments)
    assert first.texts == second.texts and first.frames.equal(second.frames)
    assert first.masks.equal(second.masks) and first.ignore.equal(second.ignore)
    assert not first.frames.equal(other.frames)
    assert first.frames.shape == (3, 2, *SIZE, 3) and first.masks.shape == (3, 4, 2, *SIZE)
    assert not (first.masks & first.ignore).any()


def test_a_third_of_the_sentences_is_about_nothing(drawn) -> None:
    kinds = [expression.kind for _, expressions in drawn for expression in expressions]
    assert 0.25 < kinds.count("absent") / len(kinds) < 0.45
    assert {"class", "group", "colour", "position", "size", "order", "garment", "wearer"} <= set(
        kinds
    )


def test_absent_sentences_are_true(folder: PhotoFolder, drawn) -> None:
    """No noun of the expression means a class in the clip, or its colour is nobody's who has that class."""
    checked = 0
    for clip, expressions in drawn:
        present = {thing.name for thing in clip.things}
        for expression in expressions:
            if expression.kind != "absent":
                continue
            assert not expression.mask.any()
            meant = set(meaning(folder, expression.text))
            checked += 1
            if meant & present:
                colours = [
                    c
                    for c, words in COLOUR_WORDS.items()
                    if set(words) & set(expression.text.split())
                ]
                shown = np.isin(
                    clip.owner, [n for n, t in enumerate(clip.things, 1) if t.name in meant]
                )
                names = name_pixels(clip.frames[shown])
                assert colours and (names == NAMES.index(colours[0])).mean() < 0.05, expression.text
    assert checked > 60


def test_class_sentences_mean_all_of_their_class_or_the_one_that_stands_out(
    folder: PhotoFolder, drawn: Drawn
) -> None:
    singular = plural = 0
    for clip, expressions in drawn:
        for expression in expressions:
            assert (expression.ignore >= (clip.owner == 255)).all()
            if expression.kind not in ("class", "group"):
                continue
            meant = meaning(folder, expression.text)
            numbers = [n for n, t in enumerate(clip.things, 1) if t.name in meant]
            targets = [n for n in numbers if (expression.mask & (clip.owner == n)).any()]
            assert (expression.mask == np.isin(clip.owner, targets)).all(), expression.text
            areas = {n: int((clip.owner == n).sum()) for n in numbers}
            if targets != [n for n in numbers if areas[n]]:
                (target,) = targets
                assert areas[target] > 1.6 * max(a for n, a in areas.items() if n != target)
                singular += 1
            else:
                plural += len(targets) > 1
    assert singular > 3 and plural > 3


def test_colour_sentences_mean_pixels_of_that_colour(drawn) -> None:
    checked = 0
    for clip, expressions in drawn:
        for expression in expressions:
            if expression.kind == "colour":
                colour = next(
                    c
                    for c, words in COLOUR_WORDS.items()
                    if set(words) & set(expression.text.split())
                )
                names = name_pixels(clip.frames[expression.mask])
                assert (names == NAMES.index(colour)).mean() > 0.5, expression.text
                checked += 1
    assert checked > 10


def test_place_size_and_order_single_out_the_right_thing(drawn) -> None:
    checked = 0
    for clip, expressions in drawn:
        for expression in expressions:
            if expression.kind not in ("position", "size", "order"):
                continue
            target = np.unique(clip.owner[expression.mask])
            assert len(target) == 1, expression.text
            name = clip.things[target[0] - 1].name
            rivals = [n for n, t in enumerate(clip.things, 1) if t.name == name]
            assert the_one(clip, rivals, expression.text) == target[0], expression.text
            checked += 1
    assert checked > 20


def the_one(clip: PhotoClip, rivals: list[int], text: str) -> int:
    """Which of the things an expression of place, size or order means, by its words and the last frame's pixels."""
    where = [np.argwhere(clip.owner[-1] == n) for n in rivals]
    words = set(text.split())
    if words & {"small", "smaller", "smallest", "little", "tiny"}:
        return rivals[int(np.argmin([len(w) for w in where]))]
    if words & {"big", "bigger", "biggest", "large", "larger", "largest"}:
        return rivals[int(np.argmax([len(w) for w in where]))]
    sides = {"left": (1, 1), "right": (1, -1), "top": (0, 1), "bottom": (0, -1)}
    sides |= {"upper": (0, 1), "highest": (0, 1), "lower": (0, -1), "lowest": (0, -1)}
    axis, sign = next(v for k, v in sides.items() if any(word.startswith(k) for word in words))
    ranked = sorted(rivals, key=lambda n: sign * where[rivals.index(n)][:, axis].mean())
    ordinals = ("first", "second", "third", "fourth")
    return ranked[next((ordinals.index(w) for w in text.split() if w in ordinals), 0)]


def test_garments_are_the_pixels_worn_and_wearers_the_person(folder: PhotoFolder) -> None:
    picture = picture_of(folder, "person0")
    path = np.array([[0.5, 0.5, 1.0, 0.0]])
    clip = draw([Layer(picture, path, False)], (72, 96))
    texts = {}
    for seed in range(40):
        for expression in PhotoGrammar(np.random.default_rng(seed), folder, clip).draw(6):
            texts.setdefault(expression.kind, []).append(expression)
    top, left, bottom, right = DRESS
    dress = np.zeros((72, 96), bool)
    dress[top:bottom, left:right] = True
    assert all((s.mask[0] == dress).all() for s in texts["garment"])
    assert any("red dress" in s.text for s in texts["garment"])
    assert all((s.mask[0] == (picture.owner == 1)).all() for s in texts["wearer"])
    assert any("red dress" in s.text for s in texts["wearer"])


def meaning(folder: PhotoFolder, text: str) -> tuple[str, ...]:
    """The classes of the longest run of words at the end or within an expression that the list knows."""
    words = text.split()
    for length in (3, 2, 1):
        for begin in range(len(words) - length + 1):
            found = folder.words.meaning(" ".join(words[begin : begin + length]))
            if found:
                return found
    return ()


# Colours


@pytest.mark.parametrize("colour", COLOURS, ids=lambda c: c.name)
def test_measured_names_are_those_that_colours_are_drawn_by(colour) -> None:
    random = np.random.default_rng(0)
    rgb = np.array([sample(colour, random) for _ in range(400)])
    names = name_pixels((rgb * 255).round().astype(np.uint8))
    assert (names == NAMES.index(colour.name)).mean() > 0.85


def test_mixture_has_no_colour() -> None:
    half = np.concatenate([np.tile(RED, (100, 1)), np.tile(BLUE, (100, 1))]).astype(np.uint8)
    assert colour_of(half) is None
    assert colour_of(half[:120]) == "red"


# The sample


def test_sample_goes_from_the_cat_past_the_cup_to_the_astronaut() -> None:
    skimage = pytest.importorskip("skimage.data")
    clip = sample_clip(frames=9, size=(90, 160))
    assert clip.shape == (9, 90, 160, 3) and clip.dtype == np.uint8
    assert np.array_equal(clip, sample_clip(frames=9, size=(90, 160)))
    assert (np.abs(np.diff(clip.astype(int), axis=0)).mean((1, 2, 3)) > 2).all()  # it moves
    for frame, image in ((clip[0], skimage.chelsea()), (clip[-1], skimage.astronaut())):
        # The photograph's middle is seen somewhere in the frame.
        mean = image[::8, ::8].mean((0, 1))
        columns = [frame[:, x : x + 60].mean((0, 1)) for x in range(0, 101, 10)]
        assert min(np.abs(column - mean).max() for column in columns) < 25
    assert not (clip == 127).all(axis=(1, 3)).any()  # no column of a frame is left empty
