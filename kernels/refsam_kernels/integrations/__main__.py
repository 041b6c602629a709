"""`python -m refsam_kernels.integrations --list`: the models that `optimize` makes faster, their classes, and which parts."""

import argparse

from refsam_kernels.core.output import print_all
from refsam_kernels.integrations.models import MODELS, Served


def table(rows: tuple[Served, ...] = MODELS) -> str:
    """The rows in columns, under their names."""
    lines = [Served._fields, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main() -> None:
    """Prints the list."""
    parser = argparse.ArgumentParser(
        prog="python -m refsam_kernels.integrations", description=__doc__
    )
    parser.add_argument("--list", action="store_true", required=True, help="print the models")
    parser.parse_args()
    print_all(table())


if __name__ == "__main__":
    main()
