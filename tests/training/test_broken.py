"""Losses and masks that are no numbers are told by sample, and a GPU is looked at once a step."""

import pytest
import torch
from torch import Tensor

from refsam.training import module
from refsam.training.module import Broken, NotANumberError
from refsam.training.monitoring import mean_losses

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


def test_the_losses_of_a_step_are_fetched_together(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[torch.Size] = []
    fetch = Tensor.tolist

    def note(tensor: Tensor) -> list[float]:
        fetched.append(tensor.shape)
        return fetch(tensor)

    def refuse(tensor: Tensor) -> float:
        raise AssertionError("a value was fetched alone")

    monkeypatch.setattr(Tensor, "tolist", note)
    for way in ("item", "__float__"):
        monkeypatch.setattr(Tensor, way, refuse, raising=False)
    losses = ({"focal": 1.0, "total": 2.0}, {"focal": 3.0, "total": 5.0})
    found = mean_losses([{k: torch.tensor(v) for k, v in each.items()} for each in losses])
    assert found == {"focal": 2.0, "total": 3.5}
    assert fetched == [torch.Size([4])]
