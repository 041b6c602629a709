"""What the tasks of the report measure: each module is one function `run(rows, *arguments)`."""
