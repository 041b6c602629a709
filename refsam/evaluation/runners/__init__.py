"""Run a model on a benchmark: predict, score, report."""
