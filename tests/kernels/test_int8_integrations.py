"""optimize(model, dtype=torch.int8) on tiny random SAMs: near the float results, plain layers only, and back."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from refsam_kernels.integrations import optimize
from tests.kernels.test_integrations import sam, sam_encoder, timm_encoder, transformers_encoder

# Error of two blocks of 32 random channels, relative to the features: measured 0.012.
TOLERANCE = 0.03
MODELS = [sam_encoder, timm_encoder, transformers_encoder]
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    output = model(PIXELS)
    return output if isinstance(output, Tensor) else output.last_hidden_state


def assert_near(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert 0 < (found - wanted).norm() <= TOLERANCE * wanted.norm()


@pytest.mark.parametrize("make", MODELS)
def test_near_the_original_and_undone_exactly(make: Callable[[], nn.Module]) -> None:
    model = make()
    wanted = run(model)
    handle = optimize(model, dtype=torch.int8)
    found = run(model)
    assert_near(found, wanted)
    floats = make()
    floats.load_state_dict(model.state_dict())
    optimize(floats)
    assert not torch.allclose(run(floats), found, rtol=0, atol=1e-6), "nothing was quantised"
    handle.undo()
    assert torch.equal(run(model), wanted)


def test_autograd_uses_the_float_weights() -> None:
    model, other = sam_encoder(), sam_encoder()
    other.load_state_dict(model.state_dict())
    optimize(model, dtype=torch.int8)
    optimize(other)
    assert torch.equal(model(PIXELS), other(PIXELS))


def test_new_weights_are_heeded() -> None:
    model = sam_encoder()
    optimize(model, dtype=torch.int8)
    before = run(model)
    with torch.no_grad():
        model.blocks[0].mlp.lin1.weight.mul_(1.5)
        model.blocks[1].attn.qkv.weight.data.mul_(1.5)
    changed = sam_encoder()
    changed.load_state_dict(model.state_dict())
    assert not torch.equal(run(model), before)
    assert_near(run(model), run(changed))


def test_layers_that_are_not_plain_are_called() -> None:
    class Half(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    model = sam_encoder()
    for block in model.blocks:
        for parent, name in ((block.attn, "proj"), (block.mlp, "lin2")):
            plain = getattr(parent, name)
            wrapped = Half(plain.in_features, plain.out_features)
            wrapped.load_state_dict(plain.state_dict())
            setattr(parent, name, wrapped)
    floats = copy.deepcopy(model)
    optimize(model, dtype=torch.int8)
    optimize(floats)
    assert torch.equal(run(model), run(floats))


def test_copies_and_pickles() -> None:
    model = sam_encoder()
    optimize(model, dtype=torch.int8)
    wanted = run(model)
    assert torch.equal(run(copy.deepcopy(model)), wanted)
    assert torch.equal(run(pickle.loads(pickle.dumps(model))), wanted)


def test_bad_input() -> None:
    decoder = sam().mask_decoder
    with pytest.raises(
        ValueError, match=r"dtype: got torch\.int8 for a MaskDecoder without SAM's image encoder"
    ):
        optimize(decoder, dtype=torch.int8)  # fmt: skip
    optimize(decoder)
    with pytest.raises(ValueError, match=r"dtype: got torch\.float16, wanted torch\.int8, or None"):
        optimize(sam_encoder(), dtype=torch.float16)
