"""Kernels in CUDA C++: run by the host they make what the same in numpy does, and GPUs that are not
there have compilers that take them."""

from __future__ import annotations

import numpy as np
import pytest

from cuda_source import ARCHITECTURES, SHARED_BYTES, compiled, emulated
from znni_dask.kernels.codelets import LONGEST, refusal
from znni_dask.kernels.cuda import direct, layouts, paging, pooling, weaving
from znni_dask.kernels.cuda import tiles as cuda_tiles
from znni_dask.kernels.cuda.kernel import Kernel

TURN = """
extern "C" __global__ void turn(
    const float *__restrict__ x, float *__restrict__ out, long long n, float by)
{
    extern __shared__ float shared[];
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    shared[threadIdx.x] = i < n ? x[i] : 0;
    __syncthreads();
    if (i < n)
        out[i] = shared[blockDim.x - 1 - threadIdx.x] * by;
}
"""


def turned(source=TURN, n=100, x=None):
    x = np.arange(n, dtype=np.float32) if x is None else x
    out = np.full(n, np.nan, np.float32)
    emulated(Kernel("turn", source, lambda *told: None, 50, 200), 2, x, out, n, 2.0)
    return out


def test_a_kernel_runs_on_the_host():
    want = 2 * np.arange(100).reshape(2, 50)[:, ::-1].ravel()
    np.testing.assert_array_equal(turned(), want)


@pytest.mark.parametrize(
    ("here", "fault", "why"),
    [
        ("__syncthreads();", "", "order of its threads"),
        ("__syncthreads();", "if (threadIdx.x < 3) __syncthreads();", "wait at a barrier"),
        ("i < n ? x[i] : 0", "x[i + 1]", "outside its arrays"),
        ("i < n ? x[i] : 0", "x[i - 5]", "outside its arrays"),
        ("out[i] =", "out[i + 1] =", "outside"),
        ("shared[threadIdx.x] =", "shared[threadIdx.x + 1] =", "outside"),
        ("float by", "double by", "long long and float alone"),
    ],
)
@pytest.mark.parametrize("n", [99, 100])
def test_a_faulty_kernel_is_noticed(here, fault, why, n):
    assert here in TURN
    with pytest.raises(AssertionError, match=why):
        turned(TURN.replace(here, fault), n)


def test_a_kernel_that_is_told_something_else_is_noticed():
    with pytest.raises(AssertionError, match="elements of 4 and 8 bytes"):
        turned(x=np.zeros(100))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_kernel_is_compiled_for_gpus_that_are_not_there(architecture):
    made = compiled(TURN, "turn", architecture)
    assert 0 < made.registers < 64
    assert made.spilled_bytes == made.stack_bytes == 0
    with pytest.raises(AssertionError, match="missing"):
        compiled(TURN.replace("by;", "missing;"), "turn", architecture)


POOLS = [
    pooling.Pool((2, 2, 2), (2, 3, 2), (1, 1, 1), (2, 3, 2), False),
    pooling.Pool((3, 2, 3), (2, 1, 3), (1, 2, 1), (1, 1, 3), False),
    pooling.Pool((1, 3, 2), (1, 2, 2), (1, 1, 3), (1, 1, 1), False),
    pooling.Pool((2, 2, 3), (2, 2, 3), (1, 1, 1), (1, 2, 3), True),
    pooling.Pool((3, 1, 5), (2, 1, 2), (2, 1, 1), (1, 1, 1), True),
]


@pytest.mark.parametrize("pool", POOLS)
def test_pooling(pool, check, check_compiles):
    random = np.random.default_rng(0)
    for size, made, offset in [
        ((7, 9, 23), (2, 3, 6), (0, 0, 0)),
        ((5, 4, 9), (3, 4, 9), (-2, -1, -3)),
        ((3, 9, 70), (1, 5, 40), (1, -1, 0)),
    ]:
        x = random.standard_normal((3, 2, *size)).astype(np.float32)
        x[0, 0, 1, 2, 3] = np.nan
        shape = (3 * int(np.prod(pool.fragments)), 2, *made)
        out = np.full(shape, np.inf, np.float32)
        counted = (1, -100, 0, 100, 4, made[2])
        told = (3, 2, *size, *made, *offset, *counted)
        check(pooling.pooling_kernel(pool), pooling.blocks(pool, shape), 1, x, out, *told)
    check_compiles(pooling.pooling_kernel(pool))


