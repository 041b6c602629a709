"""Frames of a video on the GPU: their parts, by CUDA graphs and without, and graphs while other threads upload."""

import threading
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.end_to_end.expressions import EXPRESSIONS, SIZE
from benchmarks.gpu_report.machine import (
    DEVICE,
    IS_REHEARSAL,
    attempt,
    median_ms,
)
from benchmarks.gpu_report.rows import Rows
from benchmarks.measure import exact_products
from refsam import RefSAM, RefSAMConfig, VideoSession
from refsam.session import FrameGraphs

PRECISION = torch.bfloat16
ROUNDS = 2 if IS_REHEARSAL else 30


def run(rows: Rows, what: str) -> None:
    """`what` is a number of expressions, or "threads"."""
    exact_products()
    model = make_model()
    size = (40, 56) if IS_REHEARSAL else SIZE
    frames = [torch.randint(256, (*size, 3), dtype=torch.uint8) for _ in range(4)]
    with torch.inference_mode(), lowered():
        if what == "threads":
            attempt(rows, partial(under_threads, model, frames), what=what)
            return
        texts = EXPRESSIONS[: int(what)]
        for name, measure in parts(model, texts, frames[0]):
            attempt(rows, measure, expressions=len(texts), part=name)


def make_model() -> RefSAM:
    """A ViT-B with random weights, drawn on the device; a small one in a rehearsal."""
    values: dict[str, Any] = RefSAMConfig.preset("nano" if IS_REHEARSAL else "vit_b").to_dict()
    values["text_encoder"] = {"kind": "small"}
    if IS_REHEARSAL:
        values["image_encoder"] |= {"image_size": 64, "depth": 2, "global_blocks": [0, 1]}
    with torch.device(DEVICE):
        model = RefSAM(RefSAMConfig.from_dict(values)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model.to(DEVICE).optimize()


def lowered() -> Any:
    """Autocast on the GPU."""
    return nullcontext() if IS_REHEARSAL else torch.autocast(DEVICE, PRECISION)


def graphs_of(model: RefSAM) -> FrameGraphs | None:
    """CUDA graphs; None on a CPU."""
    return None if IS_REHEARSAL else FrameGraphs(model)


def parts(model: RefSAM, texts: tuple[str, ...], frame: Tensor) -> Any:
    """The parts of a frame, each to be timed."""
    pixels, _ = model.preprocess(frame[None].to(DEVICE))
    text, image = model.encode_text(texts), model.encode_image(pixels)
    yield "preprocess", partial(median_ms, lambda: model.preprocess(frame[None].to(DEVICE)), 0.3)
    yield "image encoder", partial(median_ms, partial(model.encode_image, pixels), 0.5)
    yield "decoder", partial(median_ms, partial(model.decode, image, text), 0.5)
    for name, graphs in (("frame", None), ("frame, CUDA graphs", graphs_of(model))):
        session = VideoSession(model, texts, graphs=graphs)
        yield name, partial(with_masks, partial(session.step, frame))


def with_masks(step: Any) -> dict[str, Any]:
    """Milliseconds of a frame on the host to masks on the host."""
    found = median_ms(lambda: step().on_host(), 1.0)
    return found | {"frames_per_second": 1e3 / found["median_ms"]}


def under_threads(model: RefSAM, frames: list[Tensor]) -> dict[str, Any]:
    """Graphs give the same results while other threads upload and allocate, and while the number of expressions changes."""
    counts = (1, 3, 8, 2)
    expected = [
        VideoSession(model, EXPRESSIONS[:count]).step(frame).logits.cpu()
        for count, frame in zip(counts, frames, strict=True)
    ]
    graphs, stop, faults = graphs_of(model), threading.Event(), []

    def upload() -> None:
        try:
            while not stop.is_set():
                torch.randint(256, (*SIZE, 3), dtype=torch.uint8).to(DEVICE).float().sum().item()
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=upload) for _ in range(2)]
    for thread in threads:
        thread.start()
    worst = 0.0
    try:
        for _ in range(ROUNDS):
            for count, frame, wanted in zip(counts, frames, expected, strict=True):
                session = VideoSession(model, EXPRESSIONS[:count], graphs=graphs)
                found = session.step(frame).logits.cpu()
                worst = max(worst, float((found - wanted).abs().max() / wanted.abs().max()))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    row: dict[str, Any] = {"rounds": ROUNDS, "largest_difference": worst}
    if graphs is not None:
        row |= {"graphs": graphs.count, "graph_bytes": graphs.memory_bytes}
    if faults or not worst <= 0.05:
        row["wrong"] = str(faults[0]) if faults else f"logits differ by {worst:.1e}"
    return row
