"""The same cases for pytest-benchmark: `pytest benchmarks`, then `pytest-benchmark compare` between commits."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.registry import DEVICES, Case, load_cases
from refsam_kernels.core.dispatch import BACKENDS, Dispatcher

# Whole encoders and frames are left to `refsam bench`.
CASES = [
    pytest.param(
        case,
        device,
        marks=[pytest.mark.gpu] if device == "cuda" else [],
        id=f"{device}-{case.operator}: {case.name}",
    )
    for device in DEVICES
    for case in load_cases([], device)
    if case.operator in Dispatcher.known
]


@pytest.mark.parametrize(("case", "device"), CASES)
def test_fastest_backend(case: Case, device: str, benchmark: BenchmarkFixture) -> None:
    """The backend that is chosen automatically; its result is checked after it was timed."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    workload = case.make(device)
    provider = next(run for name, run in workload.providers.items() if name in BACKENDS)

    def run_and_wait() -> torch.Tensor:
        result = provider()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.group = f"{case.operator}: {case.name}"
    result = benchmark.pedantic(run_and_wait, rounds=10, warmup_rounds=2)
    assert workload.wrong(result) is None
