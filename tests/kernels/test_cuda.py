"""CUDA kernels without a GPU: their tests in the emulator, and what the emulator itself must compute and find."""

import subprocess
from collections.abc import Callable

import pytest

from refsam_kernels import prerequisites
from refsam_kernels.core.dispatch import Dispatcher
from tests.kernels.emulator import EMULATOR, emulating, emulator_flags, run_emulated
from tests.kernels.processes import ROOT, processes_of

OPERATORS = sorted(
    name for name, dispatcher in Dispatcher.known.items() if dispatcher.exists("cuda")
)


@pytest.mark.parametrize("operators", processes_of(OPERATORS), ids=" ".join)
def test_in_the_emulator(operators: tuple[str, ...]) -> None:
    run_emulated(operators)


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_slow_in_the_emulator(operator: str) -> None:
    run_emulated([operator], "-m", "slow")


@pytest.fixture(scope="module")
def emulate(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Runs a kernel of tests/csrc/cuda_emulator_cases.cu by its name; returns its results, or what the emulator said."""
    program = tmp_path_factory.mktemp("emulator") / "cases"
    source = ROOT / "tests" / "csrc" / "cuda_emulator_cases.cu"
    try:
        compiler = [*prerequisites.find_compiler(), *emulator_flags()]
    except prerequisites.BuildSkipped as reason:
        pytest.skip(str(reason))
    objects = {path: f"{program}_{path.stem}.o" for path in (source, *EMULATOR.glob("*.cpp"))}
    for path, output in objects.items():
        command = [*compiler, *emulating(path), "-c", str(path), "-o", output]
        subprocess.run(command, check=True, capture_output=True)
    subprocess.run([compiler[0], *objects.values(), "-o", str(program)], check=True)

    def run(case: str) -> str:
        result = subprocess.run([program, case], capture_output=True, text=True, check=True)
        return result.stdout.strip()

    return run


EVERY = " ".join(["1"] * 64)
RESULTS = {
    "sum": " ".join([str(sum(range(64)))] * 64),
    "neighbours": EVERY,
    "lane-to-lane": EVERY,
    "warp-to-warp": EVERY,
    "load": EVERY,
    "leave-early": " ".join(["1 nan"] * 32),
    "copy": " ".join([*"12345678", *"0" * 8, *["nan"] * 48]),
    "copy-groups": EVERY,
    "multiply-half": EVERY,
    "multiply-bfloat16": EVERY,
    # Uninitialised memory shows.
    "not-written": " ".join(["nan"] * 64),
    "not-set": EVERY,
    # A copy that was not waited for has not come, even the one of zeros.
    "copy-not-waited-for": " ".join(["nan"] * 64),
}
ERRORS = {
    # Races that no barrier orders, also if the emulator's own order, or that of a shuffle, gives the right numbers.
    "read-too-early": "of shared memory, which warp",
    "write-too-early": "of shared memory, which warp",
    "barrier-of-too-few": "of shared memory, which warp",
    "lane-reads-too-early": "of shared memory, which lane",
    "lane-writes-too-early": "of shared memory, which lane",
    "load-too-early": "of shared memory, which lane",
    "copy-without-barrier": "of shared memory, which lane",
    "deadlock": "31 threads, first (0, 0, 0), wait at __shfl_xor_sync; 1 threads, first (3, 0, 0), wait at __syncthreads",
    "mask": "__syncwarp: the mask leaves out the lane that calls",
    "copy-forgotten": "a thread ends with copies that it did not wait for",
    "copy-odd-address": "cp_async_16: got an address that is not aligned to 16 bytes",
    "load-global": "ldmatrix_x4: got an address outside shared memory",
    "no-blocks": "launch of a kernel: got a grid of (0, 1, 1)",
    "many-threads": "blocks of (1025, 1, 1) threads",
    "much-shared-memory": "102400 bytes of shared memory",
}


@pytest.mark.parametrize("case", RESULTS)
def test_emulator_computes(emulate: Callable[[str], str], case: str) -> None:
    assert emulate(case) == RESULTS[case]


@pytest.mark.parametrize("case", ERRORS)
def test_emulator_finds(emulate: Callable[[str], str], case: str) -> None:
    assert ERRORS[case] in emulate(case)
