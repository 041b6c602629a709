"""`python -m benchmarks.end_to_end.fingerprint --out FILE.json`: the time spent in a forward on noticing changed weights.

The time inside `Fingerprint` is taken within forwards, where the weights have left the caches. It is to be below 0.5 %. Times
are processor time of the main thread, so that other work of the machine is not in them.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks.programs import make_parser, write_result
from refsam import RefSAM
from refsam_kernels import Fingerprint
from refsam_kernels.integrations import optimize
from tests.sam_modeling import sam_image_encoder

Forward = Callable[[], Any]
WARM_UP = 2
# Three blocks of ViT-B, one of them global: a quarter of it in both times.
QUARTER: dict[str, Any] = {
    "embed_dim": 768,
    "depth": 3,
    "num_heads": 12,
    "window_size": 14,
    "out_chans": 256,
}
QUARTER |= {"img_size": 1024, "patch_size": 16, "global_attn_indexes": (2,)}


def of_nano() -> Forward:
    """Our own model's encoder, with one fingerprint for all weights."""
    nano = RefSAM.from_pretrained("nano").optimize()
    frame, _ = nano.preprocess(torch.zeros(1, 720, 1280, 3, dtype=torch.uint8))
    return lambda: nano.encode_image(frame)


def of_vit_b(dtype: torch.dtype) -> Forward:
    """segment-anything's encoder, with a fingerprint for each layer."""
    model: nn.Module = sam_image_encoder(**QUARTER).to(dtype)
    optimize(model, check=False)
    return partial(model, torch.zeros(1, 3, 1024, 1024, dtype=dtype))


MODELS: dict[str, Callable[[], Forward]] = {
    "nano": of_nano,
    "a quarter of vit_b, float32": lambda: of_vit_b(torch.float32),
    "a quarter of vit_b, bfloat16": lambda: of_vit_b(torch.bfloat16),
}


def times(forward: Forward, rounds: int) -> tuple[float, float]:
    """Medians in milliseconds of a forward and of the time in `Fingerprint` within it."""
    own, inside = Fingerprint.__call__, [0.0]
    whole, parts = [], []

    def timed(self: Fingerprint, tensors: Any) -> Any:
        start = time.thread_time()
        try:
            return own(self, tensors)
        finally:
            inside[0] += time.thread_time() - start

    with mock.patch.object(Fingerprint, "__call__", timed):
        for _ in range(WARM_UP + rounds):
            inside[0], start = 0.0, time.thread_time()
            forward()
            whole.append(time.thread_time() - start)
            parts.append(inside[0])
    return 1e3 * statistics.median(whole[WARM_UP:]), 1e3 * statistics.median(parts[WARM_UP:])


def main() -> None:
    """Measures and writes the file."""
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="a part of a model's name")
    arguments = parser.parse_args()
    rows = []
    for name, make in MODELS.items():
        if arguments.only not in name:
            continue
        with torch.inference_mode():
            whole, part = times(make(), arguments.rounds)
        row = {"model": name, "forward_ms": whole, "fingerprint_ms": part}
        rows.append(row | {"share_percent": 100 * part / whole})
        print(rows[-1], flush=True)
    write_result(arguments, {"rows": rows})


if __name__ == "__main__":
    main()
