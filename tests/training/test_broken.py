"""Losses and masks that are no numbers are told by sample, and a GPU is looked at once a step."""

import pytest
import torch
from torch import Tensor

from refsam.training import module
from refsam.training.module import Broken, NotANumberError

NAMES = ("first", "second", "third")


def flags(*broken: int) -> Tensor:
    return torch.tensor([index in broken for index in range(3)])


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The looks at values, while they count as a GPU's."""
    monkeypatch.setattr(module, "is_free_to_look_at", lambda tensor: False)
    found: list[str] = []
    look = Tensor.__bool__

    def noted(tensor: Tensor) -> bool:
        found.append("look")
        return look(tensor)

    monkeypatch.setattr(Tensor, "__bool__", noted)
    return found


def test_a_gpu_is_looked_at_once_a_step(looks: list[str]) -> None:
    broken = Broken(NAMES)
    for _ in range(5):
        broken.add("predicted mask", flags())
    broken.add("loss", flags())
    assert not looks
    broken.refuse()
    assert looks == ["look"]


def test_the_first_thing_that_broke_is_told(looks: list[str]) -> None:
    broken = Broken(NAMES)
    broken.add("predicted mask", flags())
    broken.add("predicted mask", flags(0, 2))
    broken.add("loss", flags(0, 1, 2))
    with pytest.raises(NotANumberError, match="predicted mask") as error:
        broken.refuse()
    assert error.value.names == ("first", "third")


def test_a_cpu_tells_at_once() -> None:
    broken = Broken(NAMES)
    broken.add("predicted mask", flags())
    with pytest.raises(NotANumberError, match="loss"):
        broken.add("loss", flags(1))
