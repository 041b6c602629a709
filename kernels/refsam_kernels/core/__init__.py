"""Shared by all operators: backend choice, registration, argument checks, compiled libraries, Triton compilation."""
