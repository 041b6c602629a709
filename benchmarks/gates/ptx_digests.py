"""`python -m benchmarks.gates.ptx_digests [OPERATOR ...]`: digests of all kernels' PTX; `diff` compares two checkouts."""

import hashlib
import re
import sys
from collections.abc import Iterable

from refsam_kernels.core.triton_aot import cases_of, operators_with_triton, precompile

ARCHITECTURE = 90


def main(operators: Iterable[str]) -> None:
    """Prints a line for each case that sm_90 ships: digest, operator and case."""
    for operator in operators or operators_with_triton():
        for case in cases_of(operator):
            if ARCHITECTURE in case.architectures:
                ptx = precompile(case, ARCHITECTURE).asm["ptx"]
                digest = hashlib.sha256(instructions_of(ptx).encode()).hexdigest()
                print(digest[:16], operator, case.name, sep="\t", flush=True)


def instructions_of(ptx: str) -> str:
    """PTX without debug information, comments and the kernel's name: the code that runs."""
    code = ptx.partition(".section")[0]
    code = re.sub(r"//.*|^\s*\.(loc|file)\b.*", "", code, flags=re.MULTILINE)
    kernel = re.search(r"\.entry\s+(\w+)", code)
    return re.sub(r"\s+", " ", code.replace(kernel[1], "kernel") if kernel else code)


if __name__ == "__main__":
    main(sys.argv[1:])
