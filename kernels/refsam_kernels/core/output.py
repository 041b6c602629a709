"""The output of this package's commands."""

import os
import sys


def print_all(text: str) -> None:
    """Prints the text, as far as a reader takes it: `| head` may end before the last line."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The interpreter flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
