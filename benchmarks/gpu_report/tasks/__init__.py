"""The report's tasks: each module has one function `run(rows, *arguments)`."""
