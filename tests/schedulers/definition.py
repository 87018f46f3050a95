"""The noise schedules from their formulas in Python's float64, and how far float32 arithmetic may be from them.

A float32 operation has a relative error of at most U, and PyTorch's differ between processors: a fused multiply-add
rounds once where two instructions round twice, and a vectorised linspace counts from another value. So a table of
diffusers may be anywhere within `rounding`, which follows each rounding of its computation:

- beta: at most BETA roundings' worth, by the float32 end points and step of linspace, a square or a sigmoid.
- 1 - beta: U / 2, since the result lies in [1/2, 1); their product up to t: the sum of those, and U a factor.
- zero SNR divides differences of r = sqrt(abar): r_t - r_T has the condition number k_t = r_T / (r_t - r_T), 1 at the
  start and 1 / (beta / 2) before the end. Errors common to r_t and r_{t-1} cancel in the ratio of their differences.
"""

import itertools
import math
from fractions import Fraction

import numpy as np

U = 2.0**-24
BETA = 32


def betas(config: dict) -> np.ndarray:
    """beta_t, float64 [T], before any rescaling."""
    count, schedule = config["num_train_timesteps"], config["beta_schedule"]
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    part = [i / (count - 1) for i in range(count)]
    if schedule == "linear":
        return np.array([start + (end - start) * p for p in part])
    if schedule == "scaled_linear":
        return np.array([(math.sqrt(start) + (math.sqrt(end) - math.sqrt(start)) * p) ** 2 for p in part])
    if schedule == "sigmoid":
        return np.array([start + (end - start) / (1 + math.exp(6 - 12 * p)) for p in part])
    angle = [(i / count + 0.008) / 1.008 * math.pi / 2 for i in range(count + 1)]
    # 1 - cos(b)^2 / cos(a)^2 without the cancellation.
    return np.array(
        [min(math.sin(b + a) * math.sin(b - a) / math.cos(a) ** 2, 0.999) for a, b in itertools.pairwise(angle)]
    )


def tables(beta: np.ndarray, zero_snr: bool) -> tuple[np.ndarray, np.ndarray]:
    """beta and abar, float64 [T], from beta: products of exact fractions, then Algorithm 1 of arXiv 2305.08891.

    float32 beta stands for a float32 1 - beta, rounded, as in diffusers.
    """
    product, power = Fraction(1), []
    for alpha in 1 - beta:
        product *= Fraction(float(alpha))
        power.append(float(product))
    if not zero_snr:
        return np.asarray(beta, np.float64), np.array(power)
    root = [math.sqrt(p) for p in power]
    scaled = [((r - root[-1]) * root[0] / (root[0] - root[-1])) ** 2 for r in root]
    ratio = [scaled[0]] + [after / before for before, after in itertools.pairwise(scaled)]
    return 1 - np.array(ratio), np.array(scaled)


def rounding(config: dict) -> tuple[np.ndarray, np.ndarray]:
    """Bounds on the error of float32 tables, float64 [T]: of beta, absolute, and of abar, relative."""
    beta = betas(config)
    factor = (BETA * U * beta + U / 2) / (1 - beta) + U  # relative, of one factor of the product
    if not config["rescale_betas_zero_snr"]:
        return BETA * U * beta, np.cumsum(factor) + U
    root = np.sqrt(np.cumprod(1 - beta))
    error = np.cumsum(factor) / 2  # of root, which its own roundings raise by at most 3 U
    condition = root[-1] / (root[:-1] - root[-1])
    step = (factor[1:-1] / 2 + 3 * U) * (1 + condition[:-1])
    step += (error[-1] - error[1:-1] + 3 * U) * np.diff(condition)
    # Of the ratio of squares: twice the step, and 11 roundings on the way. The first is only squared, the last is 0.
    ratio = np.concatenate([[2 * error[0] + 10 * U], 2 * step + 11 * U, [0]])
    scaled, _ = tables(beta, True)
    alpha = 1 - scaled
    return alpha * ratio + U, np.cumsum(ratio + U / np.maximum(alpha, U)) * (alpha > 0)
