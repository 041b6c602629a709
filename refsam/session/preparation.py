"""Prepares frames in host memory for the image encoder while the device works on earlier ones."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from refsam.model import PromptedSAM
    from refsam.model.features import FrameSize, ImageFeatures
    from refsam.video import Frame

_BUFFERS = 2  # one is filled while the other is copied


@dataclass(frozen=True, slots=True)
class PreparedFrame:
    """A frame as the image encoder takes it.

    Attributes:
        pixels: ``(1, 3, S, S)`` normalised, on the model's device.
        size: of the frame, and of its copy inside the square.
        view: the model's second input, from `PromptedSAM.view`; None if it has none.
        ready: CUDA event after which pixels may be used; None if they already may.
    """

    pixels: Tensor
    size: "FrameSize"
    view: Tensor | None = None
    ready: "torch.cuda.Event | None" = None

    def wait(self) -> tuple[Tensor, ...]:
        """The arguments of `encode_image`, for the current stream."""
        inputs = (self.pixels,) if self.view is None else (self.pixels, self.view)
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.pixels.device)
            stream.wait_event(self.ready)
            for tensor in inputs:
                tensor.record_stream(stream)  # its memory comes from another stream
        return inputs


@dataclass(frozen=True, slots=True)
class EncodedFrame:
    """A frame's output of the image encoder.

    Attributes:
        image: its features.
        size: of the frame, and of its copy inside the square.
        seconds: duration of the encoding.
    """

    image: "ImageFeatures"
    size: "FrameSize"
    seconds: float


class FramePreparer:
    """Resizes, normalises and pads frames; call it from the thread that reads them.

    On a GPU the frame goes there as bytes, through two buffers of pinned memory, and is prepared in a stream of
    its own. One thread at a time may use it.
    """

    def __init__(self, model: "PromptedSAM") -> None:
        self._model = model
        self._upload = _Upload(model.device) if model.device.type == "cuda" else None

    def __call__(self, frame: np.ndarray | Tensor) -> PreparedFrame:
        """Prepare a frame: ``(H, W, 3)`` uint8 RGB, numpy or torch, on any device.

        Raises:
            ValueError: another shape or dtype.
        """
        pixels = as_tensor(frame)
        if self._upload is None or pixels.device.type != "cpu":
            return prepare_now(self._model, pixels)
        with torch.cuda.stream(self._upload.stream):
            prepared = prepare_now(self._model, self._upload(pixels))
            ready = torch.cuda.Event()
            ready.record()
        return replace(prepared, ready=ready)


def prepare_now(model: "PromptedSAM", frame: np.ndarray | Tensor) -> PreparedFrame:
    """As `FramePreparer`, in the current CUDA stream: for a caller that has nothing else to do meanwhile."""
    frames = as_tensor(frame)[None]
    return PreparedFrame(*model.preprocess(frames), model.view(frames))


def encode_now(model: "PromptedSAM", frame: np.ndarray | Tensor) -> EncodedFrame:
    """Prepare and encode a frame at once, for several sessions that step through the same frame."""
    started = time.perf_counter()
    prepared = prepare_now(model, frame)
    with torch.no_grad():
        image = model.encode_image(*prepared.wait())
    return EncodedFrame(image, prepared.size, time.perf_counter() - started)


def prepare_all(
    model: "PromptedSAM", frames: "Iterable[Frame]"
) -> Iterator[tuple["Frame", PreparedFrame]]:
    """Yield each frame of a source with its prepared input; for `refsam.video.prefetch`."""
    prepare = FramePreparer(model)
    return ((frame, as_stored(prepare(frame.square_image()), frame)) for frame in frames)


def as_stored(prepared: PreparedFrame, frame: "Frame") -> PreparedFrame:
    """The same with the frame's stored size, which the masks will have: only the model sees square pixels."""
    if frame.aspect == 1:
        return prepared
    return replace(prepared, size=prepared.size._replace(original=frame.image.shape[:2]))


class _Upload:
    """Copies frames to the device by way of pinned buffers, in the current stream."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._device = device
        self._buffers: list[Tensor | None] = [None] * _BUFFERS
        self._copied = [torch.cuda.Event() for _ in range(_BUFFERS)]
        self._next = 0

    def __call__(self, frame: Tensor) -> Tensor:
        index, self._next = self._next, (self._next + 1) % _BUFFERS
        # Wait until the buffer's previous frame has been copied to the device.
        self._copied[index].synchronize()
        buffer = self._buffers[index]
        if buffer is None or buffer.shape != frame.shape:
            buffer = self._buffers[index] = torch.empty_like(frame, pin_memory=True)
        buffer.copy_(frame)
        on_device = buffer.to(self._device, non_blocking=True)
        self._copied[index].record()
        return on_device


def as_tensor(frame: Any) -> Tensor:
    """A frame as a tensor, sharing its memory if possible. Raises ValueError: not ``(H, W, 3)`` uint8, numpy or torch."""
    if not isinstance(frame, np.ndarray | Tensor):
        raise ValueError(f"frame: got {type(frame).__name__}, want a numpy array or a torch tensor")
    if frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise ValueError(f"frame: got shape {tuple(frame.shape)}, want (H, W, 3)")
    if frame.dtype not in (np.uint8, torch.uint8):
        raise ValueError(f"frame: got dtype {frame.dtype}, want uint8 RGB")
    if isinstance(frame, np.ndarray):
        # copies only if it must
        return torch.from_numpy(np.require(frame, requirements=["C", "W"]))
    return frame
