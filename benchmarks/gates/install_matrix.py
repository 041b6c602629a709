"""Installs refsam in many environments and writes what came of it: `make install-matrix`, needs no package but pip.

    python -m benchmarks.gates.install_matrix [--list] [ROW...]    # rows by name, all if none

Each row is a fresh environment in a folder of its own with a copy of the checkout, one Python, one torch or none, and one thing
that is different from the plain case. A row that cannot be run here says why. Rows of other names stay in the results.

refsam is installed by pip. torch before it comes by uv where the search path has one: its cache loads and unpacks each release
once, not gigabytes for each row.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "install_matrix.jsonl"
LIMIT = 900  # seconds for one command; a row takes one to three minutes
NOBODY = "nobody"
USER_SITE = "import site; print(site.getusersitepackages())"
# Imports, says which libraries there are, and computes: against the formula, and compiled in one graph.
PROBE = """
import json, torch
from refsam_kernels import build, rel_pos_attention
report = json.loads((build.PACKAGE / build.REPORT).read_text())["_C_cpu"]
tensors = [torch.randn(shape) for shape in ((1, 5, 7, 96), (5, 16), (5, 16), (96,))]
names = ("qkv", "rel_pos_h", "rel_pos_w", "qkv_bias")
def attend(backend=None):
    inputs = dict(zip(names, tensors))
    return rel_pos_attention(**inputs, num_heads=2, window_size=3, backend=backend)
wanted = attend("reference")
torch.testing.assert_close(attend("cpu" if report["built"] else "fallback"), wanted)
torch.testing.assert_close(torch.compile(attend, fullgraph=True, backend="aot_eager")(), wanted)
print(torch.__version__, "|", "built" if report["built"] else report["reason"])
"""
# Without torch there is nothing to import; the report stands beside where the library would be.
PROBE_WITHOUT_TORCH = """
import importlib.util, json, pathlib
package = pathlib.Path(importlib.util.find_spec("refsam_kernels").origin).parent
print("none |", json.loads((package / "_build.json").read_text())["_C_cpu"]["reason"])
"""


@dataclass(frozen=True)
class Row:
    """One environment; `condition` is what is different in it."""

    python: str
    torch: str  # "" for none
    condition: str = "plain"

    @property
    def name(self) -> str:
        """As the command line takes it: py3.12-torch2.11-plain."""
        torch = f"torch{self.torch}" if self.torch else "none"
        return f"py{self.python}-{torch}-{self.condition.replace(' ', '-')}"


CONDITIONS = (
    "no compiler",
    "no isolation",
    "user site",
    "system packages",
    "spaces",
    "not root",
    "editable",
    "wheel",
)
ROWS = (
    *(
        Row(python, torch)
        for python in ("3.11", "3.12", "3.13")
        for torch in ("2.10", "2.11", "2.13")
    ),
    *(Row(python, "", "no compiler") for python in ("3.11", "3.12", "3.13")),
    Row("3.12", ""),
    Row("3.12", "", "no isolation no setuptools"),
    Row("3.12", "2.10", "no compiler"),
    *(Row("3.12", "2.13", condition) for condition in CONDITIONS),
)


class Unavailable(Exception):
    """Why a row cannot be run on this machine."""


class Environment:
    """A row's folder, environment variables and Python."""

    def __init__(self, row: Row, folder: Path) -> None:
        self.row = row
        self.folder = folder / ("with two spaces" if row.condition == "spaces" else "plain")
        self.source, self.home = self.folder / "source", self.folder / "home"
        self.variables = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "VIRTUAL_ENV", "REFSAM", "CXX"))
        }
        # Only torch's own CUDA is looked at: an nvcc of this machine would make every row an hour longer.
        self.variables |= {"HOME": str(self.home), "REFSAM_BUILD_CUDA": "0"}
        self.python = self.folder / "venv" / "bin" / "python"

    def run(self, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a command in the row's home, as its user."""
        words = [str(word) for word in command]
        if self.row.condition == "not root":
            names = [f"{name}={value}" for name, value in self.variables.items()]
            words = ["runuser", "-u", NOBODY, "--", "env", *names, *words]
        return subprocess.run(
            words,
            cwd=self.home,
            env=self.variables,
            stdin=subprocess.DEVNULL,  # a question would wait for ever
            capture_output=True,
            text=True,
            check=check,
            timeout=LIMIT,
        )

    def pip(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs pip of the row's Python."""
        return self.run(
            self.python, "-m", "pip", "--disable-pip-version-check", *arguments, check=check
        )

    def prepare(self) -> None:
        """The copy of the checkout and the virtual environment, with torch in it or beside it."""
        interpreter = find_python(self.row.python)
        self.home.mkdir(parents=True)
        ignored = shutil.ignore_patterns(
            ".git", ".venv*", "build", "out", "*.so", "_build.json", "__pycache__", "*.egg-info"
        )
        shutil.copytree(ROOT, self.source, ignore=ignored)
        if self.row.condition == "no compiler":
            self.variables["CXX"] = "no-such-compiler"
        if self.row.condition == "not root":
            self.give_to_nobody()
        outside = self.row.condition in ("user site", "system packages")
        if self.row.condition in ("system packages", "not root"):
            interpreter = self.copy_python(interpreter)
        options = ["--system-site-packages"] if outside else []
        self.run(interpreter, "-m", "venv", *options, self.python.parents[1])
        if self.row.torch:
            self.install_torch(interpreter if outside else self.python)

    def give_to_nobody(self) -> None:
        """Makes the row's folder that of the user who runs its commands."""
        if os.geteuid() != 0 or not shutil.which("runuser"):
            raise Unavailable("needs root, to become another user")
        for path in (self.folder.parent, self.folder):
            path.chmod(0o755)
        subprocess.run(["chown", "-R", NOBODY, str(self.folder)], check=True)

    def copy_python(self, interpreter: Path) -> Path:
        """The interpreter of a relocated copy of its installation: with site-packages of its own, for every user."""
        prefix = interpreter.resolve().parents[1]
        library = prefix / "lib" / f"python{self.row.python}"
        if not (library / "ensurepip").is_dir() or prefix == Path("/usr"):
            raise Unavailable("needs a Python that stands in a folder of its own")
        shutil.copytree(prefix, self.folder / "python", symlinks=True)
        self.variables["LD_LIBRARY_PATH"] = str(self.folder / "python" / "lib")  # its own libpython
        return self.folder / "python" / "bin" / f"python{self.row.python}"

    def install_torch(self, python: Path) -> None:
        """The row's torch, in the newest patch release, with what it needs to be imported."""
        wanted = [f"torch=={self.row.torch}.*", "numpy"]
        if self.row.condition == "user site":
            wanted += ["--target", self.run(python, "-c", USER_SITE).stdout.strip()]
        if uv := shutil.which("uv"):
            command = [uv, "pip", "install", "--quiet", "--python", str(python), *wanted]
            subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=True,
                timeout=LIMIT,
            )
        else:
            self.run(python, "-m", "pip", "install", "--quiet", *wanted)

    def install(self) -> subprocess.CompletedProcess[str]:
        """This project, without its other dependencies."""
        options = ["--no-deps", "--verbose"]
        if self.row.condition.startswith("no isolation"):
            options.append("--no-build-isolation")
            if self.row.condition == "no isolation":
                self.pip("install", "--quiet", "setuptools>=77", "wheel", "pybind11")
            else:
                self.pip("uninstall", "--quiet", "--yes", "setuptools", check=False)
        if self.row.condition == "editable":
            options.append("--editable")
        if self.row.condition != "wheel":
            return self.pip("install", *options, self.source, check=False)
        made = self.pip("wheel", *options, "--wheel-dir", self.folder, self.source, check=False)
        if made.returncode:
            return made
        shutil.rmtree(self.source)  # the wheel has all that is installed
        return self.pip("install", *options, *self.folder.glob("*.whl"), check=False)


def find_python(version: str) -> Path:
    """The interpreter of a version: pyenv's, or one of the search path. Raises `Unavailable` if there is none."""
    candidates = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))
    if found := shutil.which(f"python{version}"):
        candidates.append(Path(found))
    for path in candidates:
        if subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0:
            return path
    raise Unavailable(f"no Python {version} here")


