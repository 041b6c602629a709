"""`python -m benchmarks.end_to_end.nano --out FILE`: the bundled model on the frozen benchmark of generated clips."""

import argparse
import json
from pathlib import Path

from benchmarks.provenance import collect
from refsam.evaluation.runners.generated import evaluate_generated, table
from refsam.model import RefSAM


def main() -> None:
    """Score, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    origin = collect("cpu")
    result = evaluate_generated(RefSAM.from_pretrained("nano").eval())
    print(table(result["summary"]))
    arguments.out.write_text(json.dumps({**origin, **result}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
