"""Values kept between calls: one stream fills them, so they are waited for once, and a CUDA graph never owns them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from refsam.model.mask_decoder import RandomPositionEncoding
from refsam.model.packing import Packing
from refsam_kernels.core import streams
from refsam_kernels.token_image_attention.positions import project_positions
from tests.tiny_model import tiny_model

Fill = Callable[[], object]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The waits for streams, while tensors count as a GPU's."""
    found: list[str] = []

    class Stream:
        def synchronize(self) -> None:
            found.append("wait")

    monkeypatch.setattr(streams, "is_on_gpu", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return found


def positions() -> Fill:
    table, weight = torch.randn(1, 5, 8), torch.randn(4, 8)
    return lambda: project_positions(table, weight, None, True)


def encoding() -> Fill:
    module = RandomPositionEncoding(8)
    return lambda: module(3, 4)


def packing() -> Fill:
    module = torch.nn.Linear(4, 4)
    packed = Packing(None, lambda linear, dtype: linear.weight.to(dtype, copy=True))
    return lambda: packed.arranged([module], torch.float32)[0]


CACHES = {"positions": positions, "encoding": encoding, "packing": packing}


@pytest.mark.parametrize("cache", CACHES)
def test_filling_waits_once_and_reading_never(cache: str, waits: list[str]) -> None:
    fill = CACHES[cache]()
    first = fill()
    assert waits == ["wait"]
    assert fill() is first
    assert waits == ["wait"]


@pytest.mark.parametrize("cache", CACHES)
def test_a_graphs_memory_is_not_kept(
    cache: str, waits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = CACHES[cache]()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        captured = fill()
    assert not waits
    found = fill()
    assert found is not captured
    assert isinstance(found, Tensor)
    assert torch.equal(found, captured)  # type: ignore[arg-type]


def test_encoded_text_is_waited_for(waits: list[str]) -> None:
    encoder = tiny_model().text_encoder
    with torch.no_grad():
        encoder(["a red cup"])
        assert waits == ["wait"]
        encoder(["a red cup"])
    assert waits == ["wait"]


def test_a_cpu_is_never_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", None)
    streams.settle([torch.ones(1)])
    assert not streams.is_capturing(torch.ones(1))
