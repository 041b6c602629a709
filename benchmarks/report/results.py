"""Reads committed results, and says on which machine they were measured."""

import json
from pathlib import Path
from typing import Any

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
