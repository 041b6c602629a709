"""The compiled CPU implementation: csrc/cpu/mask_postprocess.cpp, both resizes in one pass over a band of rows."""

from refsam_kernels.core import libraries
from refsam_kernels.mask_postprocess.compiled import calls_of

forward, bits, runs = calls_of(libraries.load("cpu"))
