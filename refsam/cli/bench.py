"""``refsam bench``: the benchmarks of a checkout."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from refsam.errors import UserError

app = typer.Typer(rich_markup_mode="markdown")
ROOT = Path(__file__).resolve().parents[2]


@app.command()
def bench(
    operators: Annotated[
        list[str] | None, typer.Argument(metavar="[OPERATOR]...", help="Operators to measure; all by default.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Every size, and training too: an hour or more instead of some ten minutes.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="auto (the GPU if there is one), cpu or cuda.", metavar="NAME")
    ] = "auto",
    seconds: Annotated[
        float, typer.Option(help="Time for each case; slow ones take five rounds anyway.", min=0)
    ] = 5.0,
    out: Annotated[Path, typer.Option(help="Folder for the rows (JSON lines) and the plots.")] = Path("out/bench"),
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="BEFORE AFTER", help="Measure nothing: compare the folders or files of two runs."),
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="With --compare: exit with code 1 if something is more than this many percent slower.", min=0)
    ] = 10.0,
) -> None:  # fmt: skip
    """Measure the operators, whole image encoders and whole frames against the alternatives.

    A result is checked before and after it is timed. The limit is what this machine's memory and arithmetic reach in the same
    run. Needs a checkout of the repository, and `pip install 'refsam[bench]'` for the libraries it compares with.

    Example: `refsam bench rel_pos_attention --out before`, change something, `--out after`, then
    `refsam bench --compare before after`.
    """
    if not (ROOT / "benchmarks" / "__main__.py").is_file():
        raise UserError(
            f"bench: the benchmarks are not part of the package in {ROOT}; clone the repository and install that: "
            "pip install -e '.[bench]'"
        )
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: want auto, cpu or cuda")
    command = [sys.executable, "-m", "benchmarks"]
    if compare is not None:
        places = [str(path.resolve()) for path in compare]
        command += ["--compare", *places, "--threshold", str(threshold)]
    else:
        command += [*(operators or []), "--seconds", str(seconds), "--out", str(out.resolve())]
        command += [] if full else ["--short"]
        command += [] if device == "auto" else ["--device", device]
    # From the checkout, whose folder `benchmarks` nothing can import otherwise.
    raise typer.Exit(subprocess.run(command, cwd=ROOT, check=False).returncode)
