"""Auxiliary losses teach an encoder to count objects, as expressions with "largest" and "second from the left" need."""

import torch

from refsam.training.auxiliary_losses import count_others

RED, BLUE, CIRCLE, STAR, NAMELESS = 2, 3, 2, 3, 1
SIDES = ("left", "right", "above", "below", "smaller", "larger")
GROUPS = ("all", "colour", "shape", "both")


def frame(*objects):
    """Owner (1, 100, 100) and attributes (1, 100, 100, 2) of squares (x, y, side, colour, shape)."""
    owner = torch.full((1, 100, 100), -1, dtype=torch.int8)
    attributes = torch.zeros(1, 100, 100, 2, dtype=torch.uint8)
    for index, (x, y, side, colour, shape) in enumerate(objects):
        owner[:, y : y + side, x : x + side] = index
        attributes[:, y : y + side, x : x + side] = torch.tensor([colour, shape], dtype=torch.uint8)
    return owner, attributes


def read(tensor, index):
    """The 24 values of one object by side and group."""
    rows = tensor[0, index + 1].view(len(SIDES), len(GROUPS))
    return {
        (side, group): round(float(rows[i, j]), 3)
        for i, side in enumerate(SIDES)
        for j, group in enumerate(GROUPS)
    }


def test_counts_of_three_in_a_row():
    counts, defined = count_others(
        *frame(
            (5, 40, 4, RED, CIRCLE),
            (40, 40, 10, RED, STAR),
            (70, 70, 25, BLUE, CIRCLE),
            (70, 5, 10, NAMELESS, NAMELESS),
        )
    )
    left, middle, right = (read(counts, index) for index in range(3))
    assert [each["left", "all"] for each in (left, middle, right)] == [0, 1, 2]
    assert [each["right", "all"] for each in (left, middle, right)] == [2, 1, 0]
    assert [each["larger", "all"] for each in (left, middle, right)] == [2, 1, 0]
    assert (right["above", "all"], right["below", "all"]) == (2, 0)
    assert (left["right", "colour"], left["right", "shape"], left["right", "both"]) == (1, 1, 0)
    assert middle["left", "colour"] == 1 and middle["left", "shape"] == 0
    assert all(value == 1 for value in read(defined, 0).values())
    assert not defined[0, 4].any() and not defined[0, 5:].any() and not defined[0, 0].any()


def test_a_shape_without_a_name_is_not_counted_by_shape():
    objects = [(5, 40, 10, RED, NAMELESS), (60, 40, 10, RED, NAMELESS)]
    counts, defined = (read(t, 0) for t in count_others(*frame(*objects)))
    assert defined["right", "shape"] == defined["right", "both"] == 0
    assert defined["right", "colour"] == 1 and counts["right", "colour"] == 1


def test_what_is_level_counts_by_half_and_no_more_than_four_count():
    level = frame((10, 10, 10, RED, STAR), (60, 10, 10, RED, STAR))
    counts = read(count_others(*level)[0], 0)
    assert counts["above", "all"] == counts["below", "all"] == counts["larger", "both"] == 0.5
    row = frame(*((15 * index, 10, 5, RED, STAR) for index in range(6)))
    assert read(count_others(*row)[0], 5)["left", "all"] == 4
