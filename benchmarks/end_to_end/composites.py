"""`python -m benchmarks.end_to_end.composites FOLDER --out FILE`: `nano` among objects of one kind, and covered ones.

FOLDER is a folder of photographs as docs/data.md lays it out, of which the `val` photographs are used; it is not part of the
project; the result holds the SHA-256 of its list. See `refsam.evaluation.runners.composites`.
"""

from pathlib import Path
from typing import Any

from benchmarks.programs import make_parser, write_result
from benchmarks.report.results import markdown
from refsam.checkpoint.files import file_sha256
from refsam.evaluation.runners.composites import evaluate_composites
from refsam.model import RefSAM


def main() -> None:
    """Score, print and write."""
    parser = make_parser(__file__, __doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--clips", type=int, default=40, help="of each kind")
    arguments = parser.parse_args()
    manifest = arguments.folder / "manifest.jsonl"
    if not manifest.is_file():
        parser.error(f"folder: no {manifest}")
    model = RefSAM.from_pretrained(arguments.model).eval()
    result = evaluate_composites(model, arguments.folder, arguments.clips)
    print(table(result))
    write_result(arguments, {"manifest_sha256": file_sha256(manifest), **result})


def table(result: dict[str, Any]) -> str:
    """The summary as a Markdown table."""
    summary = result["summary"]
    rows = [[kind, f"{value:.3f}"] for kind, value in summary["J"].items()]
    rows.append(["left, right, largest, second", f"{summary['told apart']:.3f}"])
    area = summary["false_area while covered"]
    rows.append(["marked while covered, % of the frame", f"{100 * area:.3f}"])
    return markdown("expression | J", rows)


if __name__ == "__main__":
    main()
