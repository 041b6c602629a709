"""The image encoder beyond segment-anything: adapters, interpolated positions, what is recorded for backward."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refsam.model.adapter import Adapter
from refsam.model.image_encoder import ImageEncoder
from refsam.model.layer_norm import LayerNorm2d
from refsam_kernels import use_backend
from refsam_kernels.core.dispatch import BACKENDS, Dispatcher

DIM, DEPTH = 48, 4


def build_encoder(adapter_dim: int = 12, image_size: int = 160, seed: int = 0) -> ImageEncoder:
    """A small encoder whose windows are padded, with random position tables."""
    torch.manual_seed(seed)
    encoder = ImageEncoder(image_size, 16, DIM, DEPTH, 3, 96, 4, (1, 3), adapter_dim, 32).eval()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:
                parameter.normal_(std=0.3)
    return encoder


def build_trained_encoder() -> ImageEncoder:
    """Such an encoder whose later adapters change what they see, as training leaves them."""
    encoder = build_encoder()
    for block in encoder.blocks[2:]:
        for adapter in (block.Space_Adapter, block.MLP_Adapter):
            nn.init.normal_(adapter.D_fc2.weight, std=0.1)
            nn.init.normal_(adapter.D_fc2.bias)
    return encoder


def available_backends() -> Iterator[str]:
    """Every backend that can run all of the encoder's operators on the CPU."""
    operators = ("rel_pos_attention", "adapter_projection", "adapter_mlp")
    for name in BACKENDS:
        if not any(Dispatcher.known[op].environment_reasons(name, "cpu") for op in operators):
            yield name


@pytest.mark.parametrize("backend", list(available_backends()))
@torch.no_grad()
def test_untrained_adapters_change_no_bit(backend: str) -> None:
    encoder, bare = build_encoder(12), build_encoder(0)
    bare.load_state_dict(
        {key: value for key, value in encoder.state_dict().items() if "_Adapter." not in key}
    )
    pixels = torch.randn(2, 3, 160, 160)
    with use_backend(backend):
        (features, levels), (bare_features, bare_levels) = encoder(pixels), bare(pixels)
    assert torch.equal(features, bare_features)
    assert torch.equal(levels[0], bare_levels[0])


def test_adapters_stand_in_the_second_half_only() -> None:
    encoder = build_encoder()
    has_adapters = [block.Space_Adapter is not None for block in encoder.blocks]
    assert has_adapters == [block.MLP_Adapter is not None for block in encoder.blocks]
    assert has_adapters == [False, False, True, True]


@torch.no_grad()
def test_adapter_is_a_bottleneck_with_the_exact_gelu() -> None:
    adapter = Adapter(8, 2)
    nn.init.normal_(adapter.D_fc2.weight)
    x = torch.randn(3, 8)
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = adapter.weights
    hidden = x @ fc1_weight.T + fc1_bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(adapter(x), hidden @ fc2_weight.T + fc2_bias)


def test_epsilons_are_those_of_sam() -> None:
    encoder = build_encoder()
    norms = [module for module in encoder.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 * DEPTH and {norm.eps for norm in norms} == {1e-6}
    assert {m.eps for m in encoder.modules() if isinstance(m, LayerNorm2d)} == {1e-6}


@torch.no_grad()
def test_epsilon_reaches_the_operators() -> None:
    """Tokens of tiny variance: any other epsilon than 1e-6 would change the block's output."""
    block = build_encoder().blocks[2]
    block.attn.proj.weight.zero_()
    block.attn.proj.bias.zero_()
    x, next_norm = 1e-3 * torch.randn(1, 4, 4, DIM), nn.LayerNorm(DIM, eps=1e-6)
    output, normed = block(x, block.norm1(x), next_norm)
    hidden = F.gelu(
        block.mlp.lin1(F.layer_norm(x, (DIM,), block.norm2.weight, block.norm2.bias, 1e-6))
    )
    wanted = x + block.mlp.lin2(hidden)
    torch.testing.assert_close(output, wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(normed, next_norm(wanted), atol=1e-5, rtol=1e-5)


def test_a_frozen_first_half_records_nothing() -> None:
    encoder = build_encoder().requires_grad_(False)
    for block in encoder.blocks:
        for adapter in (block.Space_Adapter, block.MLP_Adapter):
            if adapter is not None:
                adapter.requires_grad_(True)
    records: list[bool] = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda _, __, out: records.append(out[0].requires_grad))
    features, _ = encoder(torch.randn(1, 3, 160, 160))
    assert records == [False, False, True, True]
    features.sum().backward()
    assert encoder.blocks[2].Space_Adapter.D_fc2.weight.grad is not None
    assert encoder.blocks[2].attn.proj.weight.grad is None


def test_every_parameter_gets_a_gradient() -> None:
    encoder = build_encoder()
    for block in encoder.blocks[2:]:
        nn.init.normal_(block.Space_Adapter.D_fc2.weight)
        nn.init.normal_(block.MLP_Adapter.D_fc2.weight)
    features, levels = encoder(torch.randn(1, 3, 160, 160))
    ((features * torch.randn_like(features)).sum() + levels[0].sum()).backward()
    without = [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@torch.no_grad()
def test_intermediates_are_the_outputs_of_the_global_blocks_but_the_last() -> None:
    encoder = build_encoder()
    outputs: list[Tensor] = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda _, __, out: outputs.append(out[0]))
    _, intermediates = encoder(torch.randn(2, 3, 160, 160))
    assert len(intermediates) == 1 and torch.equal(intermediates[0], outputs[1])


@torch.no_grad()
def test_positions_are_interpolated_for_another_size() -> None:
    encoder = build_encoder()
    assert encoder.position_table(10, 10) is encoder.pos_embed
    constant = encoder.pos_embed.mean((1, 2), keepdim=True)
    encoder.pos_embed.copy_(constant.expand_as(encoder.pos_embed))
    torch.testing.assert_close(encoder.position_table(7, 13), constant.expand(1, 7, 13, DIM))
    features, _ = encoder(torch.randn(1, 3, 112, 208))
    assert features.shape == (1, 7, 13, 32) and features.isfinite().all()


@pytest.mark.parametrize("shape", [(3, 160, 160), (1, 1, 160, 160), (1, 3, 160, 150)])
def test_rejects_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="pixels: got shape"):
        build_encoder()(torch.zeros(shape))
