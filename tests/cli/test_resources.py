"""How many threads and which memory the command line takes."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from refsam import RefSAMConfig
from refsam.cli import options, start

FAULTS = """
import resource, sys
import numpy as np
from refsam.allocation import keep_freed_memory
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
    """Page faults of a turn that makes and frees twelve megabytes."""
    return number_from(FAULTS, mode)


def number_from(program: str, argument: str) -> int:
    """What a program prints in a process of its own."""
    command = [sys.executable, "-c", program, argument]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_used_again() -> None:
    assert faults("give back") > 1000
    assert faults("keep") < 100


GAPS = """
import sys
from pathlib import Path
import numpy as np
from refsam.allocation import keep_freed_memory, returning_gaps
keep_freed_memory()
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
arrays = [np.ones(64_000, np.uint8) for _ in range(1000)]
arrays = arrays[::10]
before = resident()
passed_on = list(returning_gaps(range(int(sys.argv[1]))))
assert passed_on == list(range(int(sys.argv[1])))
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_gaps_between_arrays_are_returned_with_every_hundredth_frame() -> None:
    assert number_from(GAPS, "99") < 1_000_000
    assert number_from(GAPS, "100") > 40_000_000  # of 57.6


BEGIN = """
import os, sys
from refsam.allocation import begin_without_caches
print("begun", flush=True)
begin_without_caches()
print(os.environ["GLIBC_TUNABLES"], *sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize(
    ("given", "tunables", "times"),
    [
        (None, "glibc.malloc.tcache_count=0", 2),
        ("glibc.malloc.check=0", "glibc.malloc.check=0", 1),
    ],
)
def test_a_program_begins_anew_without_caches_unless_it_is_told(
    given: str | None, tunables: str, times: int
) -> None:
    environment = {name: text for name, text in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {"GLIBC_TUNABLES": given} if given else {}
    command = [sys.executable, "-c", BEGIN, "two words", "3"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.split("\n") == ["begun"] * times + [f"{tunables} two words 3", ""]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize(
    ("command", "expected"), [("segment", "glibc.malloc.tcache_count=0"), ("info", None)]
)
def test_the_command_begins_anew_where_many_frames_are_segmented(
    command: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # so that what is set below is taken back
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.setattr(sys, "argv", ["refsam", command, "--help"])
    monkeypatch.setattr(os, "execv", lambda path, words: begun.append(os.environ["GLIBC_TUNABLES"]))
    with pytest.raises(SystemExit):
        start()
    assert begun == ([expected] if expected else [])


@pytest.mark.parametrize(
    ("preset", "cores", "threads"),
    [("nano", 1, 1), ("nano", 2, 1), ("nano", 4, 3), ("nano", 64, 4), ("vit_b", 64, None)],
)
def test_small_models_take_few_threads(
    monkeypatch: pytest.MonkeyPatch, preset: str, cores: int, threads: int | None
) -> None:
    taken: list[int] = []
    model = SimpleNamespace(device=torch.device("cpu"), config=RefSAMConfig.preset(preset))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(options, "available_cores", lambda: cores)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    options.choose_threads(model)  # type: ignore[arg-type]
    expected = [] if threads is None else [threads]
    assert taken == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    options.choose_threads(model)  # type: ignore[arg-type]
    assert taken == expected


def test_torchrun_says_which_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for rank, expected in ((None, 0), ("2", 2), ("5", 1), ("x", 0)):
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if rank is not None:
            monkeypatch.setenv("LOCAL_RANK", rank)
        assert options.choose_device("auto") == torch.device("cuda", expected)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert options.choose_device("auto") == torch.device("cpu")
