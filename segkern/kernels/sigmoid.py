"""exp, 1 / x and sigmoid that round as PyTorch's do, for Triton kernels in float32 and float64.

What Triton makes of exp(x) in float32 is off by |x| / 2 units in the last place, of exp2 by two
and 0 where the result is below 2^-126, of a division by two. A sum of thousands of sigmoids then
misses what plain PyTorch gives, and so does the choice of the larger of two that are far below 0.
Here exp is a polynomial, which costs no more: a multiprocessor makes eight products and sums in
the time of one exp2.
"""

import triton
import triton.language as tl


@triton.jit
def _power_of_two(k):
    """2^k in float32, for int32 k in [-126, 127]."""
    return ((k + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp_negative(x):
    """exp(x) of x <= 0; NaN stays."""
    if x.dtype == tl.float64:
        e = tl.exp(x)
    else:
        x = tl.where(x < -104.0, -104.0, x)  # where exp is 0
        n = tl.floor(x * 1.44269504 + 0.5)
        r = tl.fma(n, -0.693359375, x)  # x - n log(2), the first part of which is exact
        r = tl.fma(n, 2.12194440e-4, r)
        p = tl.fma(r, 1.9875691500e-4, 1.3981999507e-3)  # Cephes' expf
        p = tl.fma(p, r, 8.3334519073e-3)
        p = tl.fma(p, r, 4.1665795894e-2)
        p = tl.fma(p, r, 1.6666665459e-1)
        p = tl.fma(p, r, 5.0000001201e-1)
        e = 1.0 + tl.fma(p, r * r, r)
        k = n.to(tl.int32)  # down to -150: twice half of it, as a factor is no less than 2^-126
        half = k >> 1
        e = e * _power_of_two(half) * _power_of_two(k - half)
    return e


@triton.jit
def reciprocal(x):
    """1 / x of an x that is neither 0 nor infinite; NaN stays."""
    r = 1.0 / x
    if x.dtype == tl.float32:
        r = tl.fma(r, tl.fma(-x, r, 1.0), r)  # a step of Newton's method
    return r


@triton.jit
def sigmoid_and_factor(x):
    """sigmoid(x), and 1 + exp(-|x|), whose logarithm is softplus(x) - max(x, 0)."""
    e = exp_negative(-tl.abs(x))
    factor = 1.0 + e
    s = reciprocal(factor)
    return tl.where(x < 0, e * s, s), factor


@triton.jit
def sigmoid(x):
    s, _ = sigmoid_and_factor(x)
    return s