TILES = [
    (layouts.GpuTile((4, 6, 8), (2, 5, 4)), 5),
    (layouts.GpuTile((1, 9, 10), (1, 3, 9)), 3),
    (layouts.GpuTile((5, 8, 12), (3, 8, 11)), 1),
    (layouts.GpuTile((16, 16, 16), (12, 12, 12)), 6),
    (layouts.GpuTile((24, 24, 24), (16, 18, 20)), 3),
]
PLACES = [
    (layouts.Rows((2, 2, 1), (1, 1, 1), (1, 1, 1), (2, 5, 4), (0, 0, 0)), (5, 10, 7)),
    (layouts.Rows((1, 1, 2), (2, 1, 2), (2, 1, 3), (1, 3, 4), (-2, 1, -7)), (5, 4, 13)),
]


def filled(random, *shape):
    return random.standard_normal(shape, np.float32)


def complexes(random, *shape):
    return filled(random, *shape, 2).view(np.complex64)[..., 0]


@pytest.mark.parametrize(("tile", "channels"), TILES)
@pytest.mark.parametrize(("rows", "size"), PLACES)
def test_tiles_are_transformed(tile, channels, rows, size, check, launch):
    random = np.random.default_rng(1)
    layout, count = tile.before(channels), 2 * rows.of_sample - 1
    kernel = cuda_tiles.forward_kernel(tile.size, layout)
    x = filled(random, 2, channels, *size)
    told = (channels, *size, *rows.numbers, 1)
    spectra = np.full((tile.frequencies, count, channels), np.nan, np.complex64)
    steps = count * channels, channels, 1
    blocks = cuda_tiles.blocks(layout, count, channels)
    check(kernel, blocks, 1, x, spectra, *told, *steps)
    turned = np.full((tile.frequencies, channels, count), np.nan, np.complex64)
    launch(kernel, blocks, x, turned, *told, count * channels, 1, count)
    np.testing.assert_array_equal(turned, spectra.swapaxes(1, 2))


@pytest.mark.parametrize(("tile", "channels"), TILES)
@pytest.mark.parametrize(("rows", "size"), PLACES)
def test_tiles_are_transformed_back(tile, channels, rows, size, check):
    random, relu = np.random.default_rng(2), channels > 3
    rows = rows._replace(offset=(0, 0, 0), advance=tile.made)
    layout, count = tile.behind(channels), 2 * rows.of_sample - 1
    products = complexes(random, tile.frequencies, count, channels)
    out = np.full((2, channels, *size), np.nan, np.float32)
    check(
        cuda_tiles.inverse_kernel(tile, layout, relu),
        cuda_tiles.blocks(layout, count, channels),
        *(2, products, filled(random, channels), out, channels, *size),
        *(*rows.numbers, 1, count),
    )


def lengths(shown, *all_of_them):
    """Lengths of lines; most do what others show."""
    found = [n for n in range(*all_of_them) if refusal(n) is None]
    return [n if n in shown else pytest.param(n, marks=pytest.mark.thorough) for n in found]


@pytest.mark.parametrize("length", lengths((16, 24, 32), 8, 34, 2))
def test_gpus_have_registers_for_tiles(length, check_compiles):
    tile = layouts.GpuTile((length,) * 3, (length - 4,) * 3)
    for kernel in (
        cuda_tiles.forward_kernel(tile.size, tile.before(80)),
        cuda_tiles.inverse_kernel(tile, tile.behind(80), True),
    ):
        assert kernel.shared_bytes <= min(SHARED_BYTES.values())
        check_compiles(kernel, spilled_bytes=8)


