"""How good a membrane map is: average precision, and what plain image filters reach.

For judging a network's output against a truth, beside the best of three filters that need no
training. The filters work slice by slice, on the last two axes (y, x).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
SIGMAS = (1.0, 2.0, 3.0, 4.0)


class Baseline(NamedTuple):
    """A filter, the width of its Gaussian in pixels, and the average precision it reaches."""

    name: str
    sigma: float
    average_precision: float


def average_precision(score: NDArray[Any], truth: NDArray[Any]) -> float:
    """Area under the precision-recall curve, as the sum of its steps.

    Takes arrays of one shape; every value of `score` is a threshold, and voxels of equal score
    pass it together. 1 is perfect; a score that says nothing reaches the share of true voxels.

    >>> average_precision(np.array([0.9, 0.8, 0.7, 0.1]), np.array([True, False, True, False]))
    0.8333333333333333
    """
    if score.shape != truth.shape:
        raise ValueError(f"score has shape {score.shape}, truth {truth.shape}: they must be equal")
    order = np.argsort(-score.ravel(), kind="stable")
    descending = score.ravel()[order]
    true_so_far = np.cumsum(truth.ravel()[order] != 0, dtype=np.int64)
    if true_so_far.size == 0 or true_so_far[-1] == 0:
        raise ValueError("average precision needs at least one true voxel: truth has none")
    thresholds = np.append(np.flatnonzero(np.diff(descending)), descending.size - 1)
    precision = true_so_far[thresholds] / (thresholds + 1)
    recall_steps = np.diff(true_so_far[thresholds], prepend=0) / true_so_far[-1]
    return float((precision * recall_steps).sum())


def smoothed_intensity(raw: NDArray[Any], sigma: float) -> Floats:
    """Grey value after a Gaussian blur of `sigma` pixels; same shape as `raw` (..., y, x)."""
    return _derivative(raw, sigma, 0, 0)


def gradient_magnitude(raw: NDArray[Any], sigma: float) -> Floats:
    """Steepness of the blurred grey values, per pixel; same shape as `raw` (..., y, x)."""
    slope_y, slope_x = _derivative(raw, sigma, 1, 0), _derivative(raw, sigma, 0, 1)
    return np.asarray(np.hypot(slope_y, slope_x), np.float32)


def largest_hessian_eigenvalue(raw: NDArray[Any], sigma: float) -> Floats:
    """Largest curvature of the blurred grey values: high on dark lines about `sigma` wide."""
    yy = _derivative(raw, sigma, 2, 0)
    xx = _derivative(raw, sigma, 0, 2)
    yx = _derivative(raw, sigma, 1, 1)
    return np.asarray((yy + xx) / 2 + np.hypot((yy - xx) / 2, yx), np.float32)


def best_baseline(raw: NDArray[Any], truth: NDArray[Any]) -> Baseline:
    """The filter and width that reach the highest average precision on this very truth.

    Choosing on the truth itself favours the filter, so a network that wins has earned it.
    """
    candidates: dict[str, Callable[[NDArray[Any], float], Floats]] = {
        "smoothed intensity": smoothed_intensity,
        "smoothed darkness": lambda image, sigma: -smoothed_intensity(image, sigma),
        "gradient magnitude": gradient_magnitude,
        "largest Hessian eigenvalue": largest_hessian_eigenvalue,
    }
    results = (
        Baseline(name, sigma, average_precision(score(raw, sigma), truth))
        for name, score in candidates.items()
        for sigma in SIGMAS
    )
    return max(results, key=lambda result: result.average_precision)


def _derivative(raw: NDArray[Any], sigma: float, order_y: int, order_x: int) -> Floats:
    """Gaussian derivative along y and x, of orders 0 to 2; edges reflect."""
    along_y = _correlate(raw.astype(np.float32), _gaussian(sigma, order_y), raw.ndim - 2)
    return _correlate(along_y, _gaussian(sigma, order_x), raw.ndim - 1)


def _gaussian(sigma: float, order: int) -> Floats:
    """Correlation kernel of a Gaussian's derivative, cut at four sigma."""
    reach = int(4 * sigma + 0.5)
    x = np.arange(-reach, reach + 1)
    density = np.exp(-(x**2) / (2 * sigma**2))
    density /= density.sum()
    factors = (np.ones_like(density), x / sigma**2, (x**2 - sigma**2) / sigma**4)
    kernel = factors[order] * density
    if order == 2:
        kernel -= kernel.mean()
    return kernel.astype(np.float32)


def _correlate(image: Floats, kernel: Floats, axis: int) -> Floats:
    reach, length = len(kernel) // 2, image.shape[axis]
    pad = [(reach, reach) if other == axis else (0, 0) for other in range(image.ndim)]
    padded = np.moveaxis(np.pad(image, pad, mode="reflect"), axis, 0)
    result = np.zeros_like(padded[:length])
    for shift, tap in enumerate(kernel):
        result += tap * padded[shift : shift + length]
    return np.moveaxis(result, 0, axis)
