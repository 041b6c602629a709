"""The compiled backends of mask_postprocess against the reference, and the checks that stand in C++."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from refsam_kernels import libraries, mask_postprocess
from refsam_kernels.mask_postprocess import reference

# A mask may differ from the two F.interpolate calls where the resized logit is this close to the threshold, relative
# to the largest logit: weights are products of two float32 weights here and two roundings there.
TOLERANCE = 1e-5


def built(name: str) -> Any:
    """The library's operators; the test is skipped with the reason if it was not built."""
    try:
        return libraries.load(name)
    except ImportError as reason:
        pytest.skip(str(reason))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> str:
    """A compiled backend; its name is its device's too."""
    built(request.param)
    return request.param


def count_real_differences(
    masks: Tensor,
    logits: Tensor,
    sizes: tuple[int, tuple[int, int], tuple[int, int]],
    threshold: float,
) -> int:
    """Pixels that differ from the reference although their logit is not at the threshold."""
    exact = reference.resize_twice(logits, *sizes) - threshold
    scale = float(logits.abs().max())
    decided = exact.abs() >= TOLERANCE * scale
    return int(((masks != (exact > 0)) & decided).sum())


SIZES = {
    "480p": ((3, 256, 256), 1024, (576, 1024), (480, 854)),
    "portrait": ((2, 256, 256), 1024, (1024, 683), (1365, 911)),
    "odd": ((2, 64, 63), 255, (190, 255), (63, 127)),
    "one-pixel": ((1, 1, 1), 1, (1, 1), (1, 1)),
    "one-pixel-in": ((1, 1, 1), 7, (3, 7), (5, 7)),
    "one-pixel-out": ((1, 13, 16), 37, (1, 37), (1, 1)),
    "shrinking": ((2, 300, 50), 50, (49, 50), (9, 1000)),
    "same-size": ((2, 16, 16), 16, (16, 16), (16, 16)),
}


@pytest.mark.parametrize(("shape", "image", "cropped", "output"), SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_matches_reference(
    backend: str,
    shape: tuple[int, ...],
    image: int,
    cropped: tuple[int, int],
    output: tuple[int, int],
    threshold: float,
) -> None:
    logits = 8.0 * torch.randn(shape, generator=torch.Generator().manual_seed(42))
    masks = mask_postprocess(
        logits.to(backend),
        image_size=image,
        input_size=cropped,
        output_size=output,
        threshold=threshold,
        backend=backend,
    )
    assert masks.dtype == torch.bool
    assert masks.shape == (shape[0], *output)
    assert count_real_differences(masks.cpu(), logits, (image, cropped, output), threshold) == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_matches_reference_at_any_size(data: st.DataObject) -> None:
    built("cpu")
    side = st.integers(1, 40)
    shape = (data.draw(st.integers(1, 3)), data.draw(side), data.draw(side))
    image = data.draw(st.integers(1, 90))
    cropped = (data.draw(st.integers(1, image)), data.draw(st.integers(1, image)))
    output = (data.draw(st.integers(1, 120)), data.draw(st.integers(1, 120)))
    seed = data.draw(st.integers(0, 2**31))
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    masks = mask_postprocess(
        logits, image_size=image, input_size=cropped, output_size=output, backend="cpu"
    )
    assert count_real_differences(masks, logits, (image, cropped, output), 0.0) == 0


def test_views_are_read_correctly(backend: str) -> None:
    logits = torch.randn(4, 32, 60, device=backend)[1:, ::2, 5:45:2]
    arguments: dict[str, Any] = {"image_size": 80, "input_size": (60, 80), "output_size": (90, 120)}
    masks = mask_postprocess(logits, **arguments, backend=backend)
    assert torch.equal(masks, mask_postprocess(logits.clone(), **arguments, backend=backend))


def test_empty_batch_returns_an_empty_result(backend: str) -> None:
    masks = mask_postprocess(
        torch.zeros(0, 8, 8, device=backend),
        image_size=32,
        input_size=(32, 24),
        output_size=(50, 40),
        backend=backend,
    )
    assert masks.shape == (0, 50, 40)
    assert masks.dtype == torch.bool


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    built("cpu")
    logits = torch.randn(3, 64, 64)
    arguments: dict[str, Any] = {
        "image_size": 256,
        "input_size": (256, 200),
        "output_size": (300, 240),
    }
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = mask_postprocess(logits, **arguments, backend="cpu")
        torch.set_num_threads(4)
        four = mask_postprocess(logits, **arguments, backend="cpu")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, four)