@pytest.mark.parametrize("length", lengths((1, 2, 9, 13, 22, 25, 28), 1, LONGEST + 1))
def test_lines_of_every_length_are_transformed(length, check):
    """Along x those that are even, along y all."""
    wide = 2 if length % 2 else length
    tile = layouts.GpuTile((1, length, wide), (1, max(1, length - 3), max(1, wide - 2)))
    rows = layouts.Rows((1, 1, 1), (1, 1, 1), (1, 1, 1), tile.made, (0, 0, 0))
    random, (_, *size) = np.random.default_rng(length), tile.size
    x, layout = filled(random, 1, 1, *size), tile.before(1)
    spectra = np.full((tile.frequencies, 1, 1), np.nan, np.complex64)
    told = 1, 1, *size, *rows.numbers, 0
    check(cuda_tiles.forward_kernel(tile.size, layout), 1, 1, x, spectra, *told, 1, 1, 1)
    out = np.full((1, 1, *tile.made), np.nan, np.float32)
    kernel = cuda_tiles.inverse_kernel(tile, tile.behind(1), False)
    check(kernel, 1, 2, spectra, filled(random, 1), out, 1, *tile.made, *rows.numbers, 0, 1)


@pytest.mark.parametrize("step", [(1, 1, 1), (2, 1, 3), (1, 2, 8)])
def test_weaving(step, check, check_compiles):
    random, size = np.random.default_rng(3), (5, 7, 90)
    numbers = random.permutation(int(np.prod(step))) - 1  # one place has no fragment
    parts = [-(-n // s) for n, s in zip(size, step, strict=True)]
    fragments, out = filled(random, max(1, len(numbers) - 1), 2, *parts), filled(random, 2, *size)
    told = 2, *parts, *size, *step
    check(weaving.WEAVE, weaving.blocks(2, *size), 2, fragments, numbers, out, *told)
    check_compiles(weaving.WEAVE)


@pytest.mark.parametrize("area", [1, 250, 700])
@pytest.mark.parametrize("kernel", [paging.GATHER, paging.SCATTER], ids=lambda kernel: kernel.name)
def test_paging(kernel, area, check, check_compiles):
    """Pages are larger than what they hold, and not all are used."""
    random, told = np.random.default_rng(4), (2, 3, 4, area)
    step = 3 * area + 17
    pages, array = filled(random, 11 * step), filled(random, *told)
    numbers = random.permutation(11)[:8].reshape(2, 4)
    made = 2 if kernel is paging.GATHER else 0
    check(kernel, paging.blocks(*told), made, pages, numbers, array, *told, step)
    check_compiles(kernel)


DIRECTS = [
    direct.Direct.of((2, 3, 3), (1, 1, 1), (1, 1, 1), 3, 5, True),
    direct.Direct.of((3, 2, 4), (2, 1, 3), (1, 2, 1), 1, 21, False),
    direct.Direct.of((3, 3, 3), (1, 1, 1), (1, 1, 2), 90, 3, False),
]


@pytest.mark.parametrize("kind", DIRECTS, ids=str)
@pytest.mark.parametrize(
    ("size", "made", "offset"),
    [((5, 9, 23), (3, 4, 6), (0, 1, 0)), ((4, 5, 9), (4, 5, 9), (-1, 0, -2))],
)
def test_direct_convolution(kind, size, made, offset, launch, check_compiles):
    random = np.random.default_rng(0)
    outputs = {5: 5, 11: 21, 3: 3}[kind.made]
    weights = filled(random, outputs, kind.channels, *kind.kernel)
    x, bias = filled(random, 2, kind.channels, *size), filled(random, outputs)
    out = np.full((2, outputs, *made), np.nan, np.float32)
    given = x, direct.taps(kind, weights), bias, out
    told = outputs, *size, *made, *offset
    want = out.copy()
    kernel = direct.direct_kernel(kind)
    kernel.plain(*given[:3], want, *told)
    launch(kernel, direct.blocks(kind, out.shape), *given, *told)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5 * want.std())
    check_compiles(kernel)
