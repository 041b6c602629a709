"""optimize() on segment-anything's two-way transformer: `token_image_attention` where it was measured faster."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refsam_kernels.integrations import optimize, two_way_transformer
from tests.kernels.test_integrations import assert_close
from tests.sam_modeling import sam_mask_decoder

ATTENTIONS = 5  # two in each of two blocks, and the last one


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The queries of every call of the operator."""
    seen: list[Tensor] = []
    own = two_way_transformer.token_image_attention

    def counted(queries: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        seen.append(queries)
        return own(queries, *arguments, **settings)

    monkeypatch.setattr(two_way_transformer, "token_image_attention", counted)
    return seen


def decoder(**sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    return sam_mask_decoder(dim=32, mlp_dim=32, heads=4, **sizes)


def inputs(prompts: int, tokens: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """For a decoder whose transformer has so many tokens: five of its own, the others of the prompt."""
    return {
        "image_embeddings": torch.randn(1, 32, 5, 7, dtype=dtype),
        "image_pe": torch.randn(1, 32, 5, 7, dtype=dtype),
        "sparse_prompt_embeddings": torch.randn(prompts, tokens - 5, 32, dtype=dtype),
        "dense_prompt_embeddings": torch.randn(prompts, 32, 5, 7, dtype=dtype),
    }


def run(model: Any, values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    masks, iou = model.predict_masks(**values)
    return masks, iou


@pytest.mark.parametrize(
    ("prompts", "tokens", "is_chosen"),
    [
        (1, 7, True),
        (1, 16, True),
        (1, 17, False),
        (3, 17, False),
        (4, 17, True),
        (5, 32, True),
        (4, 33, False),
        (9, 5, True),
    ],
)
@torch.no_grad()
def test_either_side_of_the_choice_computes_the_same(
    calls: list[Tensor], prompts: int, tokens: int, is_chosen: bool
) -> None:
    model, values = decoder(), inputs(prompts, tokens)
    wanted = run(model, values)
    with optimize(model, check=False):
        found = run(model, values)
    assert len(calls) == (ATTENTIONS if is_chosen else 0)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs, 1e-5)
    for ours, theirs in zip(run(model, values), wanted, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_dtypes_that_were_not_measured_faster_are_computed_as_there(
    calls: list[Tensor], dtype: torch.dtype
) -> None:
    model, values = decoder().to(dtype), inputs(2, 7, dtype)
    wanted = model.transformer(
        values["image_embeddings"], values["image_pe"], torch.ones(1, 7, 32, dtype=dtype)
    )
    with optimize(model, check=False):
        found = model.transformer(
            values["image_embeddings"], values["image_pe"], torch.ones(1, 7, 32, dtype=dtype)
        )
    assert all(map(torch.equal, found, wanted))
    assert not calls


def hook(model: Any) -> None:
    layer = model.transformer.layers[1].cross_attn_token_to_image.v_proj
    layer.register_forward_hook(lambda module, arguments, output: 2 * output)


def hook_an_attention(model: Any) -> None:
    attention = model.transformer.final_attn_token_to_image
    attention.register_forward_hook(lambda module, arguments, output: 2 * output)


def hook_a_norm(model: Any) -> None:
    model.transformer.layers[0].norm4.register_forward_hook(lambda *_: _[2] + 1)


def wrap_a_projection(model: Any) -> None:
    attention = model.transformer.layers[0].cross_attn_image_to_token
    attention.out_proj = nn.Sequential(attention.out_proj, nn.LayerNorm(32))


def change_weights(model: Any) -> None:
    for parameter in model.transformer.parameters():
        parameter.data.mul_(1.1)


CHANGES = {
    change.__name__: change
    for change in (hook, hook_an_attention, hook_a_norm, wrap_a_projection, change_weights)
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_what_is_put_around_modules_is_heeded(
    calls: list[Tensor], change: Callable[[Any], None]
) -> None:
    model, values = decoder(), inputs(2, 7)
    plain = copy.deepcopy(model)
    optimize(model)
    before = run(model, values)
    calls.clear()
    for changed in (model, plain):
        change(changed)
    found = run(model, values)
    for ours, theirs in zip(found, run(plain, values), strict=True):
        assert_close(ours, theirs, 1e-5)
    assert not torch.allclose(found[0], before[0], atol=1e-3)
    # One attention only is computed as there.
    assert len(calls) == (ATTENTIONS if change is change_weights else ATTENTIONS - 1)


def test_training_and_autocast_are_computed_as_there(calls: list[Tensor]) -> None:
    model, values = decoder(), inputs(2, 7)
    optimize(model, check=False)
    run(model, values)[0].sum().backward()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        run(model, values)
    assert not calls


@torch.no_grad()
def test_another_transformer_goes_on_as_it_is(calls: list[Tensor]) -> None:
    model: Any = decoder()
    model.transformer.layers[0].gate = nn.Linear(1, 1)
    values = inputs(2, 7)
    wanted = run(model, values)
    with optimize(model, check=False):
        for ours, theirs in zip(run(model, values), wanted, strict=True):
            assert_close(ours, theirs, 1e-5)
        assert "forward" not in vars(model.transformer)
    assert not calls
