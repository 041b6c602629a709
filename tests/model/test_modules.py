"""The parts between encoder and mask: cross-modal MLP, dense attention, decoder, tracking."""

from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from refsam.model import mask_decoder
from refsam.model.cross_modal_mlp import CrossModalMLP
from refsam.model.dense_attention import HierarchicalDenseAttention
from refsam.model.layer_norm import LayerNorm2d
from refsam.model.mask_decoder import MaskDecoder, RandomPositionEncoding
from refsam.model.tracking import TrackingModule
from refsam.model.two_way_transformer import TwoWayTransformer
from tests.sam_modeling import randomise
from tests.tiny_model import tiny_model


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


@pytest.mark.parametrize("num_hidden", [0, 1, 3])
def test_cross_modal_mlp_has_k_hidden_layers(num_hidden: int) -> None:
    layers = [m for m in CrossModalMLP(32, 8, num_hidden).layers if isinstance(m, nn.Linear)]
    widths = [(layer.in_features, layer.out_features) for layer in layers]
    assert widths == [(32, 16), *[(16, 16)] * num_hidden, (16, 8)]


@torch.no_grad()
def test_sentence_is_the_mlp_of_the_masked_mean() -> None:
    mlp, tokens = CrossModalMLP(32, 8, 1), torch.randn(2, 5, 32)
    tokens[0, 3:] = torch.nan
    words, sentence = mlp(tokens, torch.tensor([3, 5]))
    for row, length in ((0, 3), (1, 5)):
        valid = tokens[row, :length]
        wanted = F.normalize(mlp.layers(valid), dim=-1)
        torch.testing.assert_close(words[row, :length], wanted)
        torch.testing.assert_close(
            sentence[row], F.normalize(mlp.layers(valid.mean(0)), dim=-1), atol=1e-6, rtol=1e-5
        )


@torch.no_grad()
def test_dense_attention_mixes_all_levels_with_convex_weights() -> None:
    """Against the paper's formula, level by level and expression by expression."""
    dim, grid = 16, (3, 5)
    module = HierarchicalDenseAttention(dim, 24, num_levels=3)
    module.level_logits.normal_()
    module.log_scale.fill_(1.5)
    embedding, maps = unit(2, 15, dim), [torch.randn(2, *grid, 24) for _ in range(2)]
    levels = module.project(embedding, maps)
    torch.testing.assert_close(levels.norm(dim=-1), torch.ones(3, 2, 15))
    assert torch.equal(levels[0], embedding)
    text, lengths, image_index = unit(3, 4, dim), torch.tensor([4, 2, 3]), torch.tensor([1, 0, 1])
    found = module(levels, text, lengths, image_index)
    convex = module.level_logits.softmax(0)
    for row in range(3):
        words = text[row, : lengths[row]]
        wanted = torch.zeros(15, dim)
        for weight, level in zip(convex, levels[:, image_index[row]], strict=True):
            attended = (torch.e**1.5 * level @ words.T).softmax(-1) @ words
            joined = torch.cat([level, attended], dim=-1)
            wanted += weight * F.linear(joined, module.conv.weight.flatten(1), module.conv.bias)
        torch.testing.assert_close(found[row], wanted, atol=1e-5, rtol=1e-5)


def test_dense_attention_without_intermediate_levels_is_plain() -> None:
    module = HierarchicalDenseAttention(16, 24, num_levels=1, learnable_scale=False)
    assert {name for name, _ in module.named_parameters()} == {
        "conv.weight",
        "conv.bias",
        "level_logits",
    }
    assert module.log_scale.exp().item() == pytest.approx(0.25)
    assert module.project(unit(2, 15, 16), [torch.randn(2, 3, 5, 24)]).shape == (1, 2, 15, 16)


def test_scale_is_learnable_by_default_and_starts_where_told() -> None:
    module = HierarchicalDenseAttention(16, 24, num_levels=2, initial_scale=10.0)
    assert isinstance(module.log_scale, nn.Parameter)
    assert module.log_scale.exp().item() == pytest.approx(10)


