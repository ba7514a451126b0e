"""What a GPU does in a second: of a large one of 2023, estimated from its peaks and not measured.
How far another is from that is measured there (`timings`)."""

from math import prod

from znni_dask.primitives.base import ITEM_BYTES, Problem
from znni_dask.primitives.work import Rate, Work

MEMORY = Rate("gpu memory", 3e12)  # bytes to and from it
PRODUCTS = Rate("gpu products", 3.5e13)  # operations, of complex numbers in single precision
SUMS = Rate("gpu sums", 1e13)  # operations of products that are summed one by one
TRANSFORMS = Rate("gpu transforms", 1e13)  # operations
LAUNCHES = Rate("gpu launches", 2e5)  # kernels begun
BUS = Rate("gpu bus", 2.5e10)  # bytes to it, or back


def traffic(problem: Problem, passes: float = 1, launches: int = 1) -> Work:
    """Reading the inputs and writing the output, so many times, by so many kernels."""
    values = sum(map(prod, problem.inputs)) + prod(problem.output)
    return Work({MEMORY: passes * ITEM_BYTES * values, LAUNCHES: launches})
