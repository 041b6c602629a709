"""J and F of one pair of 480p masks: the compiled module, its Python stand-in, and the steps of the DAVIS evaluation code.

`python -m benchmarks.end_to_end.metrics --out FILE` writes one JSON file. Times are processor seconds of one thread, so that a
busy machine spoils them little, the least of many rounds. The steps of DAVIS need OpenCV, which refsam itself does not.
"""

import time
from collections.abc import Callable, Mapping

import numpy as np

from benchmarks.programs import make_parser, write_result
from refsam.metrics import (
    boundary_radius,
    region_contour,
    sequence_scores,
)

ROUNDS = 40
Pair = tuple[np.ndarray, np.ndarray]


def example() -> Pair:
    """Two wavy blobs of about a tenth of a 480 x 854 frame, a few pixels apart."""
    y, x = np.mgrid[:480, :854]
    angle, distance = np.arctan2(y - 240, x - 400), np.hypot(y - 240, x - 400)
    masks = [distance < 110 + 12 * np.sin(waves * angle) for waves in (9, 10)]
    return masks[0], masks[1]


def native(pair: Pair) -> tuple[float, float]:
    """J and F by the compiled module."""
    scores = sequence_scores(*pair)
    return float(scores.region[0]), float(scores.contour[0])


def python(pair: Pair) -> tuple[float, float]:
    """J and F by numpy."""
    compiled, region_contour._native = region_contour._native, None
    try:
        return native(pair)
    finally:
        region_contour._native = compiled


def davis(pair: Pair) -> tuple[float, float]:
    """J and F by the steps of `db_eval_iou` and `f_measure` of davis2017, OpenCV's dilation among them."""
    import cv2  # type: ignore[import-not-found]

    prediction, truth = pair
    region = np.sum(prediction & truth) / np.sum(prediction | truth)
    radius = boundary_radius(truth.shape)
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disk = (x**2 + y**2 <= radius**2).astype(np.uint8)
    edges = [_seg2bmap(mask) for mask in pair]
    grown = [cv2.dilate(edge.astype(np.uint8), disk) for edge in edges]
    precision = np.sum(edges[0] * grown[1]) / np.sum(edges[0])
    recall = np.sum(edges[1] * grown[0]) / np.sum(edges[1])
    return float(region), float(2 * precision * recall / (precision + recall))


def _seg2bmap(mask: np.ndarray) -> np.ndarray:
    """The boundary as `davis2017` makes it: three shifted copies of the whole mask."""
    shifted = [np.zeros_like(mask) for _ in range(3)]
    shifted[0][:, :-1] = mask[:, 1:]
    shifted[1][:-1] = mask[1:]
    shifted[2][:-1, :-1] = mask[1:, 1:]
    edge = mask ^ shifted[0] | mask ^ shifted[1] | mask ^ shifted[2]
    edge[-1] = mask[-1] ^ shifted[0][-1]
    edge[:, -1] = mask[:, -1] ^ shifted[1][:, -1]
    edge[-1, -1] = 0
    return edge


def measure(
    providers: Mapping[str, Callable[[Pair], tuple[float, float]]], pair: Pair
) -> dict[str, float]:
    """Milliseconds of each provider, after a check that all agree."""
    scores = [provider(pair) for provider in providers.values()]
    np.testing.assert_allclose(scores, [scores[0]] * len(scores), rtol=0, atol=1e-12)
    best = dict.fromkeys(providers, float("inf"))
    for _ in range(ROUNDS):
        for name, provider in providers.items():
            started = time.process_time()
            provider(pair)
            best[name] = min(best[name], 1e3 * (time.process_time() - started))
    return best


def main() -> None:
    """Measure, print and write."""
    parser = make_parser(__file__, __doc__)
    arguments = parser.parse_args()
    if not region_contour.is_native():
        parser.error("refsam.metrics._native is not built")
    providers = {"native": native, "python": python, "davis": davis}
    milliseconds = measure(providers, example())
    for name, value in milliseconds.items():
        print(f"{name:8} {value:8.3f} ms  {value / milliseconds['native']:6.1f} x native")
    write_result(arguments, {"milliseconds_per_pair": milliseconds})


if __name__ == "__main__":
    main()
