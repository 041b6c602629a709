"""How many threads, which memory and which precision a process takes."""

import gc
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from refsam import RefSAMConfig
from refsam.runtime import device, threads
from refsam.runtime.collector import no_collection
from refsam.session import VideoSession, segment_video, streaming
from tests.tiny_model import tiny_model

FAULTS = """
import resource, sys
import numpy as np
from refsam.runtime.malloc import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for turn in range(40):
    if turn == 20:
        before = faults()
    arrays = [np.ones(3_000_000, np.uint8) for _ in range(4)]
    del arrays
print((faults() - before) // 20)
"""


def faults(mode: str) -> int:
    """Page faults of a turn that makes and frees twelve megabytes, in a process of its own."""
    command = [sys.executable, "-c", FAULTS, mode]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_used_again() -> None:
    assert faults("give back") > 1000
    assert faults("keep") < 100


def test_the_collector_rests_while_loading_and_leaves_out_what_stays() -> None:
    try:
        with no_collection():
            with no_collection():  # the inner end is not that of the outer one
                stays: list[list[int]] = [[] for _ in range(1000)]
            assert not gc.isenabled()
        assert gc.isenabled() and gc.get_freeze_count() >= len(stays)
        with pytest.raises(KeyError), no_collection():
            raise KeyError
        assert gc.isenabled()
    finally:
        gc.unfreeze()


@pytest.mark.parametrize(
    ("preset", "cores", "expected"),
    [("nano", 1, 1), ("nano", 2, 1), ("nano", 4, 3), ("nano", 64, 4), ("vit_b", 64, None)],
)
def test_small_models_take_few_threads(
    monkeypatch: pytest.MonkeyPatch, preset: str, cores: int, expected: int | None
) -> None:
    taken: list[int] = []
    work = torch.device("cpu"), RefSAMConfig.preset(preset).image_encoder.multiplications
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "available_cores", lambda: cores)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    threads.choose_threads(*work)
    calls = [] if expected is None else [expected]
    assert taken == calls
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    threads.choose_threads(*work)
    assert taken == calls


def test_torchrun_says_which_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for rank, expected in ((None, 0), ("2", 2), ("5", 1), ("x", 0)):
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if rank is not None:
            monkeypatch.setenv("LOCAL_RANK", rank)
        assert device.choose_device("auto") == torch.device("cuda", expected)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert device.choose_device("auto") == torch.device("cpu")


def test_users_of_segment_video_have_what_the_command_line_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Few threads, kept memory and the automatic dtype, none of which reaches into the caller's code."""
    counts, kept = [], []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "available_cores", lambda: 64)
    monkeypatch.setattr(streaming, "keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(streaming, "choose_dtype", lambda name, place: torch.bfloat16)
    monkeypatch.setattr(VideoSession, "step", lambda *_: counts.append(facts()))
    before = torch.get_num_threads()
    model = tiny_model()
    for _ in segment_video(model, [np.zeros((8, 8, 3), np.uint8)] * 2, ["the dog"]):
        assert not torch.is_autocast_enabled("cpu")
    assert counts == [(4, True)] * 2 and kept == [True]
    assert torch.get_num_threads() == before
    counts.clear()
    with torch.autocast("cpu", torch.float16):
        list(segment_video(model, [np.zeros((8, 8, 3), np.uint8)], ["the dog"]))
    list(segment_video(model, [np.zeros((8, 8, 3), np.uint8)], ["the dog"], dtype=torch.float32))
    assert counts == [(4, True), (4, False)]


def facts() -> tuple[int, bool]:
    """Threads of torch, and whether it lowers products."""
    return torch.get_num_threads(), torch.is_autocast_enabled("cpu")


def test_waiting_is_passive_before_torch_is_imported() -> None:
    code = "import os, sys, refsam; refsam.RefSAMConfig; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.split() == ["PASSIVE", "False"]