BAD = {
    "rank": ({"logits": torch.zeros(8, 8)}, "logits: got 2 dimensions, wanted 3"),
    "dtype": ({"logits": torch.zeros(1, 8, 8).double()}, "logits: got dtype Double, wanted Float"),
    "strides": ({"logits": torch.zeros(1, 8, 16)[..., ::2]}, "logits: got strides of a view"),
    "no-rows": ({"logits": torch.zeros(1, 0, 8)}, "logits' height: got 0, wanted 1 to"),
    "image-size": ({"image_size": 0}, "image_size: got 0, wanted 1 to"),
    "crop-too-high": ({"input_size": [33, 1]}, "input_size's height: got 33, wanted 1 to 32"),
    "crop-of-three": ({"input_size": [1, 2, 3]}, "input_size: got 3 numbers, wanted 2"),
    "no-output": ({"output_size": [4, 0]}, "output_size's width: got 0, wanted 1 to"),
    "overflow": ({"output_size": [2**40, 2**40]}, "output_size's height: got 1099511627776"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_library_names_the_argument_that_fails(
    backend: str, change: dict[str, Any], message: str
) -> None:
    """Straight into C++, past the checks of the public function."""
    arguments: dict[str, Tensor | int | Sequence[int] | float] = {
        "logits": torch.zeros(1, 8, 8),
        "image_size": 32,
        "input_size": [32, 32],
        "output_size": [4, 4],
        "threshold": 0.0,
    }
    arguments |= change
    arguments["logits"] = to_device(arguments["logits"], backend)
    with pytest.raises(RuntimeError, match=message.replace("(", r"\(")):
        built(backend).mask_postprocess(*arguments.values())


BAD_BITS = {
    "dtype": ({"logits": torch.zeros(1, 8, 8).double()}, "logits: got dtype Double, wanted Float"),
    "inputs": ({"input_sizes": [8, 8, 8]}, "input_sizes: got 3 numbers, wanted 2"),
    "outputs": ({"output_sizes": []}, "output_sizes: got 0 numbers, wanted 2"),
    "crop": ({"input_sizes": [8, 9]}, "input_size's width: got 9, wanted 1 to 8"),
    "empty": ({"output_sizes": [0, 4]}, "output_size's height: got 0, wanted 1 to"),
    "overflow": ({"output_sizes": [2**20, 2**20]}, "output_size's pixels: got 1099511627776"),
}


@pytest.mark.parametrize(("change", "message"), BAD_BITS.values(), ids=BAD_BITS)
def test_bits_name_the_argument_that_fails(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "logits": torch.zeros(1, 8, 8),
        "image_size": 8,
        "input_sizes": [8, 8],
        "output_sizes": [8, 8],
        "threshold": 0.0,
        "stability_offset": 1.0,
    }
    with pytest.raises(RuntimeError, match=message):
        built("cpu").mask_postprocess_bits(*(arguments | change).values())


BAD_RUNS = {
    "rank": ({"words": torch.zeros(8, 1).int()}, "words: got 2 dimensions, wanted 1"),
    "dtype": ({"words": torch.zeros(8)}, "words: got dtype Float, wanted Int"),
    "strides": ({"words": torch.zeros(16).int()[::2]}, "words: got strides of a view"),
    "number": ({"words": torch.zeros(7).int()}, "words: got 7 words, wanted 8"),
    "odd": ({"output_sizes": [8]}, "output_sizes: got 1 numbers, wanted"),
    "capacity": ({"capacity": -1}, "capacity: got -1, wanted at least 0"),
}


@pytest.mark.parametrize(("change", "message"), BAD_RUNS.values(), ids=BAD_RUNS)
def test_runs_name_the_argument_that_fails(change: dict[str, Any], message: str) -> None:
    arguments = {"words": torch.zeros(8).int(), "output_sizes": [8, 8], "capacity": 1}
    with pytest.raises(RuntimeError, match=message):
        built("cpu").mask_postprocess_runs(*(arguments | change).values())


def to_device(logits: Any, device: str) -> Tensor:
    """Like `Tensor.to`, which would make a view contiguous."""
    moved = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=device)
    return moved.zero_()
