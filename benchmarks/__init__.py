"""Measures the operators: `python -m benchmarks` writes one JSON line per operator, case and provider.

A provider is one way to compute a case: a backend of `refsam_kernels`, or what one would write without it. No time is
reported for a provider whose result is wrong, before or after it was timed. Nothing outside this folder imports it.
"""
