"""One file per operator, named after it."""
