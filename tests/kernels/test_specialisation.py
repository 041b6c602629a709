"""A new number of words, expressions or rows must not compile a kernel anew in the middle of a video."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from refsam_kernels import (
    AttentionWeights,
    dense_attention,
    mask_loss,
    mask_postprocess,
    token_image_attention,
)
from refsam_kernels.core import dispatch
from refsam_kernels.core.triton_aot import Launch, argument_type

pytest.importorskip("triton")

Seen = dict[str, set[Any]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """The specialisations of each kernel by the launches of a test, none of which runs."""
    found: Seen = defaultdict(set)

    def note(launch: Launch) -> None:
        case = launch.compile_case("")
        name = launch.kernel.fn.__name__
        found[name].add((tuple(case.signature.items()), tuple(case.constants.items())))

    monkeypatch.setattr(Launch, "run", note)
    monkeypatch.setattr(dispatch.Backend, "supports", lambda self, device_type: True)
    return found


COUNTS = [(5, 3), (12, 2), (16, 16), (1, 1), (13, 8)]  # words, expressions


@pytest.mark.parametrize("to_image", [True, False])
def test_words_and_expressions_of_token_image_attention(to_image: bool, seen: Seen) -> None:
    for words, expressions in COUNTS:
        few, many = torch.randn(expressions, words, 32), torch.randn(expressions, 80, 32)
        sides = [(few, torch.randn_like(few)), (many, torch.randn(1, 80, 32))]
        (queries, query_pe), (keys, key_pe) = sides if to_image else sides[::-1]
        shapes = ((16, 32), (16,)) * 3 + ((32, 16), (32,))
        weights = AttentionWeights(*(torch.randn(shape) for shape in shapes))
        token_image_attention(
            queries, keys, query_pe, key_pe, weights, torch.ones(32), torch.ones(32),
            num_heads=2, backend="triton",
        )  # fmt: skip
    assert {name: len(found) for name, found in seen.items()} == dict.fromkeys(seen, 1)


def test_words_and_expressions_of_dense_attention(seen: Seen) -> None:
    for words, expressions in COUNTS:
        index = torch.zeros(expressions, dtype=torch.int64)
        dense_attention(
            torch.randn(4, 1, 64, 32), torch.randn(expressions, words, 32), index + 1, index,
            torch.randn(32, 64), torch.randn(32), torch.tensor(1.0), torch.ones(4),
            backend="triton",
        )  # fmt: skip
    assert {name: len(found) for name, found in seen.items()} == dict.fromkeys(seen, 1)


def test_heights_of_masks(seen: Seen) -> None:
    for height in (33, 48, 1, 100):
        mask_postprocess(
            torch.randn(2, 16, 16), image_size=64, input_size=(40, 64), output_size=(height, 64),
            backend="triton",
        )  # fmt: skip
    kinds = {tuple(sorted(signature)) for found in seen.values() for signature, _ in found}
    heights = {dict(kind)["height"] for kind in kinds}
    assert heights == {"i32"}


def test_masks_and_sizes_of_mask_loss(seen: Seen) -> None:
    """Clips of a batch differ in size, and steps in how many expressions they have."""
    for count, size in ((1, (65, 130)), (2, (80, 128)), (16, (96, 144)), (7, (70, 99))):
        logits = torch.randn(count, 16, 16, requires_grad=True)
        targets = torch.zeros(count, *size, dtype=torch.bool)
        losses = mask_loss(logits, targets, image_size=64, input_size=(40, 64), backend="triton")
        sum(loss.sum() for loss in losses).backward()  # type: ignore[union-attr]
    assert {name: len(found) for name, found in seen.items()} == dict.fromkeys(seen, 1)
    assert len(seen) == 3


def test_integers_are_specialised_unless_they_must_not() -> None:
    assert [argument_type(value) for value in (1, 16, 5)] == [None, "i32:16", "i32"]
    assert [argument_type(value, specialise=False) for value in (1, 16, 5)] == ["i32"] * 3
    assert argument_type(Tensor(1)) == "*fp32"
