"""Equal to the outputs of the authors' own modules (golden files, see their README) to 1e-5 of the largest value."""

import numpy as np
import pytest
import torch

from refsam import RefSAM, RefSAMConfig
from refsam.model import EncodedText
from refsam.model.image_encoder import ImageEncoder
from refsam_kernels import mask_postprocess, use_backend
from tests.golden import golden_weight, golden_weights, read_golden, relative_error

TOLERANCE = 1e-5
BACKENDS = ["reference", "fallback"]
OFFICIAL_NAMES = {
    "cross_modal_mlp.layers.": "resizer.",
    "dense_attention.conv.": "dense_conv.",
    "tracking.": "temporal_aggregation_network.",
    "image_encoder.": "sam.image_encoder.",
    "mask_decoder.": "sam.mask_decoder.",
    "prompt_encoder.": "sam.prompt_encoder.",
}
MODEL = {
    "image_encoder": {
        "image_size": 160,
        "embed_dim": 48,
        "depth": 4,
        "num_heads": 3,
        "window_size": 4,
        "global_blocks": (1, 3),
    },
    "text_encoder": {"kind": "t5", "width": 512},
    "dense_attention": {"hierarchical": False, "learnable_scale": False},
}


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_image_encoder(backend: str) -> None:
    golden = read_golden("official_encoder_tiny.npz")
    encoder = ImageEncoder(160, 16, 48, 4, 3, 192, 4, (1, 3), 12, 32)
    shapes = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    encoder.load_state_dict(golden_weights(shapes))
    noise = np.random.RandomState(7).standard_normal((2, 3, 160, 160))
    with use_backend(backend):
        output, intermediates = encoder(torch.from_numpy(noise).float())
    assert relative_error(output.permute(0, 3, 1, 2), golden["enc_tiny_out"]) <= TOLERANCE
    assert relative_error(torch.stack(intermediates), golden["enc_tiny_interm"]) <= TOLERANCE


def golden_model() -> RefSAM:
    """The whole model with the golden weights; level weight and scale are the two it has none for."""
    model = RefSAM(RefSAMConfig.from_dict(MODEL)).eval()
    state = model.state_dict()
    for name in state:
        for ours, official in OFFICIAL_NAMES.items():
            if name.startswith(ours):
                state[name] = golden_weight(official + name[len(ours) :], tuple(state[name].shape))
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_model_over_three_frames(backend: str) -> None:
    golden = read_golden("official_model_tiny.npz")
    model = golden_model()
    assert model.dense_attention.log_scale.exp().item() == pytest.approx(1 / 16, rel=1e-6)
    track = None
    with use_backend(backend):
        text = model.project_text(EncodedText(golden["text"], torch.tensor([7])))
        for time, frame in enumerate(golden["frames"]):
            pixels, size = model.preprocess(frame[None])
            output = model.decode(model.encode_image(pixels), text, None, track)
            track = output.track_token
            assert size.resized == size.original == (90, 160)
            assert relative_error(output.logits[None], golden[f"low_{time}"]) <= TOLERANCE
            assert relative_error(output.iou[None], golden[f"iou_{time}"]) <= TOLERANCE
            assert relative_error(track[None], golden[f"track_{time}"]) <= TOLERANCE
            masks = mask_postprocess(
                output.logits, image_size=160, input_size=size.resized, output_size=size.original
            )
            wanted = golden[f"logits_{time}"][0]
            is_sure = wanted.abs() > TOLERANCE * wanted.abs().max()
            assert torch.equal(masks[is_sure], (wanted > 0)[is_sure])
