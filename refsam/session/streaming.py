"""Frames through a session: read, resized and encoded in other threads while the session works on those before."""

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from refsam.runtime.device import autocast, choose_dtype
from refsam.runtime.malloc import keep_freed_memory
from refsam.runtime.threads import available_cores, chosen_threads
from refsam.session.cuda_graphs import FrameGraphs
from refsam.session.preparation import EncodedFrame, PreparedFrame, prepare_all
from refsam.session.video_session import FrameResult, VideoSession, image_features

if TYPE_CHECKING:
    from refsam.model import PromptedSAM
    from refsam.video import Frame
    from refsam.video.prefetch import Prefetched

# Threads that run the image encoder beside the decoder: two, so that one can work while the other waits.
_ENCODERS = 2
# Each thread encodes up to four frames that are already read: a small encoder spends its time on fetching weights and
# starting products. Larger frames are encoded in smaller groups.
_MOST_TOGETHER, _BYTES_TOGETHER = 4, 2**25


def segment_video(
    model: "PromptedSAM",
    source: str | os.PathLike[str] | Iterable[np.ndarray | Tensor],
    expressions: Sequence[str],
    *,
    optimize: bool = True,
    graphs: FrameGraphs | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[FrameResult]:
    """Yield the masks of each frame while the next frames are read in another thread.

    While it runs, glibc keeps freed memory, and a small model on a CPU computes with few threads
    (`refsam.runtime.threads.choose_threads`).

    Args:
        model: a `RefSAM` or `EVFSAM` in evaluation mode.
        source: anything that `refsam.video.open_source` takes (video, folder of images, image, camera), or an
            iterable of ``(H, W, 3)`` uint8 RGB frames.
        expressions: what to segment.
        optimize, graphs: as for `VideoSession`.
        dtype: of matrix products on a GPU (autocast). None: bfloat16 where the GPU supports it, or autocast as it is
            where that is on already.

    Raises:
        UserError: an expression or the source cannot be used; `FrameDecodeError` after the last good frame.
    """
    session = VideoSession(model, expressions, optimize=optimize, graphs=graphs)
    return _step_through(session, source, _autocast(model.device, dtype))


def prefetch_frames(
    session: VideoSession,
    frames: "Iterable[Frame]",
    *,
    encode: bool = True,
    heed: Callable[[], None] = lambda: None,
) -> Generator[tuple["Frame", PreparedFrame | EncodedFrame], None, None]:
    """Yield each frame with the input of `session.step`, prepared in other threads while earlier frames are
    segmented.

    The threads read and resize. If torch computes with one thread on several cores, they also run the image encoder,
    each on up to four frames that are ready, in parallel with the decoder (only the decoder depends on the frame
    before). Encoding frames together changes their logits by at most 1e-5. encode=False leaves the encoder to
    `step_batch`. heed is called every tenth of a second while waiting for a frame, and may raise.
    """
    from refsam.video import prefetch

    ahead = not (encode and _has_a_core_for_the_encoder(session.model))
    prepared = prefetch(prepare_all(session.model, frames), heed=heed if ahead else lambda: None)
    with closing(prepared):
        if ahead:
            yield from prepared
            return
        # Threads have modes of their own.
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        encoder = partial(_encode, session, dtype)
        with ThreadPoolExecutor(_ENCODERS, "refsam-encoder") as pool:
            begun = (
                ([frame for frame, _ in group], pool.submit(encoder, [ready for _, ready in group]))
                for group in _groups(prepared)
            )
            encoded = prefetch(begun, depth=_ENCODERS - 1, heed=heed, patience=60)
            # `prepared` is closed first: that wakes the threads, which `encoded` then waits for.
            with closing(encoded), closing(prepared):
                for group, future in encoded:
                    yield from zip(group, future.result(), strict=True)


def _has_a_core_for_the_encoder(model: "PromptedSAM") -> bool:
    return model.device.type == "cpu" and torch.get_num_threads() == 1 and available_cores() > 1


def _groups(
    prepared: "Prefetched[tuple[Frame, PreparedFrame]]",
) -> "Iterator[list[tuple[Frame, PreparedFrame]]]":
    """Groups of frames to encode together: the next frame, and frames of its shape that are ready behind it."""
    for first in prepared:
        most = min(_MOST_TOGETHER, _BYTES_TOGETHER // first[0].image.nbytes)
        pairs = [first, *prepared.waiting(most - 1)]
        for _, group in groupby(pairs, lambda pair: pair[1].pixels.shape):
            yield list(group)


def _encode(
    session: VideoSession, autocast_dtype: torch.dtype | None, frames: list[PreparedFrame]
) -> list[EncodedFrame]:
    started = time.perf_counter()
    precision = torch.autocast("cpu", autocast_dtype, enabled=autocast_dtype is not None)
    with torch.no_grad(), precision:
        images = image_features(session._runner, frames).split()
    seconds = (time.perf_counter() - started) / len(frames)
    pairs = zip(images, frames, strict=True)
    return [EncodedFrame(image, frame.size, seconds) for image, frame in pairs]


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    if dtype is None and torch.is_autocast_enabled(device.type):
        return nullcontext()
    return autocast(device, dtype or choose_dtype("auto", device))


def _step_through(
    session: VideoSession,
    source: str | os.PathLike[str] | Iterable[np.ndarray | Tensor],
    precision: AbstractContextManager[None],
) -> Iterator[FrameResult]:
    from refsam.video import Frame, open_source

    encoder = session.model.config.image_encoder
    keep_freed_memory()
    with ExitStack() as stack:
        stack.enter_context(chosen_threads(session.model.device, encoder.multiplications))
        frames: Iterable[Frame]
        if isinstance(source, str | os.PathLike):
            frames = stack.enter_context(open_source(source))
        else:
            frames = (Frame(index, 0.0, image) for index, image in enumerate(source))  # type: ignore[arg-type]
        for _, prepared in stack.enter_context(closing(prefetch_frames(session, frames))):
            with precision:  # not around the yield: that would reach into the caller's code
                result = session.step(prepared)
            yield result
