"""Loads the compiled libraries in the folder; one that cannot be loaded is a wrong result, and is built here."""

import os
import subprocess
import sys

from benchmarks.gpu_report.rows import Rows
from refsam_kernels import build, prerequisites
from refsam_kernels.core import libraries

IS_REHEARSAL = bool(os.environ.get("REFSAM_REPORT_REHEARSAL"))
NAMES = ("cpu", "cuda")


def run(rows: Rows) -> None:
    """A row for each library; after a build, again."""
    refusals = {name: refusal(name) for name in NAMES}
    for name, reason in refusals.items():
        rows.write(library=name, **described(name, reason))
    if not any(refusals.values()) or IS_REHEARSAL:
        return
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    try:
        build.build_all(libraries.folder())  # where every other task looks for them
    except (prerequisites.BuildError, OSError) as error:
        print(error)
    for name in NAMES:
        if refusals[name]:
            rows.write(library=name, built_here=True, **described(name, refusal(name)))


def refusal(name: str) -> str | None:
    """Why a new process cannot load the library, None if it can."""
    code = f"from refsam_kernels.core import libraries; libraries.load({name!r})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    return (result.stderr.strip() or "it ended").splitlines()[-1] if result.returncode else None


def described(name: str, reason: str | None) -> dict[str, str]:
    """The library's build if it can be loaded, else the reason."""
    if reason:
        return {"wrong": f"_C_{name}.so cannot be loaded: {reason}"}
    entry = build.read_report(libraries.folder()).get(f"_C_{name}", {})
    return {key: str(value) for key, value in entry.items() if key != "built"}
