"""`python -m benchmarks.tables [--check]`: writes the tables of README and docs from the committed results.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is one of `_TABLES`.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PAGES = ("README.md", "docs/status.md", "refsam/weights/nano/README.md")
_REGION = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str) -> str:
    """The page's text with every marked table made anew."""
    return _REGION.sub(lambda match: match[1] + _table(match[2]) + "\n" + match[3], text)


def _table(name: str) -> str:
    return _TABLES[name]()


def _result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _nano_generated() -> str:
    from refsam.evaluation.generated import table

    return table(_result("nano_generated")["summary"])


def _nano_targets() -> str:
    summary, speed = _result("nano_generated")["summary"], _result("segment_nano_cpu")
    accuracy, medians = summary["accuracy"], speed["medians"]
    false_area = 100 * summary["false_area"]
    rows = [
        ("J&F where colour or shape names the object", "0.70", accuracy["colour or shape"]["J&F"]),
        ("J&F over everything", "0.55", accuracy["everything"]["J&F"]),
        ("falsely marked area of absent frames, %", "at most 0.3", false_area),
        ("`refsam segment`, 720p, frames/s", "10", medians["frames_per_second"]),
        ("first mask after the command, s", "at most 6", medians["first_mask_seconds"]),
    ]
    lines = ["| | asked | measured |", "|---|--:|--:|"]
    lines += [f"| {what} | {asked} | {got:.3g} |" for what, asked, got in rows]
    machine = f"{speed['hardware']['processor']}, {speed['hardware']['cores']} cores, torch {speed['versions']['torch']}"
    return "\n".join(
        [
            *lines,
            "",
            f"Speed on {machine}, one expression, float32, medians of {len(speed['runs'])} runs.",
        ]
    )


_TABLES = {"nano_generated": _nano_generated, "nano_targets": _nano_targets}


def main(arguments: list[str]) -> int:
    """Rewrites the pages; with --check only says which are out of date, and returns 1 if any is."""
    stale = []
    for page in PAGES:
        path = ROOT / page
        if not path.exists():
            continue
        text = path.read_text(encoding="utf-8")
        filled = fill(text)
        if filled != text:
            stale.append(page)
            if "--check" not in arguments:
                path.write_text(filled, encoding="utf-8")
    print(f"out of date: {', '.join(stale) or 'nothing'}")
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
