"""`python -m benchmarks.tables [--check]`: writes the tables of README and docs from the committed results.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is that of a file in `benchmarks/results/`.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PAGES = ("README.md", "docs/status.md", "docs/kernels.md", "refsam/weights/nano/README.md")
_REGION = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str) -> str:
    """The page's text with every marked table made anew."""
    return _REGION.sub(lambda match: match[1] + _table(match[2]) + "\n" + match[3], text)


def _table(name: str) -> str:
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return _TABLES[name](result)


def _nano_generated(result: dict[str, Any]) -> str:
    from refsam.evaluation.generated import table

    return table(result["summary"])


_TABLES = {"nano_generated": _nano_generated}


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
