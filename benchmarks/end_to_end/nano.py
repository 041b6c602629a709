"""`python -m benchmarks.end_to_end.nano --out FILE`: the bundled model on the frozen benchmark of generated clips."""

from benchmarks.programs import make_parser, write_result
from refsam.evaluation.runners.generated import evaluate_generated, table
from refsam.model import RefSAM


def main() -> None:
    """Score, print and write."""
    arguments = make_parser(__file__, __doc__).parse_args()
    result = evaluate_generated(RefSAM.from_pretrained("nano").eval())
    print(table(result["summary"]))
    write_result(arguments, result)


if __name__ == "__main__":
    main()
