"""`python -m benchmarks.gpu_report.parcel FOLDER`: fills a folder with all that a GPU machine without network lacks."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from refsam_kernels import build

ROOT = Path(__file__).resolve().parents[2]
# Packages that the report's stages import and such a machine lacks.
PACKAGES = (
    "pydantic",
    "pydantic-core",
    "annotated-types",
    "typing-inspection",
    "segment-anything",
    "pycocotools",
    "pi-heif",
)
PYTHON = "3.12"
PLATFORMS = tuple(
    f"manylinux{tag}_x86_64" for tag in ("_2_28", "_2_27", "_2_17", "2014", "_2_12", "1")
)
ARCHITECTURES = "9.0"


def main(arguments: list[str] | None = None) -> int:
    """Fills the folder with wheels and libraries; prints their sizes and the command line. Needs nvcc and network."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report.parcel")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wheels", action="store_true", help="these alone, as a rehearsal wants")
    options = parser.parse_args(arguments)
    folder = options.folder
    download(folder / "wheels")
    if options.wheels:
        return 0
    os.environ |= {"REFSAM_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ARCHITECTURES}
    (folder / "libraries").mkdir(parents=True, exist_ok=True)
    build.build_all(folder / "libraries")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        print(f"{path.stat().st_size / 2**20:7.2f} MiB  {path}")
    print(f"{sum(path.stat().st_size for path in files) / 2**20:7.2f} MiB in all; there:")
    print('  make gpu-report REFSAM_PYTHON=python3 OUT=$OUT REPORT="--deadline 560"')
    return 0


def download(folder: Path) -> None:
    """Downloads the wheels in the versions of constraints.txt, none of what they need; other versions are removed."""
    for path in folder.glob("*.whl"):
        path.unlink()
    options = ["--no-deps", "--only-binary=:all:", f"--python-version={PYTHON}"]
    options += ["--implementation=cp", *(f"--platform={name}" for name in PLATFORMS)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options]
    command += ["--constraint", str(ROOT / "constraints.txt"), "--dest", str(folder), *PACKAGES]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
