"""Measures the operators: `python -m benchmarks` writes one JSON line per operator, case and provider.

A provider is one way to compute a case: a backend of `refsam_kernels`, or the code that one would write without it. A provider
whose result is wrong, before or after it was timed, gets no time. Nothing outside this folder imports it.
"""
