"""Compiles Triton kernels into Triton's cache in a pool of processes, so that no later task waits for the compiler.

"shipped": what the compile gate lists for this GPU; "tuning": every tile that the tuning stage tries.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import torch

from benchmarks.gpu_report.machine import IS_REHEARSAL, first_line
from benchmarks.gpu_report.rows import Rows
from refsam_kernels.core.triton_aot import (
    ARCHITECTURES,
    cases_of,
    operators_with_triton,
    precompile,
)

Item = tuple[str, ...]


def run(rows: Rows, what: str) -> None:
    """A row when a kernel could not be compiled, and one at the end."""
    architecture = architecture_here()
    items = list(shipped(architecture) if what == "shipped" else tiles(architecture))
    if IS_REHEARSAL:
        items = items[:2]
    workers = max(1, (os.cpu_count() or 2) - 1 if what == "shipped" else (os.cpu_count() or 2) // 3)
    compiled = 0
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(compile_item, item, architecture): item for item in items}
        for job in as_completed(jobs):
            if error := job.exception():
                rows.write(item=" ".join(jobs[job]), wrong=first_line(error))
            else:
                compiled += 1
    rows.write(compiled=compiled, of=len(items), architecture=architecture)


def architecture_here() -> int:
    """The newest architecture of the gate that this GPU runs; in a rehearsal that of the GPU that the report is for."""
    if IS_REHEARSAL:
        return 90
    major, minor = torch.cuda.get_device_capability()
    return max(known for known in ARCHITECTURES if known <= 10 * major + minor)


def shipped(architecture: int) -> Iterator[Item]:
    """Operator and number of each case of the compile gate."""
    for operator in operators_with_triton():
        for index, case in enumerate(cases_of(operator)):
            if architecture in case.architectures:
                yield operator, str(index)


def tiles(architecture: int) -> Iterator[Item]:
    """Setting, kernel and number of each tile that tuning tries."""
    from benchmarks.gpu_report.tasks.tuning import SETTINGS, problem_of, tiles_of

    for name in SETTINGS:
        for kernel, candidates in tiles_of(problem_of(name, architecture)).items():
            for number in range(len(candidates)):
                yield "tuning", name, kernel, str(number)


def compile_item(item: Item, architecture: int) -> None:
    """Compiles one item in a process of the pool."""
    torch.set_num_threads(1)
    if item[0] == "tuning":
        from benchmarks.gpu_report.tasks.tuning import compile_tile

        _, setting, kernel, number = item
        compile_tile(setting, kernel, int(number), architecture)
    else:
        precompile(cases_of(item[0])[int(item[1])], architecture)
