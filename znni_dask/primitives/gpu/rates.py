"""What a GPU does in a second: of a large one of 2023, estimated from its peaks and not measured.
How far another is from that is measured there (`timings`)."""

from znni_dask.primitives.work import Rate

MEMORY = Rate("gpu memory", 3e12)  # bytes to and from it
PRODUCTS = Rate("gpu products", 3.5e13)  # operations, of complex numbers in single precision
TRANSFORMS = Rate("gpu transforms", 1e13)  # operations
LAUNCHES = Rate("gpu launches", 2e5)  # kernels begun
