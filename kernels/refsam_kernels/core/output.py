"""The output of this package's commands."""

import os
import sys


def print_all(text: str) -> None:
    """Prints the text; a reader that ends early, such as `| head`, is no error, and a full disk ends the program in one line."""
    try:
        print(text, flush=True)
    except OSError as error:
        # The interpreter flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"output: cannot be written ({error.strerror})", file=sys.stderr)
            sys.exit(2)
