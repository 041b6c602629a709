"""Evaluation: scoring masks, and running models on benchmarks."""
