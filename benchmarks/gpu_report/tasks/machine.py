"""Provenance of the report: hardware, versions, commit; the backends that would run; the two limits of the device."""

from functools import partial

import torch

from benchmarks import provenance
from benchmarks.gpu_report.machine import DEVICE, IS_REHEARSAL, attempt, median_ms
from benchmarks.gpu_report.rows import Rows
from benchmarks.measure import exact_products
from refsam_kernels import info


def run(rows: Rows) -> None:
    """The provenance and the choice of backends as rows, then the limits on random values."""
    exact_products()
    rows.write(provenance=provenance.collect(DEVICE))
    print(info.describe())
    for operator in sorted(info.Dispatcher.known):
        lines = list(info.choice(info.Dispatcher.known[operator], DEVICE))
        rows.write(operator=operator, choice=" ".join(line.strip() for line in lines))
    count, side = (2**16, 64) if IS_REHEARSAL else (2**31, 8192)
    source = torch.randn(count // 4, device=DEVICE)
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    attempt(rows, lambda: rate(copy, 2 * source.nbytes, "GB/s"), limit="copy")
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(2))
        product = partial(torch.mm, left, right)
        measure = partial(rate, product, 2 * side**3, "GFLOP/s")
        attempt(rows, measure, limit=f"product of {side}, {dtype}")


def rate(call: partial, amount: int, unit: str) -> dict[str, float]:
    """Amount a second, in 10^9."""
    found = median_ms(call, 0.3)
    return {unit: 1e-6 * amount / found["p20_ms"], "median_ms": found["median_ms"]}