def outcome(row: Row) -> tuple[str, str]:
    """ "passed", "failed", "refused in words" or "not run", and in a line what came of it."""
    with tempfile.TemporaryDirectory(prefix="refsam-install-") as name:
        environment = Environment(row, Path(name))
        try:
            environment.prepare()
        except Unavailable as reason:
            return "not run", str(reason)
        result = environment.install()
        if result.returncode:
            said = [line.strip() for line in (result.stdout + result.stderr).splitlines()]
            words = next((line for line in said if line.startswith("refsam: ")), None)
            return ("refused in words", words) if words else ("failed", said[-1])
        probe = PROBE if row.torch else PROBE_WITHOUT_TORCH
        found = environment.run(environment.python, "-c", probe, check=False)
        lines = (found.stdout if found.returncode == 0 else found.stderr).strip().splitlines()
        return ("failed" if found.returncode else "passed"), lines[-1] if lines else ""


def run(rows: list[Row]) -> Iterator[dict[str, Any]]:
    """The outcome of each row, as the results have it."""
    for row in rows:
        start = time.monotonic()
        try:
            state, detail = outcome(row)
        except subprocess.TimeoutExpired:
            state, detail = "failed", f"longer than {LIMIT} s"
        except subprocess.CalledProcessError as error:
            lines = (error.stderr or error.stdout or str(error)).strip().splitlines()
            state, detail = "failed", f"before the installation: {lines[-1] if lines else error}"
        yield {
            "row": row.name,
            "python": row.python,
            "torch": row.torch or "none",
            "condition": row.condition,
            "state": state,
            "detail": detail.replace(str(Path.home()), "~"),
            "commit": commit(),
            "seconds": round(time.monotonic() - start),
        }


def commit() -> str:
    """The commit of the checkout, with a sign if there are changes to other files than the results."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return result.stdout.strip()

    own = f":!{RESULTS.relative_to(ROOT)}"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", own)
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def read() -> dict[str, dict[str, Any]]:
    """The results that are there, by the names of rows."""
    entries = map(json.loads, RESULTS.read_text().splitlines()) if RESULTS.is_file() else ()
    names = {row.name for row in ROWS}
    return {entry["row"]: entry for entry in entries if entry["row"] in names}


def main() -> None:
    """Runs the rows that are named, one after the other, and writes each as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the names of all rows")
    parser.add_argument("rows", nargs="*", metavar="ROW")
    arguments = parser.parse_args()
    by_name = {row.name: row for row in ROWS}
    if arguments.list:
        print("\n".join(by_name))
        return
    if unknown := set(arguments.rows) - set(by_name):
        sys.exit(f"rows: got {', '.join(sorted(unknown))}, wanted some of --list")
    for entry in run([by_name[name] for name in arguments.rows or by_name]):
        found = read() | {entry["row"]: entry}  # another process may have written meanwhile
        RESULTS.write_text("".join(json.dumps(each) + "\n" for each in found.values()))
        print(f"{entry['row']}: {entry['state']}, {entry['detail']}", flush=True)


if __name__ == "__main__":
    main()