@torch.no_grad()
def test_tracking_is_the_papers_module_on_sequences_of_length_one() -> None:
    tracking = TrackingModule(16, 32)
    randomise(tracking)
    attention = nn.MultiheadAttention(16, 8, batch_first=True).eval()
    attention.load_state_dict(tracking.self_attn.state_dict())
    token, previous = torch.randn(2, 3, 16)

    def wanted(x: torch.Tensor) -> torch.Tensor:
        attended = attention(x[:, None], x[:, None], x[:, None], need_weights=False)[0][:, 0]
        a = tracking.norm1(x + attended)
        b = tracking.norm2(a + tracking.linear2(tracking.linear1(a).relu()))
        return tracking.norm_feat(x + tracking.linear_feat2(tracking.linear_feat1(b).relu()))

    torch.testing.assert_close(tracking(token), wanted(token))
    torch.testing.assert_close(tracking(token, previous), wanted(token + previous))


def build_decoder() -> MaskDecoder:
    decoder = MaskDecoder(32, TwoWayTransformer(2, 32, 4, 64), num_masks=4, iou_hidden_dim=16)
    randomise(decoder)
    return decoder


def test_epsilons_are_those_of_sam() -> None:
    modules = [*build_decoder().modules(), *TrackingModule(16, 32).modules()]
    assert {m.eps for m in modules if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert {m.eps for m in modules if isinstance(m, LayerNorm2d)} == {1e-6}


@torch.no_grad()
def test_decoder_leaves_padded_prompts_out() -> None:
    decoder, image, image_pe = build_decoder(), torch.randn(2, 20, 32), torch.randn(1, 20, 32)
    sparse, lengths = torch.randn(2, 4, 32), torch.tensor([2, 4])
    found = decoder(image, image_pe, sparse, lengths, (4, 5), num_masks=3)
    other = sparse.clone()
    other[0, 2:] = 100
    for a, b in zip(found, decoder(image, image_pe, other, lengths, (4, 5), 3), strict=True):
        assert torch.equal(a, b)
    for row, length in ((0, 2), (1, 4)):
        alone = decoder(
            image[row : row + 1], image_pe, sparse[row : row + 1, :length], None, (4, 5), 3
        )
        for a, b in zip(found, alone, strict=True):
            torch.testing.assert_close(a[row : row + 1], b, atol=1e-5, rtol=1e-5)
    assert found[0].shape == (2, 3, 16, 20) and found[1].shape == (2, 3)


@torch.no_grad()
def test_fewer_masks_are_the_first_of_all() -> None:
    decoder, image, image_pe = build_decoder(), torch.randn(1, 20, 32), torch.randn(1, 20, 32)
    sparse = torch.randn(1, 4, 32)
    one = decoder(image, image_pe, sparse, None, (4, 5))
    every = decoder(image, image_pe, sparse, None, (4, 5), num_masks=4)
    for a, b in zip(one, every, strict=True):
        torch.testing.assert_close(a, b[:, :1], atol=1e-5, rtol=1e-5)


def test_positions_are_made_once_and_follow_their_weights() -> None:
    layer = RandomPositionEncoding(32)
    first = layer(4, 6)
    with torch.inference_mode():
        assert layer(4, 6) is first and not first.is_inference()
    assert layer(4, 6, torch.bfloat16).dtype == torch.bfloat16
    assert layer(6, 4).shape == (1, 24, 32) and not torch.equal(layer(6, 4), first)
    other = RandomPositionEncoding(32)
    expected = other(4, 6).clone()
    layer(4, 6)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(4, 6), expected)
    assert list(layer.state_dict()) == ["positional_encoding_gaussian_matrix"]


def test_positions_made_without_autograd_serve_training() -> None:
    layer = RandomPositionEncoding(32)
    with torch.inference_mode():
        layer(4, 6)
    weight = torch.ones(32, requires_grad=True)
    (layer(4, 6) @ weight).sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_decoding_a_few_expressions_at_a_time_changes_nothing() -> None:
    decoder = tiny_model().mask_decoder
    generator = torch.Generator().manual_seed(0)
    image, pe = (
        torch.randn(5, 16, 32, generator=generator),
        torch.randn(1, 16, 32, generator=generator),
    )
    sparse, lengths = torch.randn(5, 7, 32, generator=generator), torch.tensor([3, 1, 7, 2, 2])
    for valid in (lengths, None):
        arguments = image, pe, sparse, valid, (4, 4)
        expected = decoder(*arguments)  # autograd is on: all at once
        with torch.no_grad(), mock.patch.object(mask_decoder, "ELEMENTS", 2 * image[0].numel()):
            found = decoder(*arguments)
        for value, wanted in zip(found, expected, strict=True):
            assert value.shape == wanted.shape
            torch.testing.assert_close(value, wanted.detach(), rtol=0, atol=1e-5)
