"""Shared by the programs in `end_to_end`: options, sizes of models, new processes, files."""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from benchmarks.provenance import collect
from refsam.config import RefSAMConfig

MODELS = ("vit_b", "vit_l", "vit_h")
Result = TypeVar("Result")


def make_parser(file: str, doc: str | None, out: str | None = None) -> argparse.ArgumentParser:
    """A program's parser with `--out`, the file to write: `out/bench/<out>`, or required where no `out` is given.

    `origin` in the options is the provenance of what is measured now.
    """
    name = f"python -m benchmarks.end_to_end.{Path(file).stem}"
    parser = argparse.ArgumentParser(prog=name, description=doc)
    default = None if out is None else Path("out/bench") / out
    parser.add_argument("--out", type=Path, default=default, required=out is None)
    parser.set_defaults(origin=collect("cpu"))
    return parser


def add_sizes(parser: argparse.ArgumentParser, image_size: int = 1024) -> None:
    """The options that say which model with random weights: see `random_config`."""
    parser.add_argument("--model", choices=MODELS, default="vit_b")
    parser.add_argument("--image-size", type=int, default=image_size)
    parser.add_argument("--depth", type=int, help="blocks, for a quick try: the last is global")


def encoder_sizes(image_size: int, depth: int | None = None) -> dict[str, Any]:
    """Entries of `image_encoder`; with a depth, the middle block and the last one are global."""
    blocks = {} if not depth else {"depth": depth, "global_blocks": [depth // 2 - 1, depth - 1]}
    return {"image_size": image_size, **blocks}


def random_config(name: str, image_size: int, depth: int | None = None) -> RefSAMConfig:
    """A preset's configuration with the small text encoder, for which nothing is downloaded."""
    values = RefSAMConfig.preset(name).to_dict()
    values["text_encoder"] = {"kind": "small"}
    values["image_encoder"] |= encoder_sizes(image_size, depth)
    return RefSAMConfig.from_dict(values)


def in_new_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """The function's result from a new process, whose memory holds nothing else."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def write_result(options: argparse.Namespace, content: Mapping[str, Any]) -> None:
    """Write one JSON object, indented: where it comes from, then the content."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**options.origin, **content}, indent=1)
    options.out.write_text(text + "\n", encoding="utf-8")


def report_medians(
    options: argparse.Namespace, runs: Sequence[Mapping[str, float]], **facts: Any
) -> None:
    """Print the median of each figure of the runs, and write medians and runs."""
    medians = {name: median(run[name] for run in runs) for name in runs[0]}
    for name, value in medians.items():
        print(f"{name:34} {value:8.2f}")
    write_result(options, {**facts, "medians": medians, "runs": runs})


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def report_rows(
    options: argparse.Namespace,
    rows: Iterable[dict[str, Any]],
    line: Callable[[dict[str, Any]], str],
) -> int:
    """Print a line for each row as it comes, then write all of them with their origin; returns 1 if one is wrong, else 0."""
    origin = options.origin | {"model": options.model, "image_size": options.image_size}
    found = []
    for row in rows:
        found.append(row | {"provenance": origin})
        print(line(row), flush=True)
    write_rows(options.out, found)
    return int(any("wrong" in row for row in found))


def milliseconds(row: Mapping[str, Any]) -> str:
    """The median of a row, and its 20th and 80th percentile, for people."""
    spread = f"({row['p20_ms']:.0f} to {row['p80_ms']:.0f})"
    return f"{row['median_ms']:8.0f} ms {spread:18}"
