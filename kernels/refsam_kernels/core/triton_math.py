"""Functions that Triton kernels of several operators call: the exact GELU, statistics of rows.

Everything is float32 in registers.
"""

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_TWO_PI = tl.constexpr(0.3989422804014327)


@triton.jit
def gelu(x):
    """The exact GELU, `x * Phi(x)` with the normal distribution's Phi."""
    return x * normal_cdf(x)


@triton.jit
def gelu_derivative(x):
    """`Phi(x) + x * phi(x)`, the derivative of `gelu`."""
    return normal_cdf(x) + x * (INVERSE_SQRT_TWO_PI * tl.exp(-0.5 * x * x))


@triton.jit
def normal_cdf(x):
    """Phi(x), by the error function."""
    return 0.5 * (1.0 + tl.erf(x * SQRT_HALF))


@triton.jit
def row_statistics(x, inside, width, eps):
    """Mean and inverse deviation (R,) of rows x (R, C) over the `width` columns `inside`; the others are zero."""
    mean = tl.sum(x, 1) / width
    centred = tl.where(inside, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / width
    return mean, tl.rsqrt(variance + eps)
