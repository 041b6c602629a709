"""mask_postprocess in Triton."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from triton.runtime import interpreter

from refsam_kernels.mask_postprocess import triton as triton_backend
from refsam_kernels.mask_postprocess.taps import places_of
from tests.kernels.interpreter import DEVICE, IS_INTERPRETED
from tests.kernels.mask_postprocess_cases import MaskPostprocessCases


class TestTriton(MaskPostprocessCases):
    """Reductions by more than its taps reach are left to other backends."""

    backend = "triton"
    device = DEVICE


@pytest.mark.parametrize("shape", [(129, 4096, 4096), (64, 22_000, 16_000)], ids=str)
def test_masks_beyond_2_to_the_31_pixels(
    shape: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first tile of every mask, of which the last lies further than 32 bits reach.

    In the interpreter masks lie in a file with holes: of all their gigabytes only these tiles come into being.
    """
    count, height, width = shape
    if IS_INTERPRETED:
        file = str(tmp_path / "masks")
        pixels = torch.from_file(file, True, count * height * width, dtype=torch.uint8)
        masks = pixels.view(torch.bool).view(shape)
        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    else:
        masks = torch.zeros(shape, dtype=torch.bool, device=DEVICE)
    logits = torch.ones(count, 16, 16, device=DEVICE)
    places = places_of((16, 16), 64, ((40, 64),), ((height, width),), logits.device)
    launch = triton_backend._masks_launch(logits, masks, places, 0.0)
    replace(launch, programs=(1, count)).run()
    rows, columns = triton_backend.BLOCK_ROWS, triton_backend.BLOCK_COLUMNS
    for mask in (masks[0], masks[count // 2], masks[-1]):
        assert mask[:rows, :columns].all()
        assert not mask[rows : 2 * rows, : 2 * columns].any()
