"""Reads committed results, and says on which machine they were measured."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

TABLES: dict[str, Callable[[], str]] = {}
RESULTS = Path(__file__).parents[1] / "results"


def read_result(name: str) -> Any:
    """A result file of one JSON value."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def read_rows(name: str) -> list[dict[str, Any]]:
    """A result file of one JSON object per line."""
    lines = (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def machine_of(origin: dict[str, Any], unit: str) -> str:
    """Processor, how many `unit` ("cores", "threads") a run used, and its torch."""
    count = origin["hardware"]["cores"] if unit == "cores" else origin["threads"]
    return f"{origin['hardware']['processor']}, {count} {unit}, torch {origin['versions']['torch']}"


def markdown(header: str, rows: Iterable[Sequence[str]], note: str = "", *, text: int = 1) -> str:
    """A Markdown table, columns after the first `text` aligned right, and a note below it."""
    columns = header.count("|") + 1
    lines = [f"| {header} |".replace("  ", " ")]
    lines.append("|---" * text + "|--:" * (columns - text) + "|")
    lines += [f"| {' | '.join(row)} |".replace("  ", " ") for row in rows]
    return "\n".join([*lines, *(["", note] if note else [])])


def spread(row: dict[str, Any], factor: float = 1.0) -> str:
    """Median and percentiles in milliseconds times a factor."""
    median, low, high = (factor * row[key] for key in ("median_ms", "p20_ms", "p80_ms"))
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def failure(row: dict[str, Any]) -> str | None:
    """The words of a row without times: why it was skipped, or what was wrong."""
    return next((f"{word}: {row[word]}" for word in ("skipped", "wrong") if word in row), None)


def mebibytes(count: float, digits: int = 0) -> str:
    """Bytes in MiB."""
    return f"{count / 2**20:.{digits}f}"


def table(make: Callable[[], str]) -> Callable[[], str]:
    """Registers a table of the pages under the function's name."""
    TABLES[make.__name__] = make
    return make
