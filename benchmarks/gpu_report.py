"""`python -m benchmarks.gpu_report --out FOLDER`: GPU tests and benchmarks of this machine in one folder, without network."""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.__main__ import main as run_benchmarks


def main(arguments: list[str] | None = None) -> int:
    """Writes tests.txt, info.txt and cuda.jsonl; returns 1 if a test failed or a result was wrong, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_report", description=main.__doc__
    )
    parser.add_argument("--out", type=Path, default=Path("out/gpu-report"))
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each case")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu-report needs a CUDA device; there is none here, so nothing was measured")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    record([sys.executable, "-m", "refsam_kernels.info"], options.out / "info.txt")
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:benchmark"]
    failed = record(tests, options.out / "tests.txt")
    wrong = run_benchmarks(
        ["--device", "cuda", "--seconds", str(options.seconds), "--out", str(options.out)]
    )
    return int(bool(failed or wrong))


def record(command: list[str], path: Path) -> int:
    """Runs a command, keeps what it prints, shows its last line; returns its exit code."""
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    path.write_text(result.stdout)
    print(f"{path}: {(result.stdout.splitlines() or [''])[-1]}")
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
