"""A rehearsal: every stage with tiny sizes on stand-ins for a GPU, Triton's interpreter and the emulator of CUDA.

The stages, limits, files and processes are those of the real run; only the device and the sizes differ.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu_report import rows
from benchmarks.gpu_report.runner import Runner, Running
from benchmarks.gpu_report.stages import ROOT, Stage, Task

EMULATED = ROOT / "build" / "emulated"
# Stages whose kernels run on stand-ins; the others compile, load what a GPU would be given, or run whole models, which the
# interpreter would take hours for: there PyTorch's backends stand in.
INTERPRETED = ("smoke", "tests", "encoder", "tuning", "attention", "memcheck")
# A short stage's tasks where its first one is not enough: Triton's interpreter, and the emulator of CUDA.
SHORT = {"smoke": ("rel_pos_attention, triton", "mask_postprocess, cuda")}
# Its stages when something is planted: a function's processes and pytest's.
SHORT_PLANTED = ("smoke", "tests")
LIMIT = 600.0  # seconds for a task, on a machine that is slow and does other things too
HANG_LIMIT = 2.0  # seconds for a task that was made to hang, once it has written a row
TESTS = {  # of all files one of each kind, in its quickest part
    "kernels/triton/test_mask_upscale.py": "repeats",
    "kernels/cuda/test_dense_attention.py": "repeats",
    "session/test_cuda_graphs.py": "least_recently or own",
}


def rehearsal_environment(out: Path) -> dict[str, str]:
    """Environment variables of a rehearsal; kernels are compiled into a cache of its own."""
    cache = out.resolve().parent / "gpu-rehearsal-triton"
    return {"REFSAM_REPORT_REHEARSAL": "1", "TRITON_CACHE_DIR": str(cache)}


def shortened(stages: Sequence[Stage], *, short: bool, plant: str | None) -> list[Stage]:
    """The stages for a rehearsal: limits for a slow machine, and few tasks if it is to be short or something is planted."""
    few = short and plant
    wanted = [stage for stage in stages if not few or stage.name in SHORT_PLANTED]
    is_short = short or plant is not None
    return [shorten(stage, short=is_short) for stage in wanted]


def shorten(stage: Stage, *, short: bool) -> Stage:
    """One stage for a rehearsal."""
    tasks = tuple(test_task(task) for task in stage.tasks if task.function or task.name in TESTS)
    if short:
        names = SHORT.get(stage.name, (tasks[0].name,))
        tasks = tuple(task for task in tasks if task.name in names)
    interpreted = {"TRITON_INTERPRET": "1"}
    if (EMULATED / "_C_cuda.so").is_file():
        interpreted["REFSAM_LIBRARIES"] = str(EMULATED)
    environment = interpreted if stage.name in INTERPRETED else {}
    tasks = tuple(replace(task, environment=environment, limit_s=LIMIT) for task in tasks)
    return replace(stage, tasks=tasks, limit_s=3600.0, parallel=min(2, stage.parallel))


def test_task(task: Task) -> Task:
    """A test file's quickest part, which is marked for a GPU only where there is one."""
    if not task.command:
        return task
    *options, mark, _, path = task.command
    return replace(task, command=(*options, mark, "not slow", "-k", TESTS[task.name], path))


class HangingRunner(Runner):
    """Runs tasks that were made to hang: their limit begins with their first row, however long that takes."""

    def unfinished(self, running: Sequence[Running]) -> list[Running]:
        """As for any; those that have written a row are at their limit soon."""
        told = {(row["stage"], row["task"]) for row in rows.read(self.rows)}
        for one in running:
            if (one.stage.name, one.task.name) in told:
                one.ends = min(one.ends, time.monotonic() + HANG_LIMIT)
        return super().unfinished(running)
