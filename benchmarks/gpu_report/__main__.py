"""`python -m benchmarks.gpu_report [--out FOLDER] [--deadline 560] [--only STAGE ...]`: runs the stages and sums them up."""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from benchmarks.gpu_report import wheels
from benchmarks.gpu_report.runner import Runner, interpreter
from benchmarks.gpu_report.stages import FIRST, STAGES
from benchmarks.gpu_report.stand_in import HangingRunner, rehearsal_environment, shortened

GPU_LIMIT = 90.0  # seconds for the first work on the GPU


def main(arguments: list[str] | None = None) -> int:
    """Writes rows.jsonl, report.log, summary.txt and, where tiles were tuned, tuned.json.

    Returns 0 if every stage ran to its end, wrong results included; 1 if a task failed, was killed or had no time; 2 for
    arguments that cannot be, or without a GPU.
    """
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_report", description="Runs the stages of the GPU report."
    )
    parser.add_argument("--out", type=Path, default=Path("out/gpu-report"))
    parser.add_argument("--deadline", type=float, default=560.0, help="seconds for everything")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="stages by name, in their order")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that are missing here")
    parser.add_argument("--rows", type=Path, help="an earlier report's rows.jsonl, for memcheck")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, without a GPU")
    parser.add_argument("--short", action="store_true", help="a rehearsal of one task a stage")
    parser.add_argument("--plant", choices=["fail", "hang", "crash"], help="into every task")
    options = parser.parse_args(arguments)
    names = [stage.name for stage in STAGES]
    unknown = sorted(set(options.only or ()) - set(names))
    if unknown:
        print(f"--only: got {', '.join(unknown)}, wanted some of {', '.join(names)}")
        return 2
    if options.rows and not options.rows.is_file():
        print(f"--rows: got {options.rows}, wanted an earlier report's rows.jsonl")
        return 2
    wanted = [stage for stage in STAGES if stage.name in (options.only or FIRST)]
    environment = {"REFSAM_REPORT_PLANT": options.plant or ""}
    if options.rows:
        environment["REFSAM_REPORT_ROWS"] = str(options.rows.resolve())
    if options.rehearse:
        environment |= rehearsal_environment(options.out)
        wanted = shortened(wanted, short=options.short, plant=options.plant)
    elif reason := no_gpu():
        print(f"the GPU report needs a CUDA device: {reason}; nothing was measured")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    with wheels.unpacked(options.wheels) as site:
        kind = HangingRunner if options.rehearse and options.plant == "hang" else Runner
        runner = kind(options.out, options.deadline, environment, site, began)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, stop)
        return runner.run(wanted)


def stop(number: int, frame: FrameType | None) -> None:
    """End the whole report: it then sums up its results, even if it gets a second signal."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def no_gpu() -> str | None:
    """Why no CUDA device can be used, as another process finds out; None if one can."""
    code = "import torch; torch.zeros(1, device='cuda'); print(torch.cuda.get_device_name())"
    try:
        result = subprocess.run(
            [*interpreter(), "-c", code],
            capture_output=True,
            text=True,
            check=False,
            timeout=GPU_LIMIT,
        )
    except subprocess.TimeoutExpired:
        return f"it did not answer in {GPU_LIMIT:.0f} s"
    return None if result.returncode == 0 else (result.stderr.strip() or "?").splitlines()[-1]


if __name__ == "__main__":
    sys.exit(main())
