"""The compiled J and F: the same numbers as in Python, on any threads, without Python's lock."""

import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from refsam.metrics import contour_accuracy, label_scores, region_contour, region_similarity

CHECKOUT = Path(__file__).parents[2]


def in_python(function, *args, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(region_contour, "_native", None)
        return function(*args, **options)


def test_the_compiled_module_is_used_where_it_is_built(native, monkeypatch):
    for name in ("_per_frame", "_label_frame"):
        monkeypatch.setattr(region_contour, name, None)
    maps = np.ones((2, 4, 5), dtype=np.uint8)
    assert region_similarity(*maps) == contour_accuracy(*maps) == 1
    assert label_scores(*maps, [1], [1])[0] == [[1]]


# Widths around 64 and 128: the compiled masks hold 64 pixels a word.
sizes = st.tuples(st.integers(1, 12), st.sampled_from([1, 2, 17, 63, 64, 65, 127, 128, 129]))


@settings(max_examples=150, deadline=None)
@given(st.data(), sizes, st.integers(0, 9))
def test_scores_match_python(native, data, size, radius):
    prediction, truth, void = (data.draw(arrays(np.bool_, (2, *size))) for _ in range(3))
    for unknown in (None, void):
        pair = prediction, truth, unknown
        np.testing.assert_allclose(
            region_similarity(*pair), in_python(region_similarity, *pair), rtol=0, atol=1e-12
        )
        np.testing.assert_allclose(
            contour_accuracy(*pair, bound=radius),
            in_python(contour_accuracy, *pair, bound=radius),
            rtol=0,
            atol=1e-12,
        )


@pytest.mark.parametrize("size", [(480, 854), (96, 128), (33, 64), (1, 200), (200, 1)])
@pytest.mark.parametrize("density", [0.5, 0.02])
def test_label_scores_match_python(native, size, density):
    random = np.random.default_rng(0)
    labels = random.integers(1, 4, (2, 2, *size)) * (random.random((2, 2, *size)) < density)
    maps = labels.astype(np.uint8)
    void = random.random((2, *size)) < 0.05
    args = *maps, [1, 2, 3, 9], [3, 1], void
    for scores, expected in zip(label_scores(*args), in_python(label_scores, *args), strict=True):
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-12)


def test_any_number_of_threads_gives_the_same_scores(native):
    masks = np.random.default_rng(0).random((2, 9, 50, 70)) < 0.1
    expected = native.contour(*masks, None, 2, 1)
    for threads in (0, 2, 5, 64):
        np.testing.assert_array_equal(native.contour(*masks, None, 2, threads), expected)


def test_no_frames_give_no_scores(native):
    none = np.zeros((0, 4, 5), dtype=bool)
    assert native.region(none, none, None, 4).shape == (0,)
    assert native.labels(none, none, None, [1, 2], [1], 2, 4).shape == (2, 1, 2, 0)


@pytest.fixture
def no_turns():
    """Python takes its lock from no thread: another one runs only where code lets go of it."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(before)


def test_other_threads_run_during_the_work(native, no_turns):
    masks = np.repeat(np.random.default_rng(0).random((2, 1, 240, 427)) < 0.5, 20, axis=1)
    ticks, finished = 0, threading.Event()

    def tick():
        nonlocal ticks
        while not finished.is_set():
            ticks += 1
            time.sleep(0)

    def is_seen():
        """Whether it ticked during a call, which on a busy machine it need not."""
        started = ticks
        native.contour(*masks, None, 8, 1)
        return ticks > started

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        assert any(is_seen() for _ in range(500))
    finally:
        finished.set()
        ticker.join()


MASK = np.zeros((2, 6, 7), dtype=bool)


@pytest.mark.parametrize(
    ("prediction", "truth", "void", "message"),
    [
        (MASK.astype(float), MASK, None, "prediction: got dtype float64, wanted bool or uint8"),
        (MASK, MASK.astype(np.int8), None, "truth: got dtype int8, wanted bool or uint8"),
        (MASK[0], MASK, None, "prediction: got 2 dimensions, wanted 3"),
        (MASK[:, :, ::2], MASK, None, "prediction: wanted an array in C order"),
        (MASK[:, :0], MASK, None, "prediction: got an empty image"),
        (MASK, MASK[:1], None, r"truth: got shape \(1, 6, 7\), wanted \(2, 6, 7\)"),
        (MASK, MASK, MASK[:, :5].copy(), r"void: got shape \(2, 5, 7\), wanted \(2, 6, 7\)"),
    ],
)
def test_entries_reject_impossible_arrays(native, prediction, truth, void, message):
    calls = (
        lambda: native.region(prediction, truth, void, 1),
        lambda: native.contour(prediction, truth, void, 2, 1),
        lambda: native.labels(prediction, truth, void, [1], [1], 2, 1),
    )
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_entries_reject_a_negative_radius(native):
    with pytest.raises(ValueError, match="radius: got -1, wanted at least 0"):
        native.contour(MASK, MASK, None, -1, 1)


@pytest.mark.slow
def test_the_code_for_processors_without_sse2_is_equal(native, tmp_path):
    pybind11 = pytest.importorskip("pybind11", reason="needs the headers of pybind11")
    target = tmp_path / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    subprocess.run(
        [
            "c++",
            *"-O2 -std=c++20 -fPIC -shared -pthread -U__SSE2__".split(),
            *(f"-I{folder}" for folder in includes),
            *map(str, (CHECKOUT / "csrc" / "metrics").glob("*.cpp")),
            "-o",
            str(target),
        ],
        check=True,
    )
    masks = np.random.default_rng(0).random((2, 3, 100, 203)) < 0.3
    np.save(tmp_path / "masks.npy", masks)
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import numpy as np, _native\n"
        f"masks = np.load({str(tmp_path / 'masks.npy')!r})\n"
        "print(_native.region(*masks, None, 1).tolist(), _native.contour(*masks, None, 2, 1).tolist())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    expected = native.region(*masks, None, 1).tolist(), native.contour(*masks, None, 2, 1).tolist()
    assert printed.split() == f"{expected[0]} {expected[1]}".split()
