"""The output of this package's commands."""

import os
import sys


def print_all(text: str) -> None:
    """Prints the text; a reader that ends early, such as `| head`, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The interpreter flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
