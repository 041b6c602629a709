"""`python -m benchmarks.report.gpu --out FOLDER`: all that there is to know of this machine's GPU in one folder, without network.

The compiled libraries that lie here, built elsewhere perhaps, are loaded first; what cannot be loaded is built here. Then GPU
tests, tuned tiles, benchmarks (they run with the tuned tiles), and what the kernels need of the GPU's architecture.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.__main__ import main as run_benchmarks
from benchmarks.gates.compile_gate import main as compile_gate
from benchmarks.tune import main as tune
from refsam_kernels import build
from refsam_kernels.core import libraries
from refsam_kernels.core.triton_aot import ARCHITECTURES

LIBRARIES = ("cpu", "cuda")


def main(arguments: list[str] | None = None) -> int:
    """Writes libraries.txt, info.txt, tests.txt, tuned.json, cuda.jsonl and compile_gate.json.

    Returns 1 if a test failed, a result was wrong or a kernel spills; 2 without a GPU.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report.gpu", description=main.__doc__
    )
    parser.add_argument("--out", type=Path, default=Path("out/gpu-report"))
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each case")
    parser.add_argument("--tuning-seconds", type=float, default=150.0, help="time for tuning")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu-report needs a CUDA device; there is none here, so nothing was measured")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    load_or_build(options.out / "libraries.txt")
    record([sys.executable, "-m", "refsam_kernels.info"], options.out / "info.txt")
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:benchmark"]
    failed = record(tests, options.out / "tests.txt")
    tune(["--seconds", str(options.tuning_seconds), "--out", str(options.out / "tuned.json")])
    wrong = run_benchmarks(
        ["--device", "cuda", "--seconds", str(options.seconds), "--out", str(options.out)]
    )
    spilled = compile_for(options.out / "compile_gate.json")
    return int(bool(failed or wrong or spilled))


def load_or_build(path: Path) -> None:
    """Writes whether the compiled libraries of the package can be loaded, and if not, builds them and tries again."""
    refusals = {name: refusal(name) for name in LIBRARIES}
    lines = [described(name, reason) for name, reason in refusals.items()]
    if any(refusals.values()):
        record([sys.executable, "-P", build.__file__], path.with_name("build.txt"))
        lines.append("Built here, see build.txt:")
        lines += [described(name, refusal(name)) for name in LIBRARIES]
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def refusal(name: str) -> str | None:
    """Why a new process cannot load the library, None if it can."""
    code = f"from refsam_kernels.core import libraries; libraries.load({name!r})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    return (result.stderr.strip() or "it ended").splitlines()[-1] if result.returncode else None


def described(name: str, reason: str | None) -> str:
    """One line about a library: what it was built with if it can be loaded, why not otherwise."""
    if reason:
        return f"_C_{name}.so cannot be loaded: {reason}"
    entry = libraries.report_of(f"_C_{name}", libraries.folder())
    facts = ", ".join(f"{key} {value}" for key, value in entry.items() if key != "built")
    return f"_C_{name}.so is loaded ({facts or 'nothing is known of its build'})"


def compile_for(path: Path) -> int:
    """Runs the compile gate for this GPU, as far as it is one of the gate's; 1 if it fails."""
    major, minor = torch.cuda.get_device_capability()
    architecture = 10 * major + minor
    if architecture not in ARCHITECTURES:
        print(f"{path.name}: sm_{architecture} is none of the compile gate's")
        return 0
    return compile_gate(["--architecture", str(architecture), "--out", str(path)])


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
