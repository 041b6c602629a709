"""torch.func's transforms and forward-mode derivatives of optimized models: the model's own code computes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from refsam_kernels.integrations import optimize
from refsam_kernels.integrations.replacement import say_that_own_code_computes
from tests.kernels.encoder_models import SAM, low_rank
from tests.sam_modeling import sam_image_encoder

Compute = Callable[[nn.Module, Tensor], Any]


def of_parameters(transform: Callable[..., Any]) -> Compute:
    """A transform of the loss as a function of what trains, or of all parameters."""

    def compute(model: nn.Module, x: Tensor) -> Any:
        named = dict(model.named_parameters())
        trained = {name: p.detach() for name, p in named.items() if p.requires_grad} or named

        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(model, parameters, (x,)).square().mean()

        return transform(loss, trained, x)

    return compute


def dual(model: nn.Module, x: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, x.cos()))).tangent


TRANSFORMS: dict[str, Compute] = {
    "grad": of_parameters(lambda loss, p, x: torch.func.grad(loss)(p, x)),
    "vmap-grad": of_parameters(
        lambda loss, p, x: torch.func.vmap(torch.func.grad(loss), (None, 0))(p, torch.stack([x, -x]))
    ),
    "vjp": lambda model, x: torch.func.vjp(model, x)[1](model(x)),
    "vmap": lambda model, x: torch.func.vmap(lambda x: model(x[None])[0])(torch.cat([x, -x])),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x.cos(),)),
    "jacfwd": lambda model, x: torch.func.jacfwd(lambda factor: model(factor * x))(x.new_ones(())),
    "dual": dual,
}  # fmt: skip


@pytest.mark.parametrize("weights", ["trained", "frozen", "low-rank"])
@pytest.mark.parametrize("compute", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_see_the_plain_model(compute: Compute, weights: str) -> None:
    """Also where packed layers stood in a call before; calls without a transform use the operators as before."""
    plain = sam_image_encoder(**SAM).requires_grad_(weights == "trained")
    plain = low_rank(plain) if weights == "low-rank" else plain
    model = copy.deepcopy(plain)
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    optimize(model)
    before = model(x)
    torch.testing.assert_close(compute(model, x), compute(plain, x))
    assert torch.equal(model(x), before)


def test_it_is_said_once() -> None:
    say_that_own_code_computes.cache_clear()
    model = sam_image_encoder(**SAM)
    optimize(model)
    x = torch.randn(1, 3, 32, 32)
    compute = torch.func.vmap(lambda x: model(x[None]))
    with pytest.warns(UserWarning, match=r"own code computes.*call torch.autograd.grad") as said:
        compute(compute(x).new_zeros(x.shape))
    assert len(said) == 1
